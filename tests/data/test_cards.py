"""Data cards: the ones in the repository, reading files of unknown origin, filling one for a site, and Croissant."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cohorts import blob_patient
from fedlab.apps.cli import main
from fedlab.core.errors import DataError
from fedlab.core.types import Site
from fedlab.data.cards.card import DataCard, card_template, fill_card, read_card
from fedlab.data.cards.schema import FIELDS, MARK, SECTIONS, split_sections
from fedlab.data.sites.statistics import SiteStatistics, site_statistics

CARDS = Path(__file__).resolve().parents[2] / "data_cards"
ALL = sorted(CARDS.glob("*.md"))
FINISHED = [path for path in ALL if path.name != "template.md"]
GENERATED = CARDS / "generated.md"


def changed(**fields: Any) -> str:
    """The generated patients' card with other fields; None takes a field out."""
    card = read_card(GENERATED)
    front = {name: value for name, value in {**card.metadata, **fields}.items() if value is not None}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{card.body}\n"


def site(patients: int, *, held: int = 0, name: str = "st-elsewhere") -> Site:
    made = [blob_patient(f"p{n}", seed=n) for n in range(patients + held)]
    return Site(name=name, train=made[:patients], val=made[patients:])


# The cards in the repository


def test_there_is_a_card_for_every_data_set_of_the_issue() -> None:
    assert {path.stem for path in ALL} == {"brats-2018", "brats-2020", "brats-2021", "brats-2023-gli", "fets-2022",
                                           "msd-task01", "generated", "template"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_card_is_valid_and_survives_writing(path: Path, tmp_path: Path) -> None:
    card = read_card(path)
    assert read_card(card.save(tmp_path / "again.md")) == card


@pytest.mark.parametrize("path", FINISHED, ids=lambda path: path.stem)
def test_finished_cards_have_nothing_open(path: Path) -> None:
    card = read_card(path)
    assert card.open == ()
    assert MARK not in path.read_text("utf-8")


@pytest.mark.parametrize("path", FINISHED, ids=lambda path: path.stem)
def test_every_source_is_cited_and_every_citation_has_a_source(path: Path) -> None:
    card = read_card(path)
    listed = [int(number) for number in re.findall(r"^(\d+)\. ", card.section("Sources"), re.MULTILINE)]
    text = "\n".join(part for heading, part in split_sections(card.body) if heading != "Sources")
    cited = {int(n) for group in re.findall(r"\[(\d+(?:, \d+)*)\]", text) for n in group.split(", ")}
    assert listed == list(range(1, len(listed) + 1)) and len(listed) >= 3
    assert cited == set(listed)


@pytest.mark.parametrize("path", FINISHED, ids=lambda path: path.stem)
def test_numbers_of_patients_agree_within_a_card(path: Path) -> None:
    """The numbers of the front matter also occur in the section on patients."""
    card = read_card(path)
    said = card.section("Patients").replace(",", "")
    for split in card.metadata["splits"]:
        assert split["source"].strip()
        if isinstance(split["patients"], int):
            assert re.search(rf"\b{split['patients']}\b", said), split


def test_the_collections_of_brats_2021_add_up() -> None:
    rows = re.findall(r"^\| .+? \| (\d+) \| (\d+) \|$", read_card(CARDS / "brats-2021.md").body, re.MULTILINE)
    assert [sum(int(row[k]) for row in rows) for k in (0, 1)] == [1251, 219]


def test_label_conventions_of_the_cards_are_those_that_the_reader_uses() -> None:
    from fedlab.data.readers.conventions import CONVENTIONS

    inside = {1: ("necrotic", "non-enhancing"), 2: ("oedema",), 4: ("enhancing tumour",)}
    expected = {"brats-2018": "brats2021", "brats-2020": "brats2021", "brats-2021": "brats2021",
                "brats-2023-gli": "brats2023", "fets-2022": "brats2021", "msd-task01": "msd", "generated": "brats2021"}
    for name, convention in expected.items():
        told = {row["value"]: row["meaning"] for row in read_card(CARDS / f"{name}.md").metadata["labels"]}
        assert set(told) == set(CONVENTIONS[convention]), name
        for value, label in CONVENTIONS[convention].items():
            assert not label or any(word in told[value] for word in inside[label]), (name, value)


def test_the_template_of_the_package_is_the_one_in_data_cards() -> None:
    assert card_template() == read_card(CARDS / "template.md")


def test_the_template_marks_everything_that_only_people_know() -> None:
    template = card_template()
    assert {f"## {heading}" for heading in SECTIONS} <= set(template.open)
    known = {"language", "tags", "task_categories", "size_categories"}
    assert {field.name for field in FIELDS if field.required} - known <= set(template.open)


# Reading and checking


def test_reads_a_card_and_shows_it() -> None:
    card = replace(site(1), card=read_card(GENERATED)).card
    assert card.name == "fedlab generated gliomas"
    assert card.summary.startswith("The output of `fedlab.make_cohort` and `fedlab data phantom`:")
    assert repr(card) == "<DataCard 'fedlab generated gliomas': licence apache-2.0, complete>"
    assert card._repr_markdown_().startswith("# The generated patients")
    shown = card._repr_html_()
    assert "<h2>Known defects</h2>" in shown and "machine-generated" in shown


@pytest.mark.parametrize("fields, said", [
    ({"license": None}, "license: expected a text (Hugging Face's name of the licence, or other), got nothing"),
    ({"license": "GPL"}, "license: expected one of apache-2.0,"),
    ({"license": "other"}, "license_link: expected a text because license is 'other'"),
    ({"pretty_name": 5}, "pretty_name: expected a text (common name of the data set), got the number 5; put it in"),
    ({"version": 1.0}, "version: expected a text (MAJOR.MINOR.PATCH), got the number 1.0; put it in quotes"),
    ({"pretty_name": "   "}, "pretty_name: expected a text"),
    ({"pretty_name": ["a"]}, "pretty_name: expected a text (common name of the data set), got the list ['a']"),
    ({"tags": "mri"}, "tags: expected a list of texts (search terms), got the text 'mri'"),
    ({"tags": []}, "tags: expected a list of texts"),
    ({"tags": ["mri", 3]}, "tags[1]: expected a list of texts (search terms), got the number 3"),
    ({"tags": ["x"] * 201}, "tags: expected at most 200 items, got 201"),
    ({"tags": {"mri": 1}}, "tags: expected a list of texts (search terms), got the mapping {'mri': 1}"),
    ({"size_categories": ["many"]}, "size_categories[0]: expected one of n<1K,"),
    ({"date_published": "last week"}, "date_published: expected a date such as 2021-07-05"),
    ({"date_published": "2021-13"}, "date_published: expected a date such as 2021-07-05"),
    ({"url": "javascript:alert(1)"}, "url: expected a URL that begins with https:// or http://"),
    ({"citation": "x" * 9000}, "citation: expected at most 8000 characters, got 9000"),
    ({"citation": "a\x07b"}, "citation: expected printable characters"),
    ({"splits": [{"name": "all"}]}, "splits[0]: expected a row with exactly name, patients, labelled, source"),
    ({"splits": [dict(name="a", patients=-1, labelled="x", source="y")]}, "splits[0].patients: expected a text, got"),
    ({"splits": [dict(name="a", patients=True, labelled="x", source="y")]}, "splits[0].patients: expected a text, got"),
    ({"licence": "mit"}, "licence: unknown field; did you mean license?"),
    ({"rai:dataColection": "x"}, "rai:dataColection: unknown field; did you mean rai:dataCollection?"),
    ({"rai:dataBiases": None}, "rai:dataBiases: expected a list of texts (over- or under-"),
])
def test_errors_state_the_field_what_was_expected_and_what_was_given(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        DataCard.parse(changed(**fields), where="mine.md")
    assert str(caught.value).startswith("mine.md: the data card has ")
    assert f"\n  - {said}" in str(caught.value)


def test_lists_all_problems_at_once() -> None:
    with pytest.raises(DataError, match="has 3 problems:") as caught:
        DataCard.parse(changed(license=None, tags=5, pretty_name=None))
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize("old, new, said", [
    ("## Demographics", "## People", "section '## Demographics': expected in the text, but missing"),
    ("## Use\n", "## Demographics\n", "section '## Demographics': expected once, found 2 times"),
    ("# The generated patients", "The generated patients", "text: expected a title ('# ...')"),
    ("None. The 152 volunteers of the template were healthy adults [2].", "",
     "section '## Demographics': expected text below it, got nothing"),
])
def test_errors_state_what_the_text_lacks(old: str, new: str, said: str) -> None:
    text = GENERATED.read_text("utf-8")
    assert old in text
    with pytest.raises(DataError, match=re.escape(said)):
        DataCard.parse(text.replace(old, new, 1))


def test_a_heading_in_a_code_block_is_not_a_section() -> None:
    assert split_sections("# T\n\n~~~\n## no\n~~~\n\n## yes\nx") == [("", "# T\n\n~~~\n## no\n~~~"), ("yes", "x")]


def test_overwrites_nothing(tmp_path: Path) -> None:
    card = read_card(GENERATED)
    for save in (card.save, card.save_croissant):
        mine = tmp_path / save.__name__
        mine.write_text("mine")
        with pytest.raises(DataError, match="exists already and is not overwritten"):
            save(mine)
        assert mine.read_text() == "mine"


# Hostile files


def front(text: str) -> str:
    return f"---\n{text}\n---\n\n# T\n\nx\n"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join(f'*{before}' for _ in range(9))}]" for before, name in
    zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("text, said", [
    ("", "expected a front matter"),
    ("# no front matter", "expected a front matter"),
    ("---\npretty_name: x\n", "expected a front matter"),
    (front(BOMB), "anchors and aliases"),
    (front("a: &x 1"), "anchors and aliases"),
    (front("a: !!python/object/apply:os.system ['true']"), "tags (!) are not permitted"),
    (front("a: !!int ''"), "tags (!) are not permitted"),
    (front("a: !!timestamp x"), "tags (!) are not permitted"),
    (front("[" * 5000), "levels deep"),
    (front("a: " + "{b: " * 50 + "}" * 50), "levels deep"),
    (front("license: mit\nlicense: other"), "'license' occurs twice"),
    (front("? [a, b]\n: c"), "a field's name must be a text"),
    (front("a: 2021-13-45"), "cannot be read as YAML"),
    (front("a: " + "9" * 5000), "cannot be read as YAML"),
    (front("a: [unclosed"), "cannot be read as YAML"),
    (front("a: \x00"), "cannot be read as YAML"),
    (front("just text"), "expected fields with values in the front matter"),
    (front("- a\n- b"), "expected fields with values in the front matter"),
    (front("a: 1\n--- \nb: 2"), "unknown field"),
    (front("x: " + "y" * 70_000), "at most 64000 characters"),
    (front("\n".join(f"f{n}: {n}" for n in range(900))), "900 of its fields are unknown"),
    ("---\n" * 100_000, "at most"),
])
def test_hostile_text_is_refused_clearly(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError) as caught:
        read_card(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 20_000


def test_a_small_file_stays_small_in_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="anchors and aliases"):
            DataCard.parse(front(BOMB))
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_hostile_files_are_refused_clearly(tmp_path: Path) -> None:
    large, latin, folder, loop = (tmp_path / name for name in ("large.md", "latin.md", "folder.md", "loop.md"))
    with large.open("wb") as file:
        file.truncate(5 * 2**30)  # sparse: 5 GB without content
    latin.write_bytes(b"---\npretty_name: M\xfcnchen\n---\n")
    folder.mkdir()
    loop.symlink_to(loop)
    for path, said in ((large, "the file is larger"), (latin, "expected text in UTF-8, got the byte 0xfc"),
                       (folder, "cannot be read"), (loop, "cannot be read"), (tmp_path / "none.md", "cannot be read")):
        with pytest.raises(DataError, match=said):
            read_card(path)


def test_showing_a_card_executes_and_loads_nothing() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    card = DataCard.parse(changed(pretty_name=evil, tags=[evil]))
    added = (f"{evil}\n\n![p](https://tracker.example/p.png) [l](javascript:alert(3)) [d](data:text/html,x)\n\n"
             "| a |\n| --- |\n| <b onclick=x> |\n")
    shown = replace(card, body=card.body.replace("## Use\n", f"## Use\n\n{added}"))._repr_html_()
    assert "<script" not in shown and "<img" not in shown and "<b onclick" not in shown
    assert "tracker.example" not in shown and "javascript:" not in shown and "data:text" not in shown
    assert "&lt;script&gt;" in shown and "[picture: p]" in shown


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_card_gives_a_card_or_a_data_error(data: st.DataObject) -> None:
    raw = bytearray(GENERATED.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert"]))
        if kind == "byte":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at:at + data.draw(st.integers(1, 200))]
        else:
            raw[at:at] = data.draw(st.sampled_from([b"&a ", b"*a ", b"!!x ", b"---\n", b"\n", b": ", b"[", b"{", b"\t",
                                                    b"\xff", b"# ", b"| ", b'"', b"\xe2\x80\xa8", b"\xc2\x85"]))
    try:
        card = DataCard.parse(raw.decode("utf-8", errors="surrogateescape"))
        assert "<script" not in card._repr_html_()
        assert DataCard.parse(card.to_markdown()) == card
    except DataError as error:
        assert str(error)


# Filling


def test_fills_a_card_from_the_sites_statistics() -> None:
    statistics = site_statistics(site(14, held=6), minimum=5)
    card = fill_card(card_template(), statistics)
    said = card.section("Patients")
    assert card.name == "Glioma MRI of st-elsewhere" and card.body.startswith("# Glioma MRI of st-elsewhere\n")
    assert "Patients: all 20, to train on 14, held out 6." in said
    assert "Voxel size \\[mm\\]" in said or "Voxel size [mm]: 1.5x3x6: 20 patients." in said
    assert "| volume WT \\[ml\\] | 20 |" in said
    assert "no formal guarantee" in said and "fewer than 5 patients" in said
    assert card.metadata["size_categories"] == ["n<1K"]
    told = {row["quantity"]: row for row in card.metadata["statistics"]}
    median = dict(statistics.volumes_ml["WT"].quantiles)[0.5]
    assert float(told["volume WT [ml]"]["median"]) == pytest.approx(median, rel=0.01)


def test_what_only_people_know_stays_marked() -> None:
    card = fill_card(card_template(), site_statistics(site(8)))
    assert set(card_template().open) - set(card.open) == {"pretty_name", "## Patients"}
    assert "Still to be completed by the hospital" in card._repr_html_()
    with pytest.raises(DataError, match=r"still to be completed: license, .*## Use"):
        card.to_croissant()


def test_suppressed_counts_stay_suppressed() -> None:
    statistics = site_statistics(site(3), minimum=5)
    assert statistics.patients is None
    card = fill_card(card_template(), statistics)
    assert card.metadata["splits"][0]["patients"] == "withheld"
    assert card.metadata["size_categories"] == ["other"]
    told = json.dumps([card.metadata["splits"], card.metadata.get("statistics", [])]) + card.section("Patients")
    assert not re.search(r"\b3\b(?!x3)", told), "the number of patients shows somewhere"
    assert "withheld" in card.section("Patients")


def test_a_small_held_out_part_stays_suppressed() -> None:
    statistics = site_statistics(site(9, held=2), minimum=5)
    card = fill_card(card_template(), statistics)
    assert card.section("Patients").startswith(
        f"Patients: all 11, to train on {'withheld' if statistics.train is None else '9'}, held out withheld.")


def test_noised_numbers_state_their_cost() -> None:
    card = fill_card(card_template(), site_statistics(site(12), epsilon=2.0, seed=0))
    said = card.section("Patients")
    assert "Laplace noise" in said and "no formal guarantee" not in said
    for part in ("ε = 2", "δ = ", "per patient", "add or remove one patient", "Laplace accountant"):
        assert part in said


def test_a_hostile_site_name_stays_text() -> None:
    statistics = SiteStatistics(site="x\n## Use\n\n<b>|`*", patients=7, withheld=("a\n# b",), minimum=5,
                                spacing_mm={"1x1x1 | <i>": 7})
    card = fill_card(card_template(), statistics)
    assert [heading for heading, _ in split_sections(card.body)] == ["", *SECTIONS]
    shown = card._repr_html_()
    assert "<b>" not in shown and "<i>" not in shown and "&lt;b&gt;" in shown
    with pytest.raises(DataError, match="pretty_name: expected printable characters"):
        fill_card(card_template(), SiteStatistics(site="a\x1b[2J", patients=7))


# Croissant


@pytest.fixture(scope="module")
def validate() -> Callable[[dict[str, Any]], Any]:
    """The validating reader of MLCommons; part of the extra 'test'."""
    croissant = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed: pip install -e '.[test]'")
    return lambda told: croissant.Dataset(told)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_croissant_of_every_card_validates(path: Path, tmp_path: Path, validate: Callable[..., Any]) -> None:
    card = read_card(path)
    file = card.save_croissant(tmp_path / "croissant.json", draft=bool(card.open))
    data = validate(json.loads(file.read_text("utf-8")))
    assert not data.metadata.ctx.issues.errors
    warnings = [line for line in data.metadata.ctx.issues.warnings if "version" not in line]
    assert not warnings or card.open, warnings
    if not card.open:
        assert data.metadata.name == card.name
        assert data.metadata.data_collection == card.metadata["rai:dataCollection"]
        assert data.metadata.data_annotation_protocol == card.metadata["rai:dataAnnotationProtocol"]
        assert data.metadata.personal_sensitive_information == card.metadata["rai:personalSensitiveInformation"]
        assert data.metadata.data_limitations == card.metadata["rai:dataLimitations"]
        assert {s.includes[0] for s in data.metadata.distribution} == {r["pattern"] for r in card.metadata["files"]}


def test_croissant_knows_every_rai_field_of_the_schema(validate: Callable[..., Any]) -> None:
    """Croissant ignores a misspelt property silently."""
    from mlcroissant._src.core import constants

    known = {str(value).rsplit("/", 1)[1] for name, value in vars(constants).items()
             if name.startswith("ML_COMMONS_RAI_") and not callable(value)}
    ours = {field.name.removeprefix("rai:") for field in FIELDS if field.name.startswith("rai:")}
    assert len(ours) >= 10 and ours <= known


def test_labels_of_croissant_can_be_read_as_records(validate: Callable[..., Any]) -> None:
    told = read_card(CARDS / "msd-task01.md").to_croissant()
    records = list(validate(told).records("labels"))
    assert [(r["labels/value"], r["labels/meaning"]) for r in records][1:] == [
        (1, "oedema"), (2, "non-enhancing tumour"), (3, "enhancing tumour")]


def test_a_broken_croissant_does_not_validate(validate: Callable[..., Any]) -> None:
    """The check above can fail."""
    told = read_card(GENERATED).to_croissant()
    del told["recordSet"][0]["data"][0]["splits/name"]
    with pytest.raises(Exception, match="expected columns"):
        validate(told)


def test_a_draft_leaves_out_open_parts_and_lists_them(validate: Callable[..., Any]) -> None:
    card = fill_card(card_template(), site_statistics(site(8)))
    told = card.to_croissant(draft=True)
    assert MARK not in json.dumps(told)
    assert "DRAFT, left out because still to be completed: license" in told["description"]
    assert "license" not in told and "rai:dataBiases" not in told
    records = {r["statistics/quantity"]: r for r in validate(told).records("statistics")}
    assert records["volume WT [ml]"]["statistics/patients"] == "8"


def test_a_completed_card_of_a_hospital_becomes_croissant(validate: Callable[..., Any]) -> None:
    finished = complete(fill_card(card_template(), site_statistics(site(8))))
    assert finished.open == ()
    told = finished.to_croissant()
    assert told["license"] == "https://spdx.org/licenses/CC-BY-4.0" and "DRAFT" not in told["description"]
    assert not validate(told).metadata.ctx.issues.errors


def complete(card: DataCard) -> DataCard:
    """The card as a hospital would complete it."""
    answers = {"text": "said", "texts": ["said"], "date": "2026-03", "url": "https://hospital.example/glioma"}
    kinds = {field.name: field for field in FIELDS}
    told = {name: answers[kinds[name].kind] for name in card.open if name in kinds and kinds[name].kind != "table"}
    told |= {"license": "cc-by-4.0", "annotations_creators": ["expert-generated"],
             "splits": [{**row, "labelled": "all"} for row in card.metadata["splits"]]}
    body = re.sub(rf"{MARK}[^\n]*(\n[^\n#]+)*", "Said.", card.body)
    return replace(card, metadata={**card.metadata, **told}, body=body)


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients in the layout of BraTS 2021."""
    where = tmp_path_factory.mktemp("scans") / "ward 7"
    for number in range(6):
        name = f"BraTS2021_{number:05d}"
        (where / name).mkdir(parents=True)
        patient = blob_patient(name, seed=number, shape=(32, 32, 32))
        assert patient.label is not None
        inside = torch.zeros(32, 32, 32)
        inside[2:30, 2:30, 2:30] = 1
        for modality, image in zip(("flair", "t1", "t1ce", "t2"), patient.image, strict=True):
            scan = ((image * 100 + 700) * inside).round().clamp(0, 2000).to(torch.int16).numpy()
            nibabel.save(nibabel.Nifti1Image(scan, patient.affine), where / name / f"{name}_{modality}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(patient.label.numpy(), patient.affine), where / name / f"{name}_seg.nii.gz")
    return where


def test_command_line_writes_a_card_and_its_croissant(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], validate: Callable[..., Any],
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["data", "card", str(folder), "--site", "ward-7", "--out", str(tmp_path / "new")]) == 0
    card = read_card(tmp_path / "new" / "card.md")
    assert card.name == "Glioma MRI of ward-7" and "Patients: all 6." in card.section("Patients")
    validate(json.loads((tmp_path / "new" / "croissant.json").read_text("utf-8")))
    said = capsys.readouterr().out
    assert "Still to be completed by people at the hospital:\n  - license\n" in said and "  - ## Use\n" in said
    assert sorted(folder.rglob("*")) == before
    assert main(["data", "card", str(folder), "--out", str(tmp_path / "new")]) == 1
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_command_line_turns_a_finished_card_into_croissant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], validate: Callable[..., Any],
) -> None:
    card = fill_card(card_template(), site_statistics(site(8)))
    card.save(tmp_path / "open.md")
    assert main(["data", "card", str(tmp_path / "open.md"), "--out", str(tmp_path / "a")]) == 1
    assert "still to be completed: license" in capsys.readouterr().err and not (tmp_path / "a").exists()
    complete(card).save(tmp_path / "done.md")
    assert main(["data", "card", str(tmp_path / "done.md"), "--out", str(tmp_path / "b")]) == 0
    validate(json.loads((tmp_path / "b" / "croissant.json").read_text("utf-8")))


def test_a_card_from_the_real_scans(real_scans: Path) -> None:
    from fedlab.data.readers.folders import read_cohort

    with pytest.warns(UserWarning, match="marks no enhancing tumour"):
        cohort = read_cohort(real_scans / "brats2021_2mm", progress=False)
    card = fill_card(card_template(), site_statistics(Site(name="real", train=cohort), minimum=5))
    assert "Patients: all 5." in card.section("Patients")
    assert "2x2x2: 5 patients" in card.section("Patients")
