"""Every layout and label convention gives the same patients; an ambiguous one is an error that states what to do."""

from __future__ import annotations

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from fedlab.apps.cli import main
from fedlab.apps.comparison_data import Folder
from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions
from fedlab.data.phantom.generator import write_brats
from fedlab.data.readers.conventions import CONVENTIONS, count_values, detect_convention, from_internal, to_internal
from fedlab.data.readers.folders import find_patients, read_cohort, read_label, read_patient, read_sites, to_native
from fedlab.data.readers.inspection import inspect_folder
from fedlab.data.readers.layouts import LAYOUTS, list_patients
from fedlab.data.readers.nifti import from_ras
from fedlab.training.networks import save_model, segresnet
from folders import (
    LPS,
    OLD,
    ball,
    load_raw,
    recode,
    save,
    save_files,
    write_layout,
    write_msd,
    write_nnunet,
    write_paths,
    write_table,
)

IDS = {"brats2018": "Brats18_2013_{}_1", "brats2019": "BraTS19_CBICA_{}_1", "brats2020": "BraTS20_Training_00{}",
       "brats2021": "BraTS2021_0000{}", "brats2023": "BraTS-GLI-0000{}-000", "fets": "FeTS2022_0000{}",
       "msd": "BRATS_00{}", "nnunet": "case_{}", "named": "UPENN-GBM-0000{}_11", "table": "Žofie {} é"}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Two generated patients as stored."""
    base = tmp_path_factory.mktemp("phantoms")
    write_brats(base / "scans", sites=1, patients=2, shape=(48, 64, 48), cache=tmp_path_factory.getbasetemp() / "cache",
                workers=0, progress=False)
    return [load_raw(base / "scans", home.name) for home in sorted((base / "scans").iterdir()) if home.is_dir()]


def named(raws, layout):
    return [raw._replace(id=IDS[layout].format(i)) for i, raw in enumerate(raws)]


def read(folder, **options):
    return read_cohort(folder, progress=False, **options)


# --- layouts

@pytest.mark.parametrize("layout", LAYOUTS)
def test_generated_patients_are_the_same_in_every_layout(tmp_path, phantoms, layout, capsys):
    want = read(write_layout(tmp_path / "plain", "brats2021", named(phantoms, "brats2021")))
    folder = write_layout(tmp_path / "data", layout, named(phantoms, layout))
    cohort = read_cohort(folder)
    assert (cohort.layout, cohort.ids) == (layout, tuple(IDS[layout].format(i) for i in range(2)))
    assert cohort.convention.name == {"brats2023": "brats2023", "msd": "msd", "nnunet": "msd"}.get(layout, "brats2021")
    said = capsys.readouterr().err
    assert f"layout {layout} ({cohort.reason})" in said and f"label convention {cohort.convention.name} (" in said
    assert layout in repr(cohort) and cohort.reason in repr(cohort)
    for got, reference in zip(cohort, want, strict=True):
        assert torch.equal(got.image, reference.image) and torch.equal(got.label, reference.label)
        np.testing.assert_array_equal(got.affine, reference.affine)
        assert {1, 2, 4} >= set(got.label.unique().tolist()) - {0} != set()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sites_and_predictions_work_in_every_layout(tmp_path, layout):
    raws = named([ball(seed=i) for i in range(3)], layout)
    folder = write_layout(tmp_path / "data", layout, raws)
    write_table(tmp_path / "sites.csv", ["Partition_ID", "Subject_ID"],
                [[1 + i % 2, raw.id] for i, raw in enumerate(raws)])
    source = Folder(data=str(folder), table=str(tmp_path / "sites.csv"), spacing_mm=2.0)
    sites = source.prepare(seed=0, workers=None)
    assert [(s.name, len(s.train) + len(s.val)) for s in sites] == [("1", 2), ("2", 1)]
    model = save_model(tmp_path / "m.safetensors", segresnet(filters=8, seed=0), spacing_mm=2.0)
    assert main(["evaluate", str(model), "--data", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["labelled"] == 3
    for raw in raws:
        written = nib.load(tmp_path / "out" / f"{raw.id}_pred.nii.gz")
        assert written.shape == raw.label.shape
        np.testing.assert_array_equal(written.affine, raw.affine)
    files = find_patients(folder)[raws[0].id]
    exact = read_patient(files)
    assert np.array_equal(to_native(exact.label, patient=exact, files=files), raws[0].label)


def test_tables_give_grade_partition_and_any_other_column(tmp_path):
    raws = [ball(f"P{i}") for i in range(3)]
    for layout in ("brats2018", "brats2019", "brats2020"):
        table = read(write_layout(tmp_path / layout, layout, raws), examine=False).table()
        assert table["grade"].tolist() == ["HGG", "LGG", "HGG"], layout
    table = read(write_layout(tmp_path / "fets", "fets", raws), examine=False).table()
    assert table["partitioning_1"].tolist() == ["1", "2", "1"] and table["partitioning_2"].tolist() == ["1", "2", "3"]
    table = read(write_layout(tmp_path / "table", "table", raws), examine=False).table()
    assert table["hospital"].tolist() == ["south", "north", "north"]


def test_the_year_follows_from_ids_and_tables(tmp_path):
    for name, layout, expected in [("Brats18_CBICA_AAB_1", "brats2018", "brats2018"),
                                   ("BraTS19_CBICA_AAB_1", "brats2018", "brats2019"),
                                   ("BraTS20_Training_001", "brats2021", "brats2020"),
                                   ("BraTS20_Training_001", "brats2018", "brats2020"),
                                   ("P1", "brats2021", "brats2021"), ("P1", "brats2019", "brats2019")]:
        folder = write_layout(tmp_path / name / layout, layout, [ball(name)])
        assert list_patients(folder).layout == expected


def test_the_order_of_modalities_comes_from_dataset_json(tmp_path):
    raw = ball("BRATS_001")
    write_msd(tmp_path / "a", [raw])
    write_msd(tmp_path / "b", [raw], order=("T2", "T1c", "FLAIR", "T1"))
    write_msd(tmp_path / "c", [raw])
    path = tmp_path / "c" / "dataset.json"
    told = json.loads(path.read_text())
    told["modality"] = {key: told["modality"][key] for key in ("2", "0", "3", "1")}  # by number, not by place
    path.write_text(json.dumps(told))
    first, *others = (read(tmp_path / name)[0] for name in "abc")
    for other in others:
        assert torch.equal(first.image, other.image) and torch.equal(first.label, other.label)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_files_of_the_decathlon_may_be_unpacked_or_packed(tmp_path, ending):
    write_msd(tmp_path, [ball("P1")])
    for part in ("imagesTr", "labelsTr"):
        path = tmp_path / part / "P1.nii.gz"
        volume = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(volume.dataobj), volume.affine), tmp_path / part / f"new{ending}")
        path.unlink()
        (tmp_path / part / f"new{ending}").rename(tmp_path / part / f"P1{ending}")
    named = (tmp_path / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(named.replace(".nii.gz", ".nii" if ending == ".nii.gz" else ".nii.gz"))
    found = list_patients(tmp_path)
    assert found.files["P1"].label == tmp_path / "labelsTr" / f"P1{ending}" and not found.findings
    assert int((read(tmp_path)[0].label > 0).sum()) == np.count_nonzero(ball("P1").label)


def test_decathlon_test_cases_have_no_label(tmp_path):
    write_msd(tmp_path, [ball("BRATS_001"), ball("BRATS_002")], test=("BRATS_002",))
    cohort = read(tmp_path)
    assert [p.label is None for p in cohort] == [False, True]


def test_label_maps_that_dataset_json_does_not_name_are_read_and_told(tmp_path):
    write_msd(tmp_path, [ball("P1"), ball("P2", seed=1), ball("P3", seed=2)], test=("P3",))
    path = tmp_path / "dataset.json"
    told = json.loads(path.read_text())
    told["training"] = ["./imagesTr/P1.nii.gz", {"image": "./imagesTr/P2.nii.gz"}]
    path.write_text(json.dumps(told))
    (tmp_path / "labelsTr" / "P2.nii.gz").rename(tmp_path / "labelsTr" / "P3.nii.gz")  # of another folder than its scan
    with pytest.warns(UserWarning, match=r"names no label for it; labelsTr/P1\.nii\.gz, .* is read \[not-in-table\]"):
        cohort = read(tmp_path)
    assert [patient.label is None for patient in cohort] == [False, True, True]
    assert [f.patient for f in cohort.findings] == ["P1"]
    np.testing.assert_array_equal(to_native(cohort[0].label, patient=cohort[0], files=cohort.files["P1"]),
                                  ball("P1").label)


def test_damaged_dataset_json(tmp_path):
    write_msd(tmp_path, [ball("BRATS_001")])
    path = tmp_path / "dataset.json"
    told = json.loads(path.read_text())

    def refused(reason, **changes):
        path.write_text(json.dumps({**told, **changes}))
        with pytest.raises(DataError, match=reason):
            find_patients(tmp_path)

    refused("no T1c among", modality={"0": "FLAIR", "1": "T1w", "2": "T2w"})
    refused("two volumes are named T1", modality={"0": "T1", "1": "T1w", "2": "T2w"})
    refused("expected 'modality' such as", modality=["FLAIR"])
    refused("holds 4 volumes; expected 5|no known|among the modalities|channels",
            modality={**told["modality"], "9": "t1gd"} | {"2": "DWI"})
    refused("expected a list under 'training'", training={"a": 1})
    refused("lists no patient", training=[])
    refused(r"\[outside\]", training=[{"image": "../../secret/BRATS_001.nii.gz"}])
    refused("another patient's id", training=[{"image": "imagesTr/BRATS_001.nii.gz", "label": "labelsTr/B.nii.gz"}])
    refused("lists it twice", training=told["training"] * 2)
    refused("which is missing", training=[*told["training"], {"image": "imagesTr/none.nii.gz"}])
    refused("is not recognised", labels={"0": "background", "1": "lesion"})
    for text in ("{", "[" * 100_000, "\xff", "3"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=r"dataset\.json"):
            find_patients(tmp_path)


def test_a_4_d_file_with_too_few_volumes(tmp_path):
    write_msd(tmp_path, [ball("BRATS_001")])
    image = nib.load(tmp_path / "imagesTr" / "BRATS_001.nii.gz")
    save(np.asanyarray(image.dataobj)[..., :3], image.affine, tmp_path / "imagesTr" / "BRATS_001.nii.gz")
    with pytest.raises(DataError, match=r"holds 3 volumes; expected 4: FLAIR, T1, T1c, T2 \[channels\]"):
        find_patients(tmp_path)


def test_a_folder_in_a_folder_and_folders_side_by_side(tmp_path):
    write_layout(tmp_path / "zip" / "inner", "brats2021", [ball()])
    assert "only subfolder inner" in list_patients(tmp_path / "zip").reason
    write_layout(tmp_path / "other", "brats2023", [ball()])
    with pytest.raises(DataError, match=r"give one of its subfolders that do: other, zip/inner"):
        list_patients(tmp_path)
    with pytest.raises(DataError, match="it is one patient's folder; give the folder above it"):
        list_patients(tmp_path / "other" / "P1")


def test_scans_that_lie_elsewhere_are_named_and_not_passed_over_in_silence(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("P1"), ball("P2", seed=1)])
    write_layout(tmp_path / "later", "brats2021", [ball("P3"), ball("P4")])
    save(ball().label, LPS, tmp_path / "atlas" / "mni" / "template.nii.gz")  # no name of any layout
    save(ball().label, LPS, tmp_path / "P5_t1.nii.gz")
    said = [(f.patient, f.code, f.severity) for f in list_patients(tmp_path).findings]
    assert said == [("P5", "elsewhere", "warning"), ("later", "elsewhere", "warning")]
    with pytest.warns(UserWarning, match=r"scans of 2 patients \(P3, P4\) lie in later and are not read"):
        assert read(tmp_path).ids == ("P1", "P2")
    found = inspect_folder(tmp_path, progress=False)
    assert found.summary()[-1] == "2 patients, 0 with errors, 0 with warnings only"
    assert len(found.findings) == 2 and "lie beside the patients' folders" in found.findings[0].message
    (tmp_path / "t.csv").write_text("Partition_ID,Subject_ID\n1,P1\n2,P2\n2,P5\n")
    with pytest.raises(DataError, match=r"P5: is in t\.csv but has no scans .*\[no-folder\]"):
        read_sites(tmp_path, tmp_path / "t.csv", progress=False)


@pytest.mark.parametrize(("place", "name"), [("predictions", "{}_pred"), ("masks_pred", "{}"),
                                             ("derivatives", "{}_seg"), ("LGG/predictions", "{}_pred")])
def test_a_folder_of_predictions_beside_patients_is_no_patient(tmp_path, place, name):
    write_layout(tmp_path, "brats2018" if "/" in place else "brats2021", [ball("P1"), ball("P2", seed=1)])
    for patient in ("P1", "P2"):
        save(ball().label, LPS, tmp_path / place / f"{name.format(patient)}.nii.gz")
    with pytest.warns(UserWarning, match=place):
        cohort = read(tmp_path)
    assert cohort.ids == ("P1", "P2") and [(f.patient, f.code) for f in cohort.findings] == [(place, "elsewhere")]
    assert inspect_folder(tmp_path, progress=False).summary()[-1] == "2 patients, 0 with errors, 0 with warnings only"


def test_a_folder_of_several_patients_scans_beside_patients_is_no_patient(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("P1"), ball("P2", seed=1)])
    write_layout(tmp_path / "x", "brats2021", [ball("P3"), ball("P4", seed=1)])
    flat(tmp_path / "x", tmp_path / "later")
    shutil.rmtree(tmp_path / "x")
    (finding,) = list_patients(tmp_path).findings
    assert (finding.patient, finding.code, finding.severity) == ("later", "elsewhere", "warning")
    assert "scans of 2 patients (P3, P4)" in finding.message


@pytest.mark.parametrize("name", ["P3", "alice"])
def test_a_folder_with_a_patients_name_stays_a_patient_without_any_scan(tmp_path, name):
    write_layout(tmp_path, "brats2021", [ball("P1"), ball("P2", seed=1)])
    save(ball().label, LPS, tmp_path / name / f"{name}_seg.nii.gz")
    with pytest.raises(DataError, match=rf"{name}: no FLAIR: {name}_flair\.nii\.gz \[missing-modality\]"):
        find_patients(tmp_path)


def test_one_person_under_two_ids_is_told(tmp_path):
    write_layout(tmp_path / "a", "brats2021", [ball("P1"), ball("P2", seed=1), ball("P3")])
    write_msd(tmp_path / "b", [ball("P1"), ball("P2", seed=1), ball("P3")])
    for kind in ("flair", "t1", "t1ce", "t2"):  # stored without compression, as copied from each other
        for name in ("P2", "P4"):
            save(ball(seed=5).images[{"t1ce": "T1c"}.get(kind, kind.upper())], LPS,
                 tmp_path / "c" / name / f"{name}_{kind}.nii")
    for part, ids in (("a", ["P3"]), ("b", ["P3"]), ("c", ["P4"])):
        with pytest.warns(UserWarning, match=r"its scans are the same files as those of P\d: one person .*\[copy\]"):
            cohort = read(tmp_path / part)
        assert [f.patient for f in cohort.findings if f.code == "copy"] == ids
        found = inspect_folder(tmp_path / part, progress=False)
        assert [f.patient for f in found.findings if f.code == "copy"] == ids and not found.broken


def test_scans_beside_a_folder_of_patients_are_read_and_that_folder_is_named(tmp_path):
    write_layout(tmp_path / "later", "brats2021", [ball("P3")])
    for path in (tmp_path / "later" / "P3").iterdir():
        shutil.copy(path, tmp_path / path.name.replace("P3", "P1"))
    assert list(list_patients(tmp_path).files) == ["P1"]
    assert [f.patient for f in list_patients(tmp_path).findings] == ["later"]


def test_a_folder_of_scans_and_one_of_their_labels_are_read_together(tmp_path):
    write_layout(tmp_path / "images", "brats2023", [ball("P1"), ball("P2")])
    (tmp_path / "labels").mkdir()
    for name in ("P1", "P2"):
        (tmp_path / "images" / name / f"{name}-seg.nii.gz").rename(tmp_path / "labels" / f"{name}-seg.nii.gz")
    listing = list_patients(tmp_path)
    assert listing.layout == "named" and not listing.findings
    assert {name: (len(own.images), own.label) for name, own in listing.files.items()} == {
        name: (4, tmp_path / "labels" / f"{name}-seg.nii.gz") for name in ("P1", "P2")}
    with pytest.raises(DataError, match=r"subfolders that do: images, labels; to read several together, write a table"):
        list_patients(tmp_path, layout="brats2023")


def test_of_two_folders_with_other_patients_in_each_the_user_chooses(tmp_path):
    for place, name in (("train", "P1"), ("validation", "P2")):
        write_layout(tmp_path / place, "brats2023", [ball(name)])
    with pytest.raises(DataError, match=r"subfolders that do: train, validation; to read several together"):
        list_patients(tmp_path)


def test_splits_of_several_sites_are_not_mixed(tmp_path):
    for place in ("train/bonn/P1", "train/mainz/P2", "validation/bonn/P3", "validation/mainz/P4"):
        save_files(ball(place[-2:]), tmp_path / place)
    with pytest.raises(DataError, match=r"lie deeper .* or state layout='named'"):
        list_patients(tmp_path)
    assert list(list_patients(tmp_path / "train", layout="named").files) == ["P1", "P2"]


def test_of_two_folders_with_the_same_scans_none_is_chosen(tmp_path):
    for place in ("raw", "registered"):
        write_layout(tmp_path / place, "brats2023", [ball("P1"), ball("P2")])
    with pytest.raises(DataError, match=r"subfolders that do: raw, registered; to read several together"):
        list_patients(tmp_path)


@pytest.mark.parametrize("deeper", ["{}/nifti", "sub-{}/ses-01/anat", "hospital/{}/nifti"])
def test_scans_deeper_than_in_the_layouts_of_brats_are_read_by_their_names(tmp_path, deeper):
    for name in ("P1", "P2"):
        save_files(ball(name), tmp_path / "x" / name)
        (tmp_path / deeper.format(name)).parent.mkdir(parents=True)
        (tmp_path / "x" / name).rename(tmp_path / deeper.format(name))
    (tmp_path / "x").rmdir()
    listing = list_patients(tmp_path)
    assert listing.layout == "named" and not listing.findings
    assert {name: (len(own.images), own.label) for name, own in listing.files.items()} == {
        name: (4, tmp_path / deeper.format(name) / f"{name}_seg.nii.gz") for name in ("P1", "P2")}
    with pytest.raises(DataError, match=r"lie deeper .*P1_flair\.nii\.gz; move those of each .* table of paths"):
        list_patients(tmp_path, layout="brats2021")


def test_dicom_is_recognised(tmp_path):
    (tmp_path / "P1" / "series 1").mkdir(parents=True)
    (tmp_path / "P1" / "series 1" / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(50))
    with pytest.raises(DataError, match=r"holds DICOM files such as P1/series 1/IM0001; convert them to NIfTI"):
        list_patients(tmp_path)


@pytest.mark.parametrize(("ending", "said"), [(".mha", "MetaImage"), (".nrrd", "NRRD"), (".mgz", "FreeSurfer"),
                                              (".img.gz", "Analyze or two-file NIfTI")])
def test_other_formats_are_recognised(tmp_path, ending, said):
    save_files(ball("P1"), tmp_path / "P1")
    for path in (tmp_path / "P1").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ending)))
    with pytest.raises(DataError, match=rf"holds {said} files such as P1/P1_flair\{ending}; convert them to NIfTI, "):
        list_patients(tmp_path)


def test_accents_in_another_unicode_form_are_the_same_name(tmp_path):
    composed, apart = "Zo\u00eb 1", "Zoe\u0308 1"  # as other systems and as macOS write it
    write_layout(tmp_path, "brats2021", [ball(composed)])
    for path in (tmp_path / composed).iterdir():
        path.rename(path.with_name(path.name.replace(composed, apart)))
    found = list_patients(tmp_path)
    assert list(found.files) == [composed] and not found.findings and len(found.files[composed].images) == 4


def test_files_in_folders_of_their_own_names_as_some_programs_unpack_them(tmp_path):
    save_files(ball("P1"), tmp_path / "P1")
    for path in list((tmp_path / "P1").iterdir()):
        folder = path.with_suffix("")
        folder.mkdir()
        path.rename(folder / path.name)
    assert read(tmp_path)[0].label.any() and list_patients(tmp_path).findings == ()
    (tmp_path / "P1" / "P1_t1.nii" / "P1_t1.nii.gz").rename(tmp_path / "P1" / "P1_t1.nii" / "P2_t1.nii.gz")
    with pytest.raises(DataError, match=r"P1_t1\.nii is a folder, or a broken or circular link \[no-file\]"):
        find_patients(tmp_path)


def test_paths_as_windows_writes_them(tmp_path):
    raws = [ball("P1"), ball("P2", seed=1)]
    write_paths(tmp_path / "table", raws)
    write_msd(tmp_path / "msd", raws)
    table, described = tmp_path / "table" / "paths.csv", tmp_path / "msd" / "dataset.json"
    table.write_text(table.read_text().replace("scans/", "scans\\"))
    described.write_text(described.read_text().replace("./images", ".\\\\images").replace("Tr/", "Tr\\\\"))
    assert "imagesTr\\" in json.loads(described.read_text())["training"][0]["image"]
    for place in (table, tmp_path / "msd"):
        found = list_patients(place)
        assert not found.findings and all(files.label.is_file() for files in found.files.values()), place
        assert list(found.files) == ["P1", "P2"] and read(place).ids == ("P1", "P2")


def test_packed_folders_are_recognised(tmp_path):
    (tmp_path / "BraTS2021_Training_Data.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds packed folders such as BraTS2021_Training_Data\.tar; unpack them"):
        list_patients(tmp_path)


def test_ids_in_upper_and_lower_case_are_one(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("Pat_a1"), ball("Pat_a2")])
    for path in (tmp_path / "Pat_a1").iterdir():
        path.rename(path.with_name(path.name.upper()))
    found = list_patients(tmp_path)
    assert list(found.files) == ["Pat_a1", "Pat_a2"] and not found.findings
    assert len(found.files["Pat_a1"].images) == 4 and found.files["Pat_a1"].label.name == "PAT_A1_SEG.NII.GZ"


def test_unknown_and_mixed_layouts_are_errors(tmp_path):
    save(ball().label, ball().affine, tmp_path / "a" / "P1" / "scan.nii.gz")
    with pytest.raises(DataError, match=r"match no layout: scan\.nii\.gz.* write a table of paths"):
        list_patients(tmp_path / "a")
    with pytest.raises(ValueError, match=r"layout must be one of 'brats2018', .* got 'mine'"):
        list_patients(tmp_path / "a", layout="mine")
    write_layout(tmp_path / "b", "brats2021", [ball("P1")])
    write_layout(tmp_path / "b", "brats2023", [ball("P2")])
    with pytest.raises(DataError, match=r"as many patients .* pass layout="):
        list_patients(tmp_path / "b")
    assert list_patients(tmp_path / "b", layout="brats2023").layout == "brats2023"


def test_a_stray_patient_of_another_layout_is_a_finding(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("P1"), ball("P2")])
    write_layout(tmp_path, "brats2023", [ball("P3")])
    with pytest.raises(DataError, match=r"P3: P3-seg\.nii\.gz is named as in BraTS 2023.*\[other-layout\]"):
        find_patients(tmp_path)
    with pytest.warns(UserWarning, match="continuing without 1 patient:"):
        assert list(find_patients(tmp_path, broken="skip")) == ["P1", "P2"]


def test_one_patient_in_two_folders(tmp_path):
    write_layout(tmp_path, "brats2018", [ball("P1"), ball("P2")])
    save_files(ball("P1"), tmp_path / "LGG" / "P1")
    with pytest.raises(DataError, match=r"P1: LGG/P1 is a second folder for this patient \[two-folders\]"):
        find_patients(tmp_path)


def test_tables_of_paths_with_problems(tmp_path):
    write_paths(tmp_path, [ball("P1"), ball("P2")])
    table = tmp_path / "paths.csv"
    good = table.read_text()

    def refused(text, reason):
        table.write_text(text)
        with pytest.raises(DataError, match=reason):
            find_patients(table)

    head, *rows = good.splitlines()
    refused("\n".join([head, *rows, rows[0]]), r"P1: line 4 of paths\.csv is a second row .*\[two-folders\]")
    refused("\n".join([head, rows[0].replace("t1 of 0", "none")]),
            r"T1: scans/none\.nii\.gz is not a file, .*\[no-file\]")
    refused("\n".join([head, rows[0].replace("t1 of 0", "flair of 0")]), r"FLAIR and T1 are one file.*\[two-files\]")
    refused("\n".join([head, rows[0].replace("P1", "../P1")]), r"without / or .*\[unusable\]")
    refused("\n".join([head, "P1,a,,c,d,,"]), r"gives no path for T1 \[missing-modality\]")
    refused(head.replace("t1c", "dwi") + "\n" + rows[0], "no column T1c")
    refused(head, "no row below its header")
    refused("", "contains no column name")
    refused(head + ",flair\n", "two columns are named flair")
    refused(head + ",mask,T1 path,case\n", "columns patient and case may each be the patient; columns t1 and T1 path "
            "may each be the T1; columns label and mask may each be the label; keep one, and rename the others")
    refused(head + "\n" + rows[0] + ",more\n", "more cells")
    refused('"' + good, "cannot be read as a CSV")
    table.write_text(good)
    shutil.copy(table, tmp_path / "again.csv")
    with pytest.raises(DataError, match=r"several tables of paths: again\.csv, paths\.csv"):
        find_patients(tmp_path)


def test_label_maps_in_a_column_of_another_name_are_not_passed_over_in_silence(tmp_path):
    write_paths(tmp_path, [ball("P1"), ball("P2")])
    table = tmp_path / "paths.csv"
    table.write_text(table.read_text().replace(",label", ",ground truth", 1))
    with pytest.warns(UserWarning, match=r"P2: paths\.csv has no column label, .* column ground truth .*\[no-label\]"):
        assert all(patient.label is None for patient in read(table))


def test_absolute_paths_and_other_headings(tmp_path):
    raws = [ball("P1"), ball("P2", seed=1)]
    write_layout(tmp_path / "scans", "brats2021", raws)
    rows = [[r.id, *(tmp_path / "scans" / r.id / f"{r.id}_{OLD[m]}.nii.gz" for m in (*r.images, "label"))]
            for r in raws]
    write_table(tmp_path / "t.csv", ["Subject_ID", "FLAIR path", "T1_file", "T1Gd", "T2w", "Segmentation"], rows)
    one, other = read(tmp_path / "t.csv"), read(tmp_path / "scans")
    assert all(torch.equal(a.image, b.image) and torch.equal(a.label, b.label) for a, b in zip(one, other, strict=True))


def flat(folder, target):
    """The scans of all patient folders, moved into one folder."""
    target.mkdir(parents=True)
    for scan in sorted(folder.rglob("*.nii.gz")):
        scan.rename(target / scan.name)
    return target


@pytest.mark.parametrize("layout", ["brats2021", "brats2020", "brats2023"])
def test_scans_of_all_patients_in_one_folder(tmp_path, layout):
    raws = named([ball(seed=i) for i in range(3)], layout)
    want = read(write_layout(tmp_path / "plain", layout, raws))
    write_layout(tmp_path / "data", layout, raws)
    folder = flat(tmp_path / "data", tmp_path / "scans")
    cohort = read(folder)
    assert (cohort.layout, cohort.ids) == (layout, want.ids) and "3 patients in one folder" in cohort.reason
    assert all(torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
               for a, b in zip(cohort, want, strict=True))
    write_table(tmp_path / "sites.csv", ["Partition_ID", "Subject_ID"], [["1", raw.id] for raw in raws])
    site = read_sites(folder, tmp_path / "sites.csv", spacing_mm=2.0, progress=False)[0]
    assert {patient.id for split in (site.train, site.val) for patient in split} == set(want.ids)
    assert len(site.train) and len(site.val)  # who is held out is a matter of the ids, which layouts write differently
    (tmp_path / "above").mkdir()
    folder.rename(tmp_path / "above" / "scans")
    assert read(tmp_path / "above").ids == want.ids  # also in the only subfolder
    first = tmp_path / "above" / "scans"
    shutil.copy(next(first.glob("*seg*")), first / f"{raws[0].id} again.nii.gz")
    next(first.glob(f"{raws[1].id}?t1*")).unlink()
    with pytest.raises(DataError, match=rf"{raws[1].id}: no T1.*\[missing-modality\]") as caught:
        read(first)
    assert "problems with 1 of 3 patients" in str(caught.value)


def test_two_folders_each_with_all_scans_are_side_by_side(tmp_path):
    for part in ("a", "b"):
        write_layout(tmp_path / "scans" / part, "brats2021", [ball(f"{part}1"), ball(f"{part}2")])
        flat(tmp_path / "scans" / part, tmp_path / "data" / part)
    with pytest.raises(DataError, match="give one of its subfolders that do: a, b"):
        read(tmp_path / "data")


def test_raw_data_of_nnunet_with_problems(tmp_path):
    raws = [ball(f"case_{i}", seed=i) for i in range(3)]
    write_nnunet(tmp_path, raws)
    (tmp_path / "labelsTr" / "case_2.nii.gz").unlink()
    cohort = read(tmp_path)
    assert [patient.label is None for patient in cohort] == [False, False, True]
    assert [f.code for f in cohort.findings] == ["no-label"] and "order T1, T1c, T2, FLAIR" in cohort.reason
    (tmp_path / "imagesTr" / "case_1_0003.nii.gz").unlink()
    (tmp_path / "imagesTr" / "case_2_0001.nii.gz").rename(tmp_path / "imagesTr" / "notes.nii.gz")
    with pytest.raises(DataError, match=r"case_1: no FLAIR: imagesTr/case_1_0003\.nii\.gz \[missing-modality\]"):
        read(tmp_path)
    told = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**told, "channel_names": {"0": "MR", "1": "T1", "2": "T2"}}))
    with pytest.raises(DataError, match="no FLAIR and no T1c among the modalities"):
        read(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json is missing; only it assigns volumes or channels"):
        read(tmp_path)


def test_upper_case_endings_and_tables(tmp_path):
    raws = [ball("P1"), ball("P2", seed=1)]
    want = read(write_layout(tmp_path / "plain", "brats2021", raws))
    folder = write_layout(tmp_path / "data", "brats2020", raws)
    for scan in folder.rglob("*.nii.gz"):
        scan.rename(scan.with_name(scan.name.replace("_flair", "_FLAIR").replace("_t1ce", "_T1CE")
                                   .replace("_seg", "_Seg").replace(".nii.gz", ".NII.GZ")))
    (folder / "name_mapping.csv").rename(folder / "Name_Mapping.CSV")
    cohort = read(folder)
    assert cohort.layout == "brats2020" and cohort.table()["grade"].tolist() == ["HGG", "LGG"]
    assert all(torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
               for a, b in zip(cohort, want, strict=True))
    write_paths(tmp_path / "table", raws)
    table = tmp_path / "table" / "paths.csv"
    table.write_text(table.read_text().replace("patient,flair,t1,t1c,t2,label", "PATIENT,FLAIR,T1,T1C,T2,LABEL"))
    table = table.rename(tmp_path / "table" / "PATHS.CSV")
    for place in (table, table.parent):
        assert all(torch.equal(a.label, b.label) for a, b in zip(read(place), want, strict=True))


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SAL"])
def test_label_maps_with_axes_in_another_order_at_the_same_place(tmp_path, codes):
    raw = ball("P1")
    want = read(write_layout(tmp_path / "plain", "brats2021", [raw]))[0]
    folder = write_layout(tmp_path / "data", "brats2021", [raw])
    path = folder / "P1" / "P1_seg.nii.gz"
    stored = nib.load(path)
    other = nib.orientations.ornt_transform(nib.orientations.io_orientation(stored.affine),
                                            nib.orientations.axcodes2ornt(codes))
    turned = stored.as_reoriented(other)
    assert nib.aff2axcodes(turned.affine) == tuple(codes)
    path.unlink()
    nib.save(turned, path)
    cohort = read(folder)
    assert cohort.findings == () and torch.equal(cohort[0].label, want.label)
    files = find_patients(folder)["P1"]
    assert np.array_equal(read_label(files)[0], raw.label)  # on the grid of the scans, as predictions are
    (case,) = inspect_folder(folder, progress=False).cases
    assert case.volumes_ml["ET"] == pytest.approx((raw.label == 4).sum() / 1000) and case.picture.label.any()
    shifted = nib.Nifti1Image(np.asanyarray(turned.dataobj), turned.affine + np.outer([3, 0, 0, 0], [0, 0, 0, 1]))
    path.unlink()
    nib.save(shifted, path)
    with pytest.raises(DataError, match=r"\[grids-differ\]"):
        read(folder)


# --- label conventions

def test_every_convention_maps_to_the_same_internal_labels():
    inside = np.array([0, 1, 1, 2, 4, 0], dtype=np.uint8)
    outside = {"brats2021": [0, 1, 1, 2, 4, 0], "brats2023": [0, 1, 1, 2, 3, 0], "brats2024": [0, 1, 1, 2, 3, 4],
               "msd": [0, 2, 2, 1, 3, 0], "brats2013": [0, 1, 3, 2, 4, 0], "brats2024ped": [0, 2, 3, 4, 1, 0]}
    assert set(outside) == set(CONVENTIONS)
    for name, values in outside.items():
        for dtype in (np.uint8, np.int16, np.float32, np.float64):
            stored = np.array(values, dtype=dtype)
            np.testing.assert_array_equal(to_internal(stored, name), inside)
            np.testing.assert_array_equal(to_internal(from_internal(inside, name), name), inside)
            assert count_values(stored) == {float(v): values.count(v) for v in set(values)}
    assert labels_to_regions(torch.tensor([1, 2, 4, 0]).view(1, 1, 4)).sum(dim=(1, 2, 3)).tolist() == [2, 3, 1]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_stated_convention_is_taken(tmp_path, convention):
    raw = ball("P1")
    want = read(write_layout(tmp_path / "plain", "brats2021", [raw]))[0].label
    stored = recode(raw.label, convention)
    if convention in ("brats2013", "brats2024ped"):  # part of the core is non-enhancing, or a cyst
        stored[(raw.label == 1) & (np.arange(stored.size).reshape(stored.shape) % 2 == 0)] = 3
    if convention == "brats2024":
        stored[(raw.label == 0) & (raw.images["T1"] > 350)] = 4
    assert set(np.unique(stored)) == set(CONVENTIONS[convention])
    write_paths(tmp_path / "data", [raw])
    save(stored, raw.affine, tmp_path / "data" / "scans" / "label of 0.nii.gz")
    cohort = read(tmp_path / "data", label_convention=convention)
    assert cohort.convention.reason == "stated" and torch.equal(cohort[0].label, want)
    assert [f.code for f in cohort.findings] == (["cavity"] if convention == "brats2024" else [])


def detect(values, layout="table", **options):
    return detect_convention({f"P{i}": {0.0, *map(float, seen)} for i, seen in enumerate(values)}, layout=layout,
                             **options)


@pytest.mark.parametrize(("values", "layout", "expected"), [
    ([(1, 2, 4), (1, 2)], "table", "brats2021"), ([(4,)], "table", "brats2021"), ([(), ()], "table", "brats2021"),
    ([(1, 2)], "brats2021", "brats2021"), ([(1, 2, 4)] * 3 + [(1, 2, 3)], "fets", "brats2021"),
    ([(1, 2, 4, 7)], "brats2020", "brats2021"), ([(1, 2, 3)], "brats2023", "brats2023"),
    ([(1, 2)], "brats2023", "brats2023"), ([(1, 2, 3)] * 3 + [(1, 2, 4)], "brats2023", "brats2023"),
])
def test_unambiguous_conventions_are_detected(values, layout, expected):
    found = detect(values, layout)
    assert found.name == expected and "value" in found.reason


@pytest.mark.parametrize(("values", "layout", "named"), [
    ([(1, 2, 3)], "table", ("brats2023", "msd")), ([(1, 2)], "table", ("brats2021", "msd")),
    ([(2,)], "table", ("brats2021", "msd")), ([(1, 2, 3, 4)], "table", ("brats2024", "brats2013")),
    ([(1, 2, 3), (1, 2, 4)], "table", ("brats2024", "brats2013")), ([(5,)], "table", tuple(CONVENTIONS)),
    ([(1, 2, 3)], "brats2021", ("brats2023", "msd")), ([(1, 2, 3), (1, 2, 4)], "brats2021", ("brats2023", "msd")),
    ([(1, 2, 3, 4)], "brats2021", ("brats2024", "brats2013")), ([(1, 2, 3, 4)], "brats2023", ("brats2024",)),
    ([(1, 2, 4)], "brats2023", ("brats2021", "brats2024")), ([(1, 2, 3)], "msd", ("brats2023", "msd")),
])
def test_an_ambiguous_convention_is_an_error_that_names_the_option(values, layout, named):
    with pytest.raises(DataError, match=r"pass label_convention=.* \(--label-convention on") as caught:
        detect(values, layout)
    assert caught.value.code == "label-convention"
    assert all(repr(name) in str(caught.value).rsplit("pass ", 1)[1] for name in named)


@pytest.mark.parametrize(("labels", "expected"), [
    ({0: "background", 1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumour"}, "msd"),
    ({0: "background", 1: "necrosis", 2: "peritumoral oedema", 4: "enhancing tumor"}, "brats2021"),
    ({0: "background", 1: "NCR", 2: "SNFH", 3: "ET"}, "brats2023"),
    ({0: "background", 1: "NETC", 2: "SNFH", 3: "ET", 4: "resection cavity"}, "brats2024"),
    ({0: "background", 1: "necrosis", 2: "edema", 3: "non-enhancing", 4: "enhancing"}, "brats2013"),
])
def test_a_description_beside_the_labels_decides(labels, expected):
    found = detect([(1, 2)], "msd", described=labels)
    assert found.name == expected and f"1 is {labels[1]}" in found.reason
    with pytest.raises(DataError, match="no known convention"):
        detect([(1, 2)], "msd", described={0: "background", 1: "enhancing", 2: "edema"})


def test_patients_without_labels_need_no_convention(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("P1")._replace(label=None)])
    cohort = read(tmp_path)
    assert cohort.convention.name is None and cohort[0].label is None


def test_ambiguous_labels_stop_run_and_evaluate_until_they_are_stated(tmp_path, capsys):
    write_paths(tmp_path / "data", [ball("P1"), ball("P2", seed=1)], convention="msd")
    write_table(tmp_path / "sites.csv", ["Partition_ID", "Subject_ID"], [["1", "P1"], ["1", "P2"]])
    model = save_model(tmp_path / "m.safetensors", segresnet(filters=8, seed=0), spacing_mm=2.0)
    with pytest.raises(DataError, match="--label-convention"):
        Folder(data=str(tmp_path / "data"), table=str(tmp_path / "sites.csv")).prepare(seed=0, workers=None)
    run = ["run", "--data", str(tmp_path / "data"), "--sites", str(tmp_path / "sites.csv"), "--out"]
    assert main([*run, str(tmp_path / "run")]) == 1 and "--label-convention" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # refused before anything was written
    command = ["evaluate", str(model), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(command) == 1 and "--label-convention" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--label-convention", "msd"]) == 0
    sites = read_sites(tmp_path / "data", tmp_path / "sites.csv", label_convention="msd", spacing_mm=1.0,
                       progress=False)
    assert (sites[0].train[0].label == 4).any()


# --- patient folders

@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_types_and_orientations(tmp_path, dtype, codes):
    affine = np.zeros((4, 4))
    for axis, code in enumerate(codes):
        affine["RASLPI".index(code) % 3, axis] = 1 if code in "RAS" else -1
    affine[3, 3] = 1
    affine[:3, :3] = affine[:3, :3] @ np.diag([1.0, 1.5, 2.0])
    assert "".join(nib.aff2axcodes(affine)) == codes
    plain = ball("P1", affine=np.diag([*np.abs(affine[:3, :3]).sum(1), 1.0]))  # RAS
    small = plain._replace(images={m: a // 8 for m, a in plain.images.items()})  # fits into uint8
    turned = small._replace(images={m: from_ras(a, affine) for m, a in small.images.items()},
                            label=from_ras(small.label, affine), affine=affine)
    save_files(small, tmp_path / "plain" / "P1")
    save_files(turned, tmp_path / "turned" / "P1", dtype=dtype)
    one, other = read(tmp_path / "plain")[0], read(tmp_path / "turned")[0]
    assert torch.equal(one.image, other.image) and torch.equal(one.label, other.label)
    assert one.spacing_mm == pytest.approx(other.spacing_mm)


def test_a_folder_is_a_sequence_read_on_access(tmp_path):
    write_layout(tmp_path, "brats2021", [ball(f"P{i}", seed=i) for i in range(3)])
    cohort = read(tmp_path, spacing_mm=2.0, shape=(16, 32, 16), examine=False)
    assert len(cohort) == 3 and cohort[-1].id == "P2" and [p.id for p in cohort[1:]] == ["P1", "P2"]
    assert {tuple(p.image.shape) for p in cohort} == {(4, 16, 32, 16)}
    assert torch.equal(cohort.read("P1").image, cohort[1].image)
    with pytest.raises(KeyError):
        cohort.read("P9")
    (tmp_path / "P2" / "P2_t1.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"P2_t1\.nii\.gz: not a NIfTI file"):
        cohort[2]
    assert cohort[0].id == "P0"


def test_the_cache_gives_the_same_patients_and_sees_changes(tmp_path):
    raws = [ball("P1"), ball("P2", seed=1)]
    raws[1].label[raws[1].label == 4] = 1
    folder = write_layout(tmp_path / "data", "brats2021", raws)
    plain = read(folder, spacing_mm=2.0)
    first = read(folder, spacing_mm=2.0, cache=tmp_path / "cache")
    kept = sorted((tmp_path / "cache").iterdir())
    again = read(folder, spacing_mm=2.0, cache=tmp_path / "cache")
    assert len(kept) == 2 and sorted((tmp_path / "cache").iterdir()) == kept
    assert [f.code for f in first.findings] == [f.code for f in again.findings] == ["no-enhancing"]
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
        np.testing.assert_array_equal(a.affine, b.affine)
    before = again[0].image
    changed = raws[0]._replace(images={m: a[::-1] for m, a in raws[0].images.items()})
    shutil.rmtree(folder / "P1")
    save_files(changed, folder / "P1")
    assert not torch.equal(read(folder, spacing_mm=2.0, cache=tmp_path / "cache")[0].image, before)


def test_the_cache_sees_a_corrected_file_of_equal_size_and_time(tmp_path):
    folder = tmp_path / "data"
    save_files(ball("P1"), folder / "P1", suffix=".nii")
    path = folder / "P1" / "P1_seg.nii"
    before = read(folder, spacing_mm=2.0, cache=tmp_path / "cache")[0].label
    state, image = path.stat(), nib.load(path)
    corrected = np.where(np.asanyarray(image.dataobj) == 4, 1, np.asanyarray(image.dataobj)).astype(np.uint8)
    path.write_bytes(nib.Nifti1Image(corrected, image.affine, image.header).to_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    with pytest.warns(UserWarning, match="no enhancing tumour"):
        after = read(folder, spacing_mm=2.0, cache=tmp_path / "cache")[0].label
    assert (before == 4).any() and not (after == 4).any()


def test_monai_reads_once_and_crops_at_random(tmp_path, monkeypatch):
    from monai.transforms import RandCropByPosNegLabeld

    write_layout(tmp_path, "brats2021", [ball(f"P{i}", seed=i) for i in range(2)])
    cohort = read(tmp_path, examine=False)
    crop = RandCropByPosNegLabeld(("image", "label"), label_key="tumour", spatial_size=(8, 8, 8), pos=1, neg=1)
    data = cohort.dataset(crop.set_random_state(seed=0))
    shutil.rmtree(tmp_path / "P0")  # it is in memory by now
    crops = [data[0][0] for _ in range(4)]
    assert {tuple(c["image"].shape) for c in crops} == {(4, 8, 8, 8)}
    assert {tuple(c["label"].shape) for c in crops} == {(3, 8, 8, 8)}
    assert not all(torch.equal(c["image"], crops[0]["image"]) for c in crops)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        cohort.dataset(keep=2)


# --- the real scans

def test_real_scans_in_two_layouts(real_scans):
    cohort = read(real_scans / "msd")
    assert (cohort.layout, cohort.convention.name, cohort.ids) == ("msd", "msd", ("BRATS_001",))
    stored = nib.load(real_scans / "msd" / "Task01_BrainTumour" / "labelsTr" / "BRATS_001.nii.gz")
    values = np.asanyarray(stored.dataobj)
    label = cohort[0].label
    assert [int((label == v).sum()) for v in (2, 1, 4)] == [int((values == v).sum()) for v in (1, 2, 3)]
    fine = read(real_scans / "brats2021_1mm", examine=False)
    assert (fine.layout, fine.convention.name) == ("brats2021", "brats2021") and fine[0].spacing_mm == (1, 1, 1)
