"""Challenges of BraTS number their labels differently: known by ids and values, or refused with right remedies only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedlab.core.errors import DataError
from fedlab.data.readers.conventions import (
    CONVENTIONS,
    convention_of_layout,
    count_values,
    describe,
    detect_convention,
    from_internal,
    to_internal,
)
from fedlab.data.readers.examination import Examination, check_labels, examine
from fedlab.data.readers.folders import find_patients, read_cohort, read_sites
from fedlab.data.readers.inspection import inspect_folder
from fedlab.data.readers.layouts import list_patients
from fedlab.data.readers.patient_files import PatientFiles
from folders import NEW, ball, save, save_files, write_layout, write_nnunet, write_table


def detect(values, layout="brats2023", **options):
    """The convention of patients given as id -> values in the label map."""
    return detect_convention({name: {0.0, *map(float, own)} for name, own in values.items()}, layout=layout, **options)


def ids(challenge, *values, visit="000"):
    return {f"BraTS-{challenge}-{i:05d}-{visit}": own for i, own in enumerate(values)}


def offered(error):
    """The conventions that a message offers as a remedy."""
    text = str(error).rsplit("pass label_convention=", 1)
    return [] if len(text) == 1 else [name for name in CONVENTIONS if repr(name) in text[1].split("(--label")[0]]


@pytest.mark.parametrize(("values", "expected"), [
    (ids("GLI", (1, 2, 3), (1, 2)), "brats2023"), (ids("GLI", (1, 2)), "brats2023"),
    (ids("GLI", (1, 2, 3, 4), (1, 2), (2, 4)), "brats2024"),
    (ids("GLI", (1, 2, 3), (1, 2), visit="101"), "brats2024"), (ids("GLI", (1, 2, 4), visit="100"), "brats2024"),
    (ids("GLI", *[(1, 2, 3)] * 3, (1, 2, 4)), "brats2023"),
    (ids("MET", (1, 2, 3)), "brats2023"), (ids("MET", (1, 2, 3, 4), (2, 3)), "brats2024"),
    (ids("MEN", (1, 2, 3), (3,)), "brats2023"), (ids("SSA", (1, 2, 3)), "brats2023"),
    (ids("GoAT", (1, 2, 3)), "brats2023"), (ids("PED", (1, 2, 3, 4), (1, 2), (1, 2, 3)), "brats2024ped"),
    (ids("PED", (2, 4), (1,)), "brats2024ped"), (ids("PED", ()), "brats2024ped"),
])
@pytest.mark.parametrize("layout", ["brats2023", "brats2021", "table"])
def test_challenges_are_recognised_by_ids_and_values(values, expected, layout):
    found = detect(values, layout)
    assert found.name == expected and "ids of BraTS-" in found.reason
    assert all(found.of(patient) == expected for patient in values)


@pytest.mark.parametrize(("values", "remedies"), [
    (ids("PED", (1, 2), (1, 2, 3)), ["brats2023", "brats2024ped"]), (ids("PED", (2,)), ["brats2023", "brats2024ped"]),
    (ids("GLI", (1, 2, 4)), ["brats2021", "brats2024"]), (ids("MET", (1, 2, 4), (2, 4)), ["brats2021", "brats2024"]),
    (ids("MEN", (1, 2, 4)), ["brats2021"]), (ids("SSA", (1, 2, 4), (1, 2)), ["brats2021"]),
    (ids("MEN-RT", (1,), visit="1"), []), (ids("MEN", (1,), (1,)), ["brats2023"]),
    (ids("GLI", (1,)), ["brats2023", "brats2024"]), (ids("PED", (1,)), ["brats2023", "brats2024ped"]),
])
def test_what_ids_and_values_leave_open_is_refused_with_right_remedies_only(values, remedies):
    with pytest.raises(DataError) as caught:
        detect(values)
    assert caught.value.code == "label-convention" and offered(caught.value) == remedies


@pytest.mark.parametrize(("layout", "remedies"), [("brats2021", ["brats2021"]), ("brats2020", ["brats2021"]),
                                                  ("brats2023", ["brats2023"]), ("table", [*CONVENTIONS])])
def test_masks_of_one_region_are_refused(layout, remedies):
    with pytest.raises(DataError, match=r"no label map holds another value than 0 and 1\. .* one region") as caught:
        detect({"P1": (1,), "P2": (1,), "P3": ()}, layout)
    assert offered(caught.value) == remedies
    assert detect({"P1": (1,)}, layout, stated="brats2021").name == "brats2021"
    assert detect({"P1": (1,), "P2": (1, 2, 4)}, "brats2021").name == "brats2021"


def write_children(folder, tables):
    """BraTS-PED patients whose labels core, oedema, enhancing are recoded by each table."""
    raws = [ball(f"BraTS-PED-{i + 1:05d}-000", seed=i) for i in range(len(tables))]
    for raw, table in zip(raws, tables, strict=True):
        stored = np.zeros_like(raw.label)
        for inside, outside in table.items():
            stored[raw.label == inside] = outside
        save_files(raw, folder / raw.id, names=NEW, mark="-", convention="brats2023")
        save(stored, raw.affine, folder / raw.id / f"{raw.id}-seg.nii.gz")
    return raws


def test_children_with_one_oedema_among_them_are_read_and_without_any_are_asked_about(tmp_path):
    without, cyst, all_parts = {4: 1, 1: 2, 2: 0}, {4: 1, 1: 2, 2: 3}, {1: 2, 2: 4, 4: 1}
    write_children(tmp_path / "none", [without, cyst])
    with pytest.raises(DataError) as caught:
        read_cohort(tmp_path / "none", progress=False)
    assert offered(caught.value) == ["brats2023", "brats2024ped"]
    shown = inspect_folder(tmp_path / "none", progress=False)
    assert all(case.volumes_ml["ET"] is None for case in shown.cases)

    raws = write_children(tmp_path / "some", [cyst, all_parts])
    cohort = read_cohort(tmp_path / "some", progress=False)
    assert cohort.convention.name == "brats2024ped"
    for case, raw in zip(inspect_folder(tmp_path / "some", progress=False).cases, raws, strict=True):
        assert case.volumes_ml["ET"] == pytest.approx((raw.label == 4).sum() / 1000)
        assert case.findings == ()
    assert [int((cohort[1].label == value).sum()) for value in (1, 2, 4)] == \
        [int((raws[1].label == value).sum()) for value in (1, 2, 4)]
    assert int((cohort[0].label == 1).sum()) == int(np.isin(raws[0].label, (1, 2)).sum())  # with the cyst


def test_a_folder_of_several_challenges_is_read_patient_by_patient(tmp_path):
    adult = ball("BraTS-GLI-00001-000")
    save_files(adult, tmp_path / adult.id, names=NEW, mark="-", convention="brats2023")
    child, = write_children(tmp_path, [{1: 2, 2: 4, 4: 1}])
    cohort = read_cohort(tmp_path, progress=False)
    assert cohort.convention.name is None and "label convention brats2023 and brats2024ped" in str(cohort.convention)
    assert {name: files.label_convention for name, files in find_patients(tmp_path).items()} == \
        {adult.id: "brats2023", child.id: "brats2024ped"}
    assert torch.equal(cohort[0].label, cohort[1].label)
    assert [case.label_convention for case in inspect_folder(tmp_path, progress=False).cases] == \
        ["brats2023", "brats2024ped"]
    write_table(tmp_path / "sites.csv", ["Partition_ID", "Subject_ID"], [["1", adult.id], ["1", child.id]])
    site, = read_sites(tmp_path, tmp_path / "sites.csv", spacing_mm=1.0, progress=False)
    assert all((patient.label == 4).any() for patient in (*site.train, *site.val))

    write_children(tmp_path / "other", [{4: 1, 1: 2, 2: 3}])
    save_files(adult, tmp_path / "other" / adult.id, names=NEW, mark="-", convention="brats2023")
    with pytest.raises(DataError, match=r"BraTS-PED: .*move these patients \(1\) to a folder of their own"):
        read_cohort(tmp_path / "other", progress=False)


def test_a_wrong_value_in_one_patient_names_the_conventions_of_its_challenge(tmp_path):
    raws = [ball(f"BraTS-MEN-{i:05d}-000", seed=i) for i in range(3)]
    write_layout(tmp_path, "brats2023", raws)
    save(raws[0].label, raws[0].affine, tmp_path / raws[0].id / f"{raws[0].id}-seg.nii.gz")
    with pytest.raises(DataError, match=r"holds the values 4; .*\[label-values\]") as caught:
        find_patients(tmp_path)
    assert offered(caught.value) == ["brats2021"]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_predictions_can_be_written_in_every_convention(name):
    label = np.array([0, 1, 2, 4], dtype=np.uint8)
    stored = from_internal(label, name)
    assert stored.dtype == np.uint8 and stored[0] == 0
    np.testing.assert_array_equal(to_internal(stored, name), label)
    assert all(f"{value} " in describe(name) for value in stored[1:])


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_labels_that_are_off_by_rounding_are_the_same_labels(name, kind):
    """A scale in the header, or arithmetic before, leaves 4.0004 or 3.9996 in place of 4."""
    stored = np.array([*CONVENTIONS[name]], dtype=np.uint8)
    for off in (1.0001, 0.9999):
        floats = stored.astype(kind) * kind(off)
        np.testing.assert_array_equal(to_internal(floats, name), to_internal(stored, name))
        assert count_values(floats) == count_values(stored)
    far = np.array([1.4], dtype=kind)
    assert to_internal(far, name).tolist() == [0] and 1.4 == pytest.approx(*count_values(far))


def test_rounding_in_the_background_of_a_label_map_is_no_label(tmp_path):
    raw = ball("P1")
    save_files(raw, tmp_path / "P1")
    path = tmp_path / "P1" / "P1_seg.nii.gz"
    path.unlink()
    save(raw.label.astype(np.float32) + np.float32(2e-4), raw.affine, path)
    exam = examine(list_patients(tmp_path).files["P1"], labels="brats2021")
    assert not exam.findings and np.array_equal(exam.label, raw.label)
    assert exam.label_counts == {float(value): int((raw.label == value).sum()) for value in (0, 1, 2, 4)}


def test_only_the_values_of_the_contradicting_label_maps_are_shown():
    with pytest.raises(DataError, match=r"1 of the 2 .* \(b\) hold other values: 0, 1, 2, 3\. "):
        detect_convention({"a": {0, 1, 2, 4}, "b": {0, 1, 2, 3}}, layout="brats2021")


def test_of_two_values_of_one_meaning_the_smaller_is_written():
    assert from_internal(np.array([0, 1, 2, 4], dtype=np.uint8), "brats2024ped").tolist() == [0, 2, 4, 1]


def test_a_convention_is_described_in_words():
    assert describe("brats2024ped") == "1 enhancing, 2 core, 3 core, 4 oedema"
    assert describe("brats2024", [0, 4]) == "0 no tumour, 4 no tumour"


@pytest.mark.parametrize(("labels", "expected"), [
    ({0: "background", 1: "ET", 2: "NET", 3: "CC", 4: "ED"}, "brats2024ped"),
    ({0: "background", 1: "NETC", 2: "SNFH", 3: "ET", 4: "RC"}, "brats2024"),
    ({0: "background", 1: "enhancing tumor", 2: "non-enhancing tumor", 3: "cyst", 4: "edema"}, "brats2024ped"),
])
def test_abbreviations_of_the_challenges_describe_labels(labels, expected):
    assert detect({"P1": (1, 2)}, "msd", described=labels).name == expected


def test_overlapping_regions_of_nnunet_describe_labels(tmp_path):
    raws = [ball("case_1"), ball("case_2", seed=1)]
    for convention in ("msd", "brats2023", "brats2021"):
        write_nnunet(tmp_path / convention, raws, convention=convention, regions=True)
        cohort = read_cohort(tmp_path / convention, progress=False)
        assert (cohort.layout, cohort.convention.name) == ("nnunet", convention)
        assert [int((cohort[0].label == v).sum()) for v in (1, 2, 4)] == [int((raws[0].label == v).sum())
                                                                          for v in (1, 2, 4)]


@pytest.mark.parametrize(("counts", "codes"), [
    ({0.0: 90, 1.0: 4, 3.0: 5, 4.0: 7}, ["cavity"]), ({0.0: 90, 3.0: 5}, []),
    ({0.0: 90, 4.0: 7}, ["no-enhancing", "cavity"]), ({0.0: 90, 2.0: 3}, ["no-enhancing"]), ({0.0: 90}, ["no-tumour"])])
def test_what_a_label_map_of_2024_holds_is_told_by_its_values(counts, codes):
    """In BraTS 2024 the value 3 is enhancing tumour, and 4 a cavity, which is no tumour."""
    files = PatientFiles(id="A", images={}, label=Path("a_seg.nii"), layout="table", columns={})
    exam = Examination(files=files, label_counts=counts)
    check_labels(exam, "brats2024")
    assert [finding.code for finding in exam.findings] == codes
    assert all("7 voxels of resection cavity" in f.message for f in exam.findings if f.code == "cavity")


@pytest.mark.parametrize(("layout", "convention"), [
    ("msd", "msd"), ("nnunet", "msd"), ("brats2018", "brats2021"), ("brats2021", "brats2021"), ("fets", "brats2021"),
    ("brats2023", "brats2023"), ("table", "brats2021")])
def test_labels_are_written_as_the_layout_was_published(layout, convention):
    assert convention_of_layout(layout) == convention


def test_without_a_published_layout_values_decide_where_they_have_one_reading():
    """4 without 3 is no cavity: 1, 2, 4 are those of BraTS 2021, of 2013 in the same meaning; none has a 5."""
    for values in ((1, 2, 4), (1, 4), (4,)):
        found = detect({"a": values, "b": (1, 2, 5)}, layout="table")
        assert str(found) == (f"label convention brats2021 (the values are {', '.join(map(str, values))}, which permit "
                              "one reading only)")


@pytest.mark.parametrize(("values", "names"), [
    ((1, 2, 3), ["brats2023", "brats2024", "msd", "brats2013", "brats2024ped"]),
    ((1, 2, 3, 4), ["brats2024", "brats2013", "brats2024ped"]), ((5,), list(CONVENTIONS))])
def test_without_a_published_layout_values_of_several_readings_are_refused(values, names):
    with pytest.raises(DataError) as caught:
        detect({"a": values}, layout="table")
    assert set(offered(caught.value)) == set(names)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_voxels_are_counted_by_value_up_to_64_values(kind):
    """-3 once, -2 twice and so on, in no order; of 70 values the smallest 64."""
    def stored(values):
        array = np.repeat(np.arange(values) - 3, np.arange(values) + 1).astype(kind)
        return np.random.default_rng(0).permutation(array).reshape(-1, 1, 1)

    for values in (1, 10, 64):
        assert count_values(stored(values)) == {value - 3.0: value + 1 for value in range(values)}
    assert count_values(stored(70)) == {value - 3.0: value + 1 for value in range(64)}
    assert count_values(np.array([0.5, 70000.25, 0.5])) == {0.5: 2, 70000.25: 1}
