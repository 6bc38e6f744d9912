"""All scans of one person stay at one site and on one side of its split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedlab.apps.cli import main
from fedlab.core.errors import DataError
from fedlab.core.types import Patient, Site
from fedlab.data.readers.folders import check_sites, read_sites
from fedlab.data.sites.partition import (
    Partition,
    by_column,
    by_dirichlet_size,
    by_dirichlet_type,
    by_institution,
    by_quantity,
    by_scanner,
    read_site_table,
    split_patients,
)
from fedlab.data.sites.persons import group_by_person, name_several, person_of
from folders import NEW, ball, save_files, write_table

#: Five persons with three scans each.
SCANS = [f"BraTS-GLI-{person:05d}-{time}" for person in range(1, 6) for time in (100, 101, 102)]


def person(scan: str) -> str:
    return scan.rsplit("-", 1)[0]


def places(partition: Partition) -> dict[str, set[tuple[str, str]]]:
    """The site and the split of each person's scans."""
    found: dict[str, set[tuple[str, str]]] = {}
    for split, sites in (("train", partition.train), ("held out", partition.held_out)):
        for site, scans in sites.items():
            for scan in scans:
                found.setdefault(person(scan), set()).add((site, split))
    return found


@pytest.mark.parametrize(("one", "other"), [
    ("BraTS-GLI-00005-100", "BraTS-GLI-00005-101"), ("BraTS-PED-00003-000", "BraTS-PED-00003-001"),
    ("BraTS-MEN-RT-0402-1", "BraTS-MEN-RT-0402-2"), ("UCSF-PDGM-0429", "UCSF-PDGM-0429_FU003d"),
    ("UCSF-PDGM-429", "UCSF-PDGM-0429_FU003d_nifti"), ("UPENN-GBM-00001_11", "UPENN-GBM-00001_21"),
    ("UCSD-PTGBM-0002_01", "UCSD-PTGBM-0002_02"), ("TCGA-02-0003", "TCGA-02-0003_1997.06.08"),
    ("C3L-00016", "C3L-00016-21"), ("sub-01_ses-1", "sub-01_ses-2"), ("brats-gli-00005-100", "BraTS-GLI-00005-101"),
    ("100001_time1", "100001_time2"), ("PatientID_0003_Timepoint_1", "PatientID_0003_Timepoint_2"),
    ("Patient-001_week-000-1", "Patient-001_week-044"), ("RHUH-0001_0", "RHUH-0001_2"), ("P1_baseline", "p1-followup"),
    ("YG_A1_2010-01-31", "YG_A1_2011-12-01"), ("P1.preop", "P1_postop"), ("P01_ses-1", "P01_visit2"),
])
def test_ids_that_say_who_are_understood(one: str, other: str) -> None:
    assert person_of(one) is not None
    assert person_of(one) == person_of(other)


@pytest.mark.parametrize(("one", "other"), [
    ("BraTS-GLI-00005-100", "BraTS-GLI-00006-100"), ("BraTS-GLI-00005-000", "BraTS-MET-00005-000"),
    ("BraTS2021_00005", "BraTS2021_00006"), ("UPENN-GBM-00001_11", "UPENN-GBM-00011_11"), ("sub-01", "sub-1"),
    ("P1_1", "P1_2"), ("site-01-000", "site-01-001"), ("BRATS_001", "BRATS_002"), ("substance_1", "substance_2"),
    ("Patient-001_week-000", "Patient-002_week-000"), ("100001_time1", "100011_time1"), ("site_time1", "site_time2"),
    ("MR_2010-01-31", "MR_2010-02-01"), ("RHUH-0001_0", "RHUH-0002_0"), ("P1_12345678", "P1_12345679"),
])
def test_other_persons_and_unknown_forms_are_not_joined(one: str, other: str) -> None:
    assert group_by_person([one, other]) == [(one,), (other,)]


@pytest.mark.parametrize("seed", range(4))
def test_every_partition_keeps_a_person_together(seed: int, tmp_path: Path) -> None:
    homes = {scan: f"s{int(scan[14]) % 2}" for scan in SCANS}
    frame = pd.DataFrame({"Subject_ID": SCANS, "scanner": homes.values(), "Partition_ID": homes.values()})
    frame.to_csv(tmp_path / "t.csv", index=False)
    common = {"seed": seed, "held_out": 0.4}
    for partition in (by_dirichlet_size(SCANS, sites=2, alpha=10, **common),
                      by_quantity(SCANS, sites=2, skew=0.5, **common),
                      by_dirichlet_type({scan: scan[-1] for scan in SCANS}, sites=2, alpha=1.0, **common),
                      by_scanner({scan: scan[-1] for scan in SCANS}, skew=0.5, **common),
                      by_column(frame, "scanner", **common), by_column(tmp_path / "t.csv", "scanner", **common),
                      by_institution(tmp_path / "t.csv", **common)):
        assert sorted(partition.patients) == SCANS
        assert {len(found) for found in places(partition).values()} == {1}, partition.how
        assert any(partition.held_out.values())
        assert "5 persons with several scans" in repr(partition)


def test_a_fraction_held_out_is_one_of_persons() -> None:
    train, held = split_patients(SCANS, held_out=0.4, seed=1, site="s")
    assert len(held) == 6 and len({person(scan) for scan in held}) == 2
    assert not {person(scan) for scan in held} & {person(scan) for scan in train}
    assert [*train, *held] != SCANS and sorted([*train, *held]) == SCANS
    assert split_patients(SCANS[:3], held_out=1, seed=0, site="s") == (SCANS[:3], [])  # the only person is trained on
    patients = [Patient(scan, torch.zeros(4, 2, 2, 2), None, np.eye(4)) for scan in SCANS]
    assert [p.id for p in split_patients(patients, held_out=0.4, seed=1, site="s")[1]] == held


def test_a_partition_made_by_hand_is_refused_with_the_names() -> None:
    with pytest.raises(DataError, match=r"BraTS-GLI-00001-100 at a \(to train on\) and BraTS-GLI-00001-101 at a"):
        Partition(train={"a": tuple(SCANS[:1])}, held_out={"a": tuple(SCANS[1:2])})
    sites = [Site("a", [Patient(SCANS[0], torch.zeros(4, 2, 2, 2), None, np.eye(4))]),
             Site("b", [Patient(SCANS[1], torch.zeros(4, 2, 2, 2), None, np.eye(4))])]
    with pytest.raises(DataError, match="one person is BraTS-GLI-00001-100 at a"):
        Partition.of(sites)


def test_a_table_with_a_person_at_two_sites_is_refused_with_the_names(tmp_path: Path, capsys) -> None:
    table = tmp_path / "t.csv"
    write_table(table, ["Partition_ID", "Subject_ID"], [[1 if scan[-1] < "2" else 2, scan] for scan in SCANS])
    for scan in SCANS:
        save_files(ball(scan, shape=(12, 14, 10)), tmp_path / "d" / scan, names=NEW, mark="-", convention="brats2023")
    said = "one person is BraTS-GLI-00003-100, BraTS-GLI-00003-101 at site 1 and BraTS-GLI-00003-102 at site 2"
    for use in (lambda: by_institution(table), lambda: by_column(table, "Partition_ID"),
                lambda: read_sites(tmp_path / "d", table, progress=False), lambda: check_sites(tmp_path / "d", table)):
        with pytest.raises(DataError) as caught:
            use()
        assert said in str(caught.value) and "leave out all rows of that person but those of one site" in str(
            caught.value)
    assert main(["run", "--data", str(tmp_path / "d"), "--sites", str(table), "--out", str(tmp_path / "run")]) != 0
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_read_sites_keeps_persons_together_and_says_so(tmp_path: Path, capsys) -> None:
    write_table(tmp_path / "t.csv", ["Partition_ID", "Subject_ID"], [[1 + int(scan[14]) % 2, scan] for scan in SCANS])
    for scan in SCANS:
        save_files(ball(scan, shape=(12, 14, 10)), tmp_path / "d" / scan, names=NEW, mark="-", convention="brats2023")
    for seed in range(3):
        sites = read_sites(tmp_path / "d", tmp_path / "t.csv", spacing_mm=1.0, seed=seed, held_out=0.4)
        assert {len(found) for found in places(Partition.of(sites)).values()} == {1}
        assert all(site.val for site in sites)
        assert Partition.of(sites) == by_institution(tmp_path / "t.csv", held_out=0.4, seed=seed)
    assert "5 persons have several scans, which stay on one side of the split: BraTS-GLI-00002-100 = " in (
        capsys.readouterr().err)


def test_a_column_of_persons_says_what_ids_do_not(tmp_path: Path) -> None:
    rows = [[f"s{n % 2}", f"P{n}", f"who {n // 4}-{n % 2}"] for n in range(12)] + [["s0", "P12", ""], ["s0", "P13", ""]]
    write_table(tmp_path / "t.csv", ["Partition_ID", "Subject_ID", "Person"], rows)
    assert read_site_table(tmp_path / "t.csv").same == tuple(
        frozenset({f"P{n}", f"P{n + 2}"}) for n in (0, 1, 4, 5, 8, 9))
    for seed in range(4):
        for partition in (by_institution(tmp_path / "t.csv", held_out=0.4, seed=seed),
                          by_column(pd.DataFrame(rows, columns=["Partition_ID", "Subject_ID", "person"]),
                                    "Partition_ID", held_out=0.4, seed=seed)):
            held = {name for names in partition.held_out.values() for name in names}
            assert all(len(held & {f"P{n}", f"P{n + 2}"}) != 1 for n in (0, 1, 4, 5, 8, 9))
            assert Partition(train=partition.train, held_out=partition.held_out, same=partition.same)
    rows[2][0] = "s1"
    write_table(tmp_path / "apart.csv", ["Partition_ID", "Subject_ID", "Person"], rows)
    with pytest.raises(DataError, match="one person is P0 at site s0 and P2 at site s1"):
        by_institution(tmp_path / "apart.csv")


def test_groups_are_joined_with_what_ids_say() -> None:
    assert group_by_person(["a", *SCANS[:3], "b", "c"], [{"a", SCANS[1]}, {"b", "elsewhere"}, {"c", "elsewhere"}]) == [
        ("a", *SCANS[:3]), ("b", "c")]
    assert name_several(["a", "b"]) == ""
    assert name_several(["a", "b"], [{"a", "b"}]).startswith("1 person has several scans")
