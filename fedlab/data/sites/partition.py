"""Which patients belong to which site, and which of them a site holds out."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.files import write_new
from fedlab.core.seeds import derive
from fedlab.core.text import counted
from fedlab.core.types import Patient, Site
from fedlab.data.readers.findings import bullets
from fedlab.data.sites.persons import (
    FoundPerson,
    Person,
    at_site,
    group_by_person,
    person_of,
    persons_apart,
    prepared_by,
    several_scans,
)
from fedlab.data.sites.site_table import Groups, by_number, group_by_site, read_site_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Partition", "by_column", "by_dirichlet_size", "by_dirichlet_type", "by_institution",
           "by_quantity", "by_scanner", "sizes_from_shares", "split_patients", "tumour_types"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """An assignment of every patient to one site and one split. The functions `by_...` create it.

    All scans of a person are at one site and in one split. Who a scan is of is known from ids such as
    BraTS-GLI-00005-101 (see `fedlab.data.sites.persons`) and from `same`.

    Attributes:
        train: ids of the patients to train on, by site.
        held_out: ids of the held-out patients, by site; the same sites.
        same: further groups of ids that belong to one person, for example from
            `fedlab.data.sites.fingerprint.same_person`; ids that are at no site are ignored.
        how: the call that created it.

    Raises:
        DataError: a patient, or a person, is at two sites or in two splits; a site has no patient to train on.
    """

    train: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]
    same: Groups = ()
    how: str = field(default="as given", compare=False)

    def __post_init__(self) -> None:
        if self.train.keys() != self.held_out.keys() or not self.train:
            raise DataError("train and held_out must name the same sites, at least one; got "
                            f"{', '.join(self.train) or 'none'} and {', '.join(self.held_out) or 'none'}")
        problems = [f"site {site} has no patient to train on" for site, ids in self.train.items() if not ids]
        place_of: dict[str, str] = {}
        for split, sites in (("to train on", self.train), ("held out", self.held_out)):
            for site, patient in ((site, patient) for site, ids in sites.items() for patient in ids):
                place = f"{site} ({split})"
                if patient in place_of:
                    problems.append(f"{patient} is at {place_of[patient]} and at {place}")
                place_of[patient] = place
        if problems := problems + persons_apart(place_of, self.same):
            raise DataError(f"every patient must be at one site and in one split:\n{bullets(problems)}\npass the ids "
                            "of one person as same= when the partition is created, or remove some with "
                            ".without([...])")

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that identify the assignment, independent of how it was created."""
        members = {site: [sorted(self.train[site]), sorted(self.held_out[site])] for site in sorted(self.train)}
        return hashlib.sha256(json.dumps(members, ensure_ascii=False).encode()).hexdigest()[:12]

    @property
    def patients(self) -> list[str]:
        """All ids, site by site, those to train on first."""
        return [patient for site in self.train for patient in (*self.train[site], *self.held_out[site])]

    def table(self) -> pd.DataFrame:
        """One row per site: number of patients, to train on, held out."""
        import pandas as pd

        rows = {site: {"patients": len(self.train[site]) + len(self.held_out[site]), "train": len(self.train[site]),
                       "held out": len(self.held_out[site])} for site in self.train}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Partition:
        """The partition of existing sites.

        Raises:
            DataError: a patient at two sites or in two splits.
        """
        if twice := _twice(site.name for site in sites):
            raise DataError(f"two sites are named {', '.join(twice)}")
        return cls(train={site.name: tuple(patient.id for patient in site.train) for site in sites},
                   held_out={site.name: tuple(patient.id for patient in site.val) for site in sites},
                   same=tuple(person for site in sites for person in site.same))

    def without(self, patients: Iterable[str]) -> Partition:
        """The same partition without some patients; a site without patients to train on is removed too."""
        gone = set(patients)
        train = {site: tuple(p for p in ids if p not in gone) for site, ids in self.train.items()}
        kept = [site for site, ids in train.items() if ids]
        return Partition(train={site: train[site] for site in kept}, same=self.same, how=self.how,
                         held_out={site: tuple(p for p in self.held_out[site] if p not in gone) for site in kept})

    def apply(self, patients: Iterable[Patient]) -> list[Site]:
        """The sites of the partition, filled with these patients.

        Raises:
            DataError: a patient of the partition is missing, one is given twice, or one is at no site.
        """
        given = list(patients)
        found = {patient.id: patient for patient in given}
        if twice := _twice(patient.id for patient in given):
            raise DataError(f"patient {twice[0]} is given twice")
        wanted = set(self.patients)
        for what, ids, remedy in (("are missing", wanted - found.keys(), "remove them with .without([...])"),
                                  ("are at no site", found.keys() - wanted, "remove them from patients")):
            if ids:
                raise DataError(f"{len(ids)} patients {what}: {', '.join(sorted(ids)[:5])}"
                                f"{' ...' if len(ids) > 5 else ''}; {remedy}")
        return [Site(name=site, train=[found[patient] for patient in self.train[site]],
                     val=[found[patient] for patient in self.held_out[site]],
                     same=at_site(self.same, (*self.train[site], *self.held_out[site])),
                     remarks=prepared_by(self.same)) for site in self.train]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the partition as JSON, with its `id`.

        Raises:
            DataError: the file exists already.
        """
        note = {"format": "fedlab-partition-1", "id": self.id, "how": self.how,
                "same": [sorted(person) for person in self.same],
                "found": [isinstance(person, FoundPerson) for person in self.same],
                "sites": {site: {"train": self.train[site], "held_out": self.held_out[site]} for site in self.train}}
        write_new(path, json.dumps(note, indent=1, ensure_ascii=False).encode(), error=DataError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Partition:
        """Reads what `save` wrote.

        Raises:
            DataError: the file cannot be read, or was changed since.
        """
        try:
            note = json.loads(Path(path).read_text(encoding="utf-8"))
            if note["format"] != "fedlab-partition-1":
                raise ValueError("not in the format fedlab-partition-1")
            train, held_out = ({str(site): tuple(map(str, both[split])) for site, both in note["sites"].items()}
                               for split in ("train", "held_out"))
            found = cls(train=train, held_out=held_out, how=str(note["how"]),
                        same=tuple((FoundPerson if found else frozenset)(map(str, person)) for person, found in zip(
                            note["same"], note.get("found", repeat(False)), strict=False)))
            if found.id != note["id"]:
                raise ValueError(f"its patients have the id {found.id}, the file states {note['id']}: it was changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} contains no partition ({type(error).__name__}: {error}); expected a file written "
                            "by Partition.save") from error
        return found

    def __str__(self) -> str:
        return f"{self!r}\n{self.table().to_string()}"

    def __repr__(self) -> str:
        several = len(several_scans(self.patients, self.same))
        persons = f"; {several} persons with several scans, kept together" if several else ""
        patients, sites = counted(len(self.patients), "patient"), counted(len(self.train), "site")
        return (f"<Partition {self.id}: {patients} at {sites}, "
                f"{sum(map(len, self.held_out.values()))} held out; {self.how}{persons}>")

    def _repr_html_(self) -> str:
        table: str = self.table().to_html()
        return f"<p>{escape(repr(self)[1:-1])}</p>{table}"


def split_patients(patients: Sequence[T], *, held_out: float, seed: int, site: str, same: Groups = (),
                   at_least: int = 1) -> tuple[list[T], list[T]]:
    """Patients to train on and held-out patients, by a hash of the person, the seed and the site.

    With a fraction each person is held out with that probability, independently of all others: who joins or leaves the
    site moves no other patient between training and held-out patients, as a guarantee per patient needs. Two exceptions
    concern small sites: where the hash holds out fewer than `at_least`, the next ones are held out too, and one person
    always remains for training. A *number* of persons, the first ones by their hash, depends on who else is there.

    Args:
        patients: of one site, or their ids. All scans of one person, by their ids or by `same`, are kept together.
        held_out: below 1 a fraction of the persons; from 1 upwards a number of persons.
        seed, site: enter the hash.
        same: groups of ids that belong to one person.
        at_least: persons that a fraction above 0 holds out, of two or more; 0 where a guarantee per patient must hold
            for small sites too.

    Raises:
        ValueError: `held_out` is negative, or above 1 and not a whole number.
    """
    if held_out < 0 or (held_out > 1 and held_out != int(held_out)):
        raise ValueError(f"held_out must be a fraction below 1 or a whole number of patients, got {held_out}")
    ids = [str(getattr(patient, "id", patient)) for patient in patients]
    ranked = sorted((derive(seed, "held", site, min(person_of(each) or each for each in person)), person)
                    for person in group_by_person(ids, same))
    count = int(held_out)
    if held_out < 1:
        drawn = sum(place < held_out * 2**63 for place, _ in ranked)  # of 63 random bits
        count = max(drawn, at_least if held_out else 0)
    chosen = {patient for _, person in ranked[:max(min(count, len(ranked) - 1), 0)] for patient in person}
    return ([p for p, own in zip(patients, ids, strict=True) if own not in chosen],
            [p for p, own in zip(patients, ids, strict=True) if own in chosen])


def by_institution(table: str | os.PathLike[str], *, held_out: float = 0.2, seed: int = 0,
                   same: Groups = ()) -> Partition:
    """The sites of a table of institutions such as that of FeTS, with the columns Partition_ID and Subject_ID.

    Args:
        table: a CSV file; see `read_site_table`.
        held_out: fraction or number of patients that each site holds out, see `split_patients`.
        seed: of the split.
        same: groups of ids that belong to one person, in addition to those that ids and table state.

    Raises:
        DataError: see `read_site_table` and `Partition`.
    """
    sites, persons = read_site_table(table)
    return _partition(sites, f"by_institution({Path(table).name!r}", {}, held_out, seed, (*persons, *same))


def by_column(table: str | os.PathLike[str] | pd.DataFrame, column: str, *, patient_column: str = "Subject_ID",
              held_out: float = 0.2, seed: int = 0, same: Groups = ()) -> Partition:
    """One site per value of a column: scanner, country, grade, or any other column of a table of patients.

    Args:
        table: a CSV file or a data frame, one row per patient.
        column: its values become the sites.
        patient_column: the patients' ids.
        held_out, seed, same: as in `by_institution`.

    Raises:
        DataError: see `read_site_table` and `Partition`.
    """
    if isinstance(table, str | os.PathLike):
        name = repr(Path(table).name)
        sites, persons = read_site_table(table, site_column=column, patient_column=patient_column)
    else:
        frame = table.reset_index() if patient_column not in table and table.index.name == patient_column else table
        text = frame.astype(object).where(frame.notna(), "").astype(str)
        rows = [(number, {str(key): str(value) for key, value in row.items()})
                for number, row in enumerate(text.to_dict("records"), start=1)]
        name, (sites, persons) = "table", group_by_site("the table", "row", [*map(str, text.columns)], rows, column,
                                                        patient_column)
    return _partition(sites, f"by_column({name}, {column!r}", {}, held_out, seed, (*persons, *same))


def by_dirichlet_size(patients: Iterable[str], *, sites: int, alpha: float, at_least: int = 2, held_out: float = 0.2,
                      seed: int = 0, same: Groups = ()) -> Partition:
    """Patients assigned at random to sites whose sizes follow a Dirichlet distribution.

    Args:
        patients: their ids.
        alpha: concentration; a large value gives sites of equal size, 0.1 a few large and many small ones.
        at_least: patients of the smallest site.
        held_out, seed, same: as in `by_institution`.

    Raises:
        ValueError: too few patients, or alpha out of range.
    """
    people = _people(patients, same, sites=sites, at_least=at_least)
    rng = _random(seed, "dirichlet size")
    sizes = sizes_from_shares(_dirichlet(rng, alpha, sites), len(people), at_least)
    return _partition(_assign(people, sizes, rng), "by_dirichlet_size(patients",
                      {"sites": sites, "alpha": alpha, "at_least": at_least}, held_out, seed, same)


def by_quantity(patients: Iterable[str], *, sites: int, skew: float, at_least: int = 2, held_out: float = 0.2,
                seed: int = 0, same: Groups = ()) -> Partition:
    """Patients assigned at random to sites of unequal size: the k-th site in proportion to k to the power of -skew.

    Args:
        patients: their ids; the first site is the largest.
        skew: 0 for equal sizes; the sizes of the 17 institutions of FeTS 2021 fall off about as with 1.2.
        at_least: patients of the smallest site.
        held_out, seed, same: as in `by_institution`.

    Raises:
        ValueError: too few patients, or skew out of range.
    """
    if not 0.0 <= skew <= 10.0:
        raise ValueError(f"skew must be between 0 and 10, got {skew}")
    people = _people(patients, same, sites=sites, at_least=at_least)
    sizes = sizes_from_shares(np.arange(1, sites + 1, dtype=np.float64) ** -skew, len(people), at_least)
    return _partition(_assign(people, sizes, _random(seed, "quantity")), "by_quantity(patients",
                      {"sites": sites, "skew": skew, "at_least": at_least}, held_out, seed, same)


def by_dirichlet_type(types: Mapping[str, str], *, sites: int, alpha: float, at_least: int = 2, held_out: float = 0.2,
                      seed: int = 0, same: Groups = ()) -> Partition:
    """Sites with different types of patients: each type is spread over the sites by its own Dirichlet draw.

    As in Yurochkin et al. 2019 (arXiv:1905.12022) for classes of images. Sites that would have fewer than
    `at_least` patients receive some from the largest site.

    Args:
        types: the type of each id, for example from `tumour_types` or a grade from a table. Ids of one person count
            as the type of the first.
        alpha: concentration; 100 gives every site the same mixture, 0.1 little more than one type per site.
        at_least: patients of the smallest site.
        held_out, seed, same: as in `by_institution`.

    Raises:
        ValueError: too few patients, or alpha out of range.
    """
    people = _people(types, same, sites=sites, at_least=at_least)
    rng = _random(seed, "dirichlet type")
    members: dict[str, list[Person]] = {name: [] for name in _names(sites)}
    for kind in sorted({types[person[0]] for person in people}):
        of_kind = [person for person in people if types[person[0]] == kind]
        sizes = sizes_from_shares(_dirichlet(rng, alpha, sites), len(of_kind), 0)
        for name, assigned in _assign(of_kind, sizes, rng).items():
            members[name] += assigned
    while len(smallest := min(members.values(), key=len)) < at_least:
        smallest.append(max(members.values(), key=len).pop())
    return _partition(members, "by_dirichlet_type(types",
                      {"sites": sites, "alpha": alpha, "at_least": at_least}, held_out, seed, same)


def by_scanner(scanners: Mapping[str, str], *, skew: float, held_out: float = 0.2, seed: int = 0,
               same: Groups = ()) -> Partition:
    """As many sites as scanners, with the scanners' numbers of patients, from separate to fully mixed.

    For generated patients, where every site has its own scanner: `by_scanner({p.id: site.name for site in sites for p
    in (*site.train, *site.val)}, skew=0.5)`. A share of 1 - skew of all patients, drawn at random, exchange places.

    Args:
        scanners: the scanner of each id; ids of one person count as that of the first.
        skew: 1 gives each scanner its own site, 0 mixes them.
        held_out, seed, same: as in `by_institution`.

    Raises:
        ValueError: skew outside [0, 1].
    """
    if not 0.0 <= skew <= 1.0:
        raise ValueError(f"skew must be a share between 0 and 1, got {skew}")
    people = _people(scanners, same)
    rng = _random(seed, "scanner")
    names = [scanners[person[0]] for person in people]
    moving = rng.permutation(len(people))[:round((1 - skew) * len(people))]
    for place, source in zip(moving, rng.permutation(moving), strict=True):
        names[place] = scanners[people[source][0]]
    members = {name: [person for person, own in zip(people, names, strict=True) if own == name]
               for name in sorted(set(names), key=by_number)}
    return _partition(members, "by_scanner(scanners", {"skew": skew}, held_out, seed, same)


def tumour_types(patients: Iterable[Patient]) -> dict[str, str]:
    """The type of each patient's tumour: "no enhancement", or by its size "small", "medium" or "large".

    The sizes are terciles of the whole-tumour volume among the patients with enhancing tumour.

    Raises:
        DataError: a patient without a label.
    """
    volumes: dict[str, float] = {}
    types: dict[str, str] = {}
    for patient in patients:
        if patient.label is None:
            raise DataError(f"patient {patient.id} has no label and therefore no type of tumour")
        types[patient.id] = "no enhancement"
        if (patient.label == 4).any():
            volumes[patient.id] = int((patient.label > 0).sum()) * float(np.prod(patient.spacing_mm))
    for rank, name in enumerate(sorted(volumes, key=lambda each: (volumes[each], each))):
        types[name] = ("small", "medium", "large")[3 * rank // len(volumes)]
    return types


def sizes_from_shares(shares: NDArray[np.float64], people: int, at_least: int) -> list[int]:
    """Whole sizes that sum to `people`: `at_least` each, the rest in proportion, the largest remainders rounded up."""
    rest = people - len(shares) * at_least
    wanted = shares / shares.sum() * rest
    sizes = np.floor(wanted).astype(int)
    sizes[np.argsort(sizes - wanted, kind="stable")[:rest - int(sizes.sum())]] += 1
    return [int(size) + at_least for size in sizes]


def _people(patients: Iterable[str], same: Groups, *, sites: int = 1, at_least: int = 1) -> list[Person]:
    """Ids by person, in the given order.

    Raises:
        DataError: an id occurs twice, or belongs to two groups.
        ValueError: too few persons for the sites.
    """
    ids = list(patients)
    for what, remedy, names in (("would be assigned twice", "give each patient once", ids),
                                ("is in two groups of same=", "join them", [p for person in same for p in person])):
        if twice := _twice(names):
            raise DataError(f"{', '.join(twice[:5])} {what}; {remedy}")
    people = group_by_person(ids, same)
    if sites < 1 or at_least < 1 or len(people) < sites * at_least:
        raise ValueError(f"{sites} sites of at least {at_least} patients need {sites * at_least}, got {len(people)}; "
                         "both must be 1 or more; lower them")
    return people


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _random(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "partition", name))


def _dirichlet(rng: np.random.Generator, alpha: float, sites: int) -> NDArray[np.float64]:
    if not 0.01 <= alpha <= 1e6:
        raise ValueError(f"alpha must be between 0.01 and 1e6, got {alpha}")
    return rng.dirichlet(np.full(sites, alpha))


def _assign(people: Sequence[Person], sizes: Sequence[int], rng: np.random.Generator) -> dict[str, list[Person]]:
    """Persons in random order to sites of these sizes."""
    order = iter(rng.permutation(len(people)).tolist())
    return {name: [people[next(order)] for _ in range(size)]
            for name, size in zip(_names(len(sizes)), sizes, strict=True)}


def _names(sites: int) -> list[str]:
    return [f"site-{number:02d}" for number in range(1, sites + 1)]


def _partition(sites: Mapping[str, Iterable[str | Person]], call: str, settings: Mapping[str, object],
               held_out: float, seed: int, same: Groups) -> Partition:
    """The patients of each site split, the ids of a person together.

    Args:
        sites: the ids, or the persons, of each site.
        call: the beginning of the call that is recorded, without its settings.
    """
    splits = {}
    for site, members in sites.items():
        ids = [patient for member in members for patient in ((member,) if isinstance(member, str) else member)]
        splits[site] = split_patients(ids, held_out=held_out, seed=seed, site=site, same=same)
    shown = ", ".join(f"{name}={value}" for name, value in {**settings, "held_out": held_out, "seed": seed}.items())
    return Partition(train={site: tuple(kept) for site, (kept, _) in splits.items()},
                     held_out={site: tuple(held) for site, (_, held) in splits.items()}, same=tuple(same),
                     how=f"{call}, {shown})")
