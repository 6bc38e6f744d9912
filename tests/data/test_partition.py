"""Patients assigned to sites: each exactly once, no person at two places, reproducible with the seed."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cohorts import blob_patient, blob_sites
from fedlab.core.errors import DataError
from fedlab.core.types import Patient
from fedlab.data.sites.partition import (
    Partition,
    by_column,
    by_dirichlet_size,
    by_dirichlet_type,
    by_institution,
    by_quantity,
    by_scanner,
    split_patients,
    tumour_types,
)

KINDS = ("none", "small", "large")


def ids(count: int) -> list[str]:
    return [f"p{number:03d}" for number in range(count)]


def makers(names: list[str], sites: int, seed: int, **common) -> dict[str, Callable[[], Partition]]:
    kinds = {name: KINDS[number % 3] for number, name in enumerate(names)}
    homes = {name: f"s{number % sites}" for number, name in enumerate(names)}
    table = pd.DataFrame({"Subject_ID": names, "scanner": [homes[name] for name in names]})
    common["seed"] = seed
    return {
        "size": lambda: by_dirichlet_size(names, sites=sites, alpha=0.5, **common),
        "quantity": lambda: by_quantity(names, sites=sites, skew=1.2, **common),
        "type": lambda: by_dirichlet_type(kinds, sites=sites, alpha=0.3, **common),
        "scanner": lambda: by_scanner(homes, skew=0.5, **common),
        "column": lambda: by_column(table, "scanner", **common),
    }


@settings(max_examples=30, deadline=None)
@given(sites=st.integers(1, 6), extra=st.integers(0, 40), seed=st.integers(0, 2**31),
       held_out=st.sampled_from([0, 0.2, 0.5, 1, 3]))
def test_every_patient_is_at_exactly_one_site_and_in_one_split(sites: int, extra: int, seed: int,
                                                               held_out: float) -> None:
    names = ids(2 * sites + extra)
    for name, make in makers(names, sites, seed, held_out=held_out).items():
        partition = make()
        assert sorted(partition.patients) == names, name
        assert partition.table()["patients"].sum() == len(names)
        assert len(partition.train) == sites
        assert all(partition.train.values())
        assert make() == partition and make().id == partition.id
        if name not in ("scanner", "column"):
            assert partition.table()["patients"].min() >= 2


@settings(max_examples=30, deadline=None)
@given(data=st.data(), sites=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_ids_of_one_person_stay_together(data: st.DataObject, sites: int, seed: int) -> None:
    names = ids(8 * sites)
    pool = data.draw(st.permutations(names))
    sizes = data.draw(st.lists(st.integers(2, 3), max_size=2 * sites))
    same, at = [], 0
    for size in sizes:
        same.append(frozenset(pool[at:at + size]))
        at += size
    for name, make in makers(names, sites, seed, held_out=0.3, same=same).items():
        if name == "column":
            continue  # the sites of a table are given: see the next test
        partition = make()
        assert sorted(partition.patients) == names
        for person in same:
            homes = {(site, split) for split in ("train", "held_out") for site, members in
                     getattr(partition, split).items() if person & set(members)}
            assert len(homes) == 1, name


@pytest.mark.parametrize(("train", "held_out", "same", "message"), [
    ({"a": ("p1", "p2"), "b": ("p1",)}, {"a": (), "b": ()}, (), r"p1 is at a \(to train on\) and at b"),
    ({"a": ("p1", "p2")}, {"a": ("p2",)}, (), r"p2 is at a \(to train on\) and at a \(held out\)"),
    ({"a": ("p1", "p1")}, {"a": ()}, (), "p1 is at a"),
    ({"a": ("p1",)}, {"a": ("p2",)}, (frozenset({"p1", "p2"}),), "one person is p1 at a .to train on. and p2"),
    ({"a": ("p1",), "b": ("p2",)}, {"a": (), "b": ()}, (frozenset({"p1", "p2"}),), "one person is"),
    ({"a": ("p1",), "b": ()}, {"a": (), "b": ("p2",)}, (), "b has no patient to train on"),
    ({"a": ("p1",)}, {"b": ("p2",)}, (), "name the same sites"),
    ({}, {}, (), "at least one"),
])
def test_a_patient_at_two_places_is_refused(train, held_out, same, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Partition(train=train, held_out=held_out, same=same)


def test_a_table_that_splits_a_person_is_refused_and_can_be_repaired(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("Partition_ID", "Subject_ID"), (1, "a"), (1, "b"), (2, "c"), (2, "d"), (10, "e")])
    partition = by_institution(table, held_out=0)
    assert partition.train == {"1": ("a", "b"), "2": ("c", "d"), "10": ("e",)}
    with pytest.raises(DataError, match=r"one person is b at 1 \(to train on\) and c at 2"):
        by_institution(table, held_out=0, same=[frozenset({"b", "c"})])
    assert by_institution(table, held_out=0).without(["b"]).train["1"] == ("a",)
    assert "10" not in partition.without(["e"]).train


def test_by_column_reads_frames_and_files_alike(tmp_path: Path) -> None:
    frame = pd.DataFrame({"Subject_ID": ids(6), "grade": ["HGG", "LGG", "HGG", "HGG", "LGG", "HGG"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    from_frame, from_file = by_column(frame, "grade"), by_column(tmp_path / "t.csv", "grade")
    assert from_frame == from_file
    assert set(from_frame.train) == {"HGG", "LGG"}
    assert by_column(frame.set_index("Subject_ID"), "grade") == from_frame
    frame.loc[2, "grade"] = None
    with pytest.raises(DataError, match="row 3: grade is empty"):
        by_column(frame, "grade")
    with pytest.raises(DataError, match="no column scanner"):
        by_column(frame, "scanner")


def test_alpha_sets_how_unequal_the_sizes_are() -> None:
    def spread(alpha: float) -> float:
        return float(np.mean([by_dirichlet_size(ids(200), sites=8, alpha=alpha, seed=seed).table()["patients"].std()
                              for seed in range(20)]))

    assert spread(0.2) > 2 * spread(2.0) > 4 * spread(200.0)


def test_alpha_sets_how_mixed_the_types_are() -> None:
    kinds = {name: KINDS[number % 3] for number, name in enumerate(ids(240))}

    def purity(alpha: float) -> float:
        """The share of the most frequent type at a site, mean over sites weighted by patients."""
        partitions = [by_dirichlet_type(kinds, sites=4, alpha=alpha, seed=seed) for seed in range(10)]
        tops = [Counter(kinds[p] for p in (*partition.train[site], *partition.held_out[site])).most_common(1)[0][1]
                for partition in partitions for site in partition.train]
        return sum(tops) / (10 * 240)

    assert purity(0.1) > 0.6
    assert purity(1000.0) < 0.4  # a third, plus chance


def test_quantity_skew_orders_the_sites_and_keeps_the_smallest() -> None:
    sizes = by_quantity(ids(120), sites=6, skew=2.0, at_least=3).table()["patients"].tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 60 and sizes[-1] >= 3
    assert by_quantity(ids(120), sites=6, skew=0.0).table()["patients"].tolist() == [20] * 6


def test_scanner_skew_ranges_from_separate_to_mixed() -> None:
    scanners = {name: f"scanner {number % 4}" for number, name in enumerate(ids(200))}

    def own(skew: float) -> float:
        partition = by_scanner(scanners, skew=skew)
        assert partition.table()["patients"].tolist() == [50] * 4
        at = {p: site for site in partition.train for p in (*partition.train[site], *partition.held_out[site])}
        return float(np.mean([at[name] == scanner for name, scanner in scanners.items()]))

    assert own(1.0) == 1.0
    assert own(0.5) == pytest.approx(0.5 + 0.5 / 4, abs=0.1)  # a quarter of those that move return by chance
    assert own(0.0) == pytest.approx(0.25, abs=0.1)


def test_tumour_types_state_enhancement_and_terciles_of_volume() -> None:
    patients = []
    for number in range(7):
        label = torch.zeros(16, 16, 16, dtype=torch.uint8)
        label[:2 + number] = 2
        if number:
            label[0, 0, 0] = 4
        patients.append(Patient(f"p{number}", torch.zeros(4, 16, 16, 16), label, np.eye(4)))
    assert tumour_types(patients) == {"p0": "no enhancement", "p1": "small", "p2": "small", "p3": "medium",
                                      "p4": "medium", "p5": "large", "p6": "large"}
    with pytest.raises(DataError, match="p has no label"):
        tumour_types([Patient("p", torch.zeros(4, 2, 2, 2), None, np.eye(4))])


def test_apply_fills_the_sites() -> None:
    names = ids(6)
    patients = [blob_patient(name, seed=number) for number, name in enumerate(names)]
    partition = by_quantity(names, sites=2, skew=0.0, held_out=1)
    sites = partition.apply(patients)
    assert [[p.id for p in site.train] for site in sites] == [list(own) for own in partition.train.values()]
    assert [[p.id for p in site.val] for site in sites] == [list(own) for own in partition.held_out.values()]
    assert Partition.of(sites) == partition
    with pytest.raises(DataError, match="1 patients are missing: p005"):
        partition.apply(patients[:5])
    with pytest.raises(DataError, match="are at no site: other"):
        partition.apply([*patients, blob_patient("other", seed=0)])
    with pytest.raises(DataError, match="p000 is given twice"):
        partition.apply([*patients, patients[0]])


def test_a_saved_partition_comes_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    partition = by_dirichlet_size(ids(20), sites=3, alpha=1.0, same=[frozenset({"p001", "p002"})])
    partition.save(tmp_path / "p.json")
    loaded = Partition.load(tmp_path / "p.json")
    assert loaded == partition and loaded.how == partition.how and loaded.id == partition.id
    with pytest.raises(DataError, match="not overwritten"):
        partition.save(tmp_path / "p.json")
    note = json.loads((tmp_path / "p.json").read_text())
    note["sites"]["site-01"]["train"].append("someone")
    (tmp_path / "changed.json").write_text(json.dumps(note))
    with pytest.raises(DataError, match="it was changed"):
        Partition.load(tmp_path / "changed.json")
    for text in ("", "[]", "{}", '{"format": "fedlab-partition-1", "sites": 3}', '{"format": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="contains no partition"):
            Partition.load(tmp_path / "bad.json")


def test_the_id_identifies_the_assignment() -> None:
    one = Partition(train={"a": ("p1", "p2"), "b": ("p3",)}, held_out={"a": (), "b": ("p4",)})
    same = Partition(train={"b": ("p3",), "a": ("p2", "p1")}, held_out={"b": ("p4",), "a": ()}, how="another way")
    moved = Partition(train={"a": ("p1", "p2"), "b": ("p3", "p4")}, held_out={"a": (), "b": ()})
    assert one.id == same.id != moved.id


def test_a_partition_displays_itself() -> None:
    partition = Partition(train={"<b>": ("p1",)}, held_out={"<b>": ("p2",)})
    assert "patients  train  held out" in str(partition)
    assert partition.id in repr(partition)
    assert "&lt;b&gt;" in partition._repr_html_() and "<b>" not in partition._repr_html_()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: by_dirichlet_size(ids(5), sites=3, alpha=1.0), "need 6, got 5"),
    (lambda: by_dirichlet_size(ids(5), sites=0, alpha=1.0), "0 sites"),
    (lambda: by_dirichlet_size(ids(9), sites=3, alpha=0.0), "alpha must be between"),
    (lambda: by_quantity(ids(9), sites=3, skew=-1.0), "skew must be between"),
    (lambda: by_dirichlet_type(dict.fromkeys(ids(3), "x"), sites=2, alpha=1.0), "need 4, got 3"),
    (lambda: by_scanner(dict.fromkeys(ids(3), "x"), skew=2.0), "skew must be a share"),
    (lambda: by_quantity(["a", "a", "b", "c"], sites=2, skew=1.0), "a would be assigned twice"),
    (lambda: by_quantity(ids(4), sites=2, skew=1.0, same=[frozenset({"p000", "p001"}), frozenset({"p001", "p002"})]),
     "in two groups"),
])
def test_wrong_settings_say_what_to_do(call: Callable[[], Partition], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore:(?s).*no enhancing tumour")
def test_the_split_is_the_one_that_reading_a_folder_makes(real_scans: Path) -> None:
    from fedlab.data.readers.folders import read_sites

    folder = real_scans / "brats2021_2mm"
    sites = read_sites(folder, folder / "partitioning.csv", spacing_mm=8.0, held_out=0.5, seed=3, progress=False)
    assert Partition.of(sites) == by_institution(folder / "partitioning.csv", held_out=0.5, seed=3)


def test_split_patients_takes_ids_and_patients_alike() -> None:
    patients = blob_sites((6,))[0].train
    train, held = split_patients(patients, held_out=2, seed=5, site="s")
    assert split_patients([p.id for p in patients], held_out=2, seed=5, site="s") == (
        [p.id for p in train], [p.id for p in held])


def test_the_id_tells_who_is_held_out() -> None:
    one = Partition(train={"a": ("p", "q")}, held_out={"a": ("r",)})
    assert one.id != Partition(train={"a": ("p", "q")}, held_out={"a": ("s",)}).id
    assert one.id == Partition(train={"a": ("q", "p")}, held_out={"a": ("r",)}).id


def test_persons_stay_known_without_some_patients() -> None:
    whole = Partition(train={"a": ("p", "q"), "b": ("r",)}, held_out={"a": ("s",), "b": ()}, same=({"p", "q"},))
    assert whole.without(["r"]).same == whole.same and list(whole.without(["r"]).train) == ["a"]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_fraction_holds_out_that_share_of_the_persons_another_one_at_each_site(share: float) -> None:
    """Of 4,000, within six standard errors; what is held out at one site says nothing about another."""
    everyone = [f"p{k}" for k in range(4000)]
    held = {site: set(split_patients(everyone, held_out=share, seed=3, site=site)[1]) for site in ("bonn", "aachen")}
    error = 6 * (4000 * share * (1 - share)) ** 0.5
    assert all(abs(len(names) - 4000 * share) < error for names in held.values())
    assert abs(len(held["bonn"] & held["aachen"]) - 4000 * share**2) < error
