"""Which patients belong to which site, and which of them a site holds out."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.seeds import derive, generator
from fedlab.core.types import Patient, Site

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Partition", "by_column", "by_dirichlet_size", "by_dirichlet_type", "by_institution", "by_quantity",
           "by_scanner", "read_partitioning", "split_patients", "tumour_types"]

T = TypeVar("T")
#: Ids of one person; most have one.
Person = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Who is where: every patient at one site, to train on or held out. The functions `by_...` make one.

    Attributes:
        train: ids of the patients to train on, by site.
        held_out: ids of the others, by site; the same sites.
        same: ids that are one person, such as `fedlab.data.sites.fingerprint.same_person` finds; ids that are in no site
            don't matter.
        how: the call that made it.

    Raises:
        DataError: a patient, or a person, is at two sites or in two splits; a site without patients to train on.
    """

    train: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]
    same: tuple[frozenset[str], ...] = ()
    how: str = field(default="as given", compare=False)

    def __post_init__(self) -> None:
        if self.train.keys() != self.held_out.keys() or not self.train:
            raise DataError("train and held_out name the same sites, at least one; got "
                            f"{', '.join(self.train) or 'none'} and {', '.join(self.held_out) or 'none'}")
        problems = [f"site {site} has no patient to train on" for site, ids in self.train.items() if not ids]
        home: dict[str, tuple[str, str]] = {}
        for split, sites in (("to train on", self.train), ("held out", self.held_out)):
            for site, patient in ((site, patient) for site, ids in sites.items() for patient in ids):
                if patient in home:
                    problems.append(f"{patient} is at {_place(home[patient])} and at {_place((site, split))}")
                home[patient] = site, split
        for person in self.same:
            places = {home[patient]: patient for patient in sorted(person) if patient in home}
            if len(places) > 1:
                problems.append("one person is " + " and ".join(
                    f"{patient} at {_place(place)}" for place, patient in places.items()))
        if problems:
            raise DataError("a patient is at one site and in one split:\n"
                            + "\n".join(f"  - {problem}" for problem in problems)
                            + "\nname ids of one person as same= when the partition is made, or take some out with "
                            ".without([...])")

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for who is where; the same for the same assignment, however made."""
        members = {site: [sorted(self.train[site]), sorted(self.held_out[site])] for site in sorted(self.train)}
        return hashlib.sha256(json.dumps(members, ensure_ascii=False).encode()).hexdigest()[:12]

    @property
    def patients(self) -> list[str]:
        """All ids, site by site, those to train on first."""
        return [patient for site in self.train for patient in (*self.train[site], *self.held_out[site])]

    def table(self) -> pd.DataFrame:
        """A row a site: patients, to train on, held out."""
        import pandas as pd

        rows = {site: {"patients": len(self.train[site]) + len(self.held_out[site]), "train": len(self.train[site]),
                       "held out": len(self.held_out[site])} for site in self.train}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Partition:
        """The partition that these sites are.

        Raises:
            DataError: a patient at two sites or in two splits.
        """
        if twice := [name for name, count in Counter(site.name for site in sites).items() if count > 1]:
            raise DataError(f"two sites are called {', '.join(twice)}")
        return cls(train={site.name: tuple(patient.id for patient in site.train) for site in sites},
                   held_out={site.name: tuple(patient.id for patient in site.val) for site in sites})

    def without(self, patients: Iterable[str]) -> Partition:
        """The same partition without some patients; a site that loses all its patients to train on goes too."""
        gone = set(patients)
        train = {site: tuple(p for p in ids if p not in gone) for site, ids in self.train.items()}
        kept = [site for site, ids in train.items() if ids]
        return Partition(train={site: train[site] for site in kept}, same=self.same, how=self.how,
                         held_out={site: tuple(p for p in self.held_out[site] if p not in gone) for site in kept})

    def apply(self, patients: Iterable[Patient]) -> list[Site]:
        """The sites, filled with these patients.

        Raises:
            DataError: a patient of the partition is missing, one is there twice, or one is in no site.
        """
        found: dict[str, Patient] = {}
        for patient in patients:
            if patient.id in found:
                raise DataError(f"patient {patient.id} is there twice")
            found[patient.id] = patient
        wanted = set(self.patients)
        for what, ids, remedy in (("are missing", wanted - found.keys(), "leave them out with .without([...])"),
                                  ("are at no site", found.keys() - wanted, "leave them out of patients")):
            if ids:
                raise DataError(f"{len(ids)} patients {what}: {', '.join(sorted(ids)[:5])}"
                                f"{' ...' if len(ids) > 5 else ''}; {remedy}")
        return [Site(name=site, train=[found[patient] for patient in self.train[site]],
                     val=[found[patient] for patient in self.held_out[site]]) for site in self.train]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, with its `id`.

        Raises:
            DataError: the file exists already.
        """
        note = {"format": "fedlab-partition-1", "id": self.id, "how": self.how,
                "same": [sorted(person) for person in self.same],
                "sites": {site: {"train": self.train[site], "held_out": self.held_out[site]} for site in self.train}}
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                json.dump(note, file, indent=1, ensure_ascii=False)
        except FileExistsError as error:
            raise DataError(f"{path} exists already and is not overwritten; choose another name") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Partition:
        """Read what `save` wrote.

        Raises:
            DataError: it can't be read, or was changed since.
        """
        try:
            note = json.loads(Path(path).read_text(encoding="utf-8"))
            if note["format"] != "fedlab-partition-1":
                raise ValueError("not in the format fedlab-partition-1")
            train, held_out = ({str(site): tuple(map(str, both[split])) for site, both in note["sites"].items()}
                               for split in ("train", "held_out"))
            found = cls(train=train, held_out=held_out, how=str(note["how"]),
                        same=tuple(frozenset(map(str, person)) for person in note["same"]))
            if found.id != note["id"]:
                raise ValueError(f"its patients have the id {found.id}, but it says {note['id']}: it was changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no partition ({type(error).__name__}: {error}); expected a file that "
                            "Partition.save wrote") from error
        return found

    def __str__(self) -> str:
        return f"{self!r}\n{self.table().to_string()}"

    def __repr__(self) -> str:
        return (f"<Partition {self.id}: {len(self.patients)} patients at {len(self.train)} sites, "
                f"{sum(map(len, self.held_out.values()))} held out; {self.how}>")

    def _repr_html_(self) -> str:
        table: str = self.table().to_html()
        return f"<p>{escape(repr(self)[1:-1])}</p>{table}"


def _place(place: tuple[str, str]) -> str:
    return f"{place[0]} ({place[1]})"


def read_partitioning(table: str | os.PathLike[str], *, site_column: str = "Partition_ID",
                      patient_column: str = "Subject_ID") -> dict[str, list[str]]:
    """Which patients belong to which site, from a CSV table such as those of FeTS (Pati et al. 2022).

    Returns:
        Patient ids by site, sites in the order of their numbers or names, ids in the order of the table.

    Raises:
        DataError: the table can't be read, lacks a column, has empty cells, or lists a patient twice.
    """
    table = Path(table)
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            rows = [(reader.line_num, dict(zip(columns, row.values(), strict=False))) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV table in UTF-8 ({error})") from error
    return _gather(table, "line", columns, rows, site_column, patient_column)


def _gather(table: object, unit: str, columns: Sequence[str], rows: Sequence[tuple[int, Mapping[str, str]]],
            site_column: str, patient_column: str) -> dict[str, list[str]]:
    if missing := [name for name in (site_column, patient_column) if name not in columns]:
        raise DataError(f"{table}: no column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}; rename "
                        f"them, or say site_column= and patient_column=")
    sites: dict[str, list[str]] = {}
    home: dict[str, tuple[str, int]] = {}
    problems: list[str] = []
    for line, row in rows:
        site, patient = ((row.get(name) or "").strip() for name in (site_column, patient_column))
        if not site or not patient:
            problems.append(f"{unit} {line}: {site_column if not site else patient_column} is empty")
        elif patient in home:
            other, earlier = home[patient]
            problems.append(f"{unit} {line}: {patient} stands at site {site}, and on {unit} {earlier} at site {other}")
        else:
            home[patient] = site, line
            sites.setdefault(site, []).append(patient)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(f"{table}: a patient belongs to exactly one site:\n{listing}")
    if not sites:
        raise DataError(f"{table}: no row below its heading; expected one a patient")
    return {site: sites[site] for site in sorted(sites, key=_by_number)}


def _by_number(site: str) -> tuple[int, int, str]:
    return (0, int(site), site) if site.isdecimal() and len(site) < 19 else (1, 0, site)


def split_patients(patients: Sequence[T], *, held_out: float, seed: int, site: str) -> tuple[list[T], list[T]]:
    """Patients to train on and held-out ones, drawn at random per (seed, site).

    Args:
        patients: of one site; or their ids, or groups of ids.
        held_out: below 1 a fraction, rounded, at least one patient unless 0; from 1 on a number of patients.
            At least one patient always stays for training.
        seed: of the run.
        site: name of the site.

    Raises:
        ValueError: `held_out` is negative, or above 1 and no whole number.
    """
    if held_out < 0 or (held_out > 1 and held_out != int(held_out)):
        raise ValueError(f"held_out is a fraction below 1 or a whole number of patients, got {held_out}")
    count = int(held_out) if held_out >= 1 else max(round(held_out * len(patients)), 1 if held_out else 0)
    count = min(count, len(patients) - 1)
    order = torch.randperm(len(patients), generator=generator(seed, "split", site)).tolist()
    chosen = set(order[:max(count, 0)])
    return ([p for i, p in enumerate(patients) if i not in chosen], [p for i, p in enumerate(patients) if i in chosen])


def by_institution(table: str | os.PathLike[str], *, held_out: float = 0.2, seed: int = 0,
                   same: Sequence[frozenset[str]] = ()) -> Partition:
    """Sites as in a table of institutions such as FeTS has, with the columns Partition_ID and Subject_ID.

    Args:
        table: a CSV file.
        held_out: fraction or number of patients that each site holds out, see `split_patients`.
        seed: of the split.
        same: groups of ids that are one person.

    Raises:
        DataError: see `read_partitioning` and `Partition`.
    """
    how = f"by_institution({Path(table).name!r}, held_out={held_out}, seed={seed})"
    return _finished(read_partitioning(table), how=how, held_out=held_out, seed=seed, same=same)


def by_column(table: str | os.PathLike[str] | pd.DataFrame, column: str, *, patient_column: str = "Subject_ID",
              held_out: float = 0.2, seed: int = 0, same: Sequence[frozenset[str]] = ()) -> Partition:
    """A site for each value of a column: scanner, country, grade, whatever a table of patients has.

    Args:
        table: a CSV file or a data frame, a row a patient.
        column: whose values become the sites.
        patient_column: the patients' ids. The rest as in `by_institution`.

    Raises:
        DataError: see `read_partitioning` and `Partition`.
    """
    if isinstance(table, str | os.PathLike):
        name = repr(Path(table).name)
        sites = read_partitioning(table, site_column=column, patient_column=patient_column)
    else:
        frame = table.reset_index() if patient_column not in table and table.index.name == patient_column else table
        text = frame.astype(object).where(frame.notna(), "").astype(str)
        rows = [(number, {str(key): str(value) for key, value in row.items()})
                for number, row in enumerate(text.to_dict("records"), start=1)]
        name, sites = "table", _gather("the table", "row", list(map(str, frame.columns)), rows, column, patient_column)
    how = f"by_column({name}, {column!r}, held_out={held_out}, seed={seed})"
    return _finished(sites, how=how, held_out=held_out, seed=seed, same=same)


def by_dirichlet_size(patients: Iterable[str], *, sites: int, alpha: float, at_least: int = 2, held_out: float = 0.2,
                      seed: int = 0, same: Sequence[frozenset[str]] = ()) -> Partition:
    """Patients dealt at random to sites whose sizes are drawn from a Dirichlet distribution.

    Args:
        patients: their ids.
        sites: how many.
        alpha: concentration; large for sites of one size, 0.1 for a few large ones and many small ones.
        at_least: patients of the smallest site. The rest as in `by_institution`.

    Raises:
        ValueError: too few patients, or alpha out of range.
    """
    people = _people(patients, same)
    _check_sites(sites, len(people), at_least)
    rng = np.random.default_rng(derive(seed, "partition", "dirichlet size"))
    sizes = _sizes_from(_dirichlet(rng, alpha, sites), len(people), at_least)
    how = (f"by_dirichlet_size(patients, sites={sites}, alpha={alpha}, at_least={at_least}, held_out={held_out}, "
           f"seed={seed})")
    return _finished(_flat(_dealt(people, sizes, rng)), how=how, held_out=held_out, seed=seed, same=same)


def by_quantity(patients: Iterable[str], *, sites: int, skew: float, at_least: int = 2, held_out: float = 0.2,
                seed: int = 0, same: Sequence[frozenset[str]] = ()) -> Partition:
    """Patients dealt at random to sites of unequal size: the k-th site in proportion to k to the power of -skew.

    Args:
        patients: their ids.
        sites: how many, the largest first.
        skew: 0 for equal sizes; the 17 institutions of FeTS 2021 fall off about as with 1.2.
        at_least: patients of the smallest site. The rest as in `by_institution`.

    Raises:
        ValueError: too few patients, or a negative skew.
    """
    if not 0.0 <= skew <= 10.0:
        raise ValueError(f"skew lies between 0 and 10, got {skew}")
    people = _people(patients, same)
    _check_sites(sites, len(people), at_least)
    sizes = _sizes_from(np.arange(1, sites + 1, dtype=np.float64) ** -skew, len(people), at_least)
    how = f"by_quantity(patients, sites={sites}, skew={skew}, at_least={at_least}, held_out={held_out}, seed={seed})"
    rng = np.random.default_rng(derive(seed, "partition", "quantity"))
    return _finished(_flat(_dealt(people, sizes, rng)), how=how, held_out=held_out, seed=seed, same=same)


def by_dirichlet_type(types: Mapping[str, str], *, sites: int, alpha: float, at_least: int = 2, held_out: float = 0.2,
                      seed: int = 0, same: Sequence[frozenset[str]] = ()) -> Partition:
    """Sites that see different kinds of patients: each kind is spread over the sites by its own Dirichlet draw.

    As Yurochkin et al. 2019 (arXiv:1905.12022) do with classes of pictures. Sites that come out with fewer than
    `at_least` patients get some of the largest site's.

    Args:
        types: a kind for each id: `tumour_types(...)`, or a grade from a table. Ids of one person count as the kind
            of the first.
        sites: how many.
        alpha: concentration; 100 gives every site the same mixture, 0.1 hardly more than one kind a site.
        at_least: patients of the smallest site. The rest as in `by_institution`.

    Raises:
        ValueError: too few patients, or alpha out of range.
    """
    people = _people(types, same)
    rng = np.random.default_rng(derive(seed, "partition", "dirichlet type"))
    _check_sites(sites, len(people), at_least)
    homes: dict[str, list[Person]] = {name: [] for name in _names(sites)}
    for kind in sorted({types[person[0]] for person in people}):
        of_kind = [person for person in people if types[person[0]] == kind]
        sizes = _sizes_from(_dirichlet(rng, alpha, sites), len(of_kind), 0)
        for name, dealt in _dealt(of_kind, sizes, rng).items():
            homes[name] += dealt
    while len(poorest := min(homes.values(), key=len)) < at_least:
        poorest.append(max(homes.values(), key=len).pop())
    how = (f"by_dirichlet_type(types, sites={sites}, alpha={alpha}, at_least={at_least}, held_out={held_out}, "
           f"seed={seed})")
    return _finished(_flat(homes), how=how, held_out=held_out, seed=seed, same=same)


def by_scanner(scanners: Mapping[str, str], *, skew: float, held_out: float = 0.2, seed: int = 0,
               same: Sequence[frozenset[str]] = ()) -> Partition:
    """As many sites as scanners, of the scanners' sizes, from one scanner each to all mixed.

    For generated cohorts, where a site is a scanner: `by_scanner({p.id: site.name for site in cohort for p in
    (*site.train, *site.val)}, skew=0.5)`. A share of 1 - skew of all patients, drawn at random, swap places.

    Args:
        scanners: the scanner of each id; ids of one person count as the first's.
        skew: 1 leaves each scanner a site of its own, 0 mixes them. The rest as in `by_institution`.

    Raises:
        ValueError: skew outside [0, 1].
    """
    if not 0.0 <= skew <= 1.0:
        raise ValueError(f"skew is a share between 0 and 1, got {skew}")
    people = _people(scanners, same)
    rng = np.random.default_rng(derive(seed, "partition", "scanner"))
    names = [scanners[person[0]] for person in people]
    moving = rng.permutation(len(people))[:round((1 - skew) * len(people))]
    for place, source in zip(moving, rng.permutation(moving), strict=True):
        names[place] = scanners[people[source][0]]
    homes = {name: [person for person, home in zip(people, names, strict=True) if home == name]
             for name in sorted(set(names), key=_by_number)}
    how = f"by_scanner(scanners, skew={skew}, held_out={held_out}, seed={seed})"
    return _finished(_flat(homes), how=how, held_out=held_out, seed=seed, same=same)


def tumour_types(patients: Iterable[Patient]) -> dict[str, str]:
    """A kind of tumour for each patient: "no enhancement", else "small", "medium" or "large".

    The sizes are thirds of the whole-tumour volumes of the patients whose tumour enhances.

    Raises:
        DataError: a patient without a label.
    """
    volumes: dict[str, float] = {}
    types: dict[str, str] = {}
    for patient in patients:
        if patient.label is None:
            raise DataError(f"patient {patient.id} has no label, so no type of tumour")
        types[patient.id] = "no enhancement"
        if (patient.label == 4).any():
            volumes[patient.id] = int((patient.label > 0).sum()) * float(np.prod(patient.spacing_mm))
    for rank, name in enumerate(sorted(volumes, key=lambda each: (volumes[each], each))):
        types[name] = ("small", "medium", "large")[3 * rank // len(volumes)]
    return types


def _people(patients: Iterable[str], same: Sequence[frozenset[str]]) -> list[Person]:
    """Ids by person, in the order given.

    Raises:
        DataError: an id twice, or in two persons.
    """
    ids = list(patients)
    group: dict[str, frozenset[str]] = {}
    for person in same:
        for patient in person:
            if patient in group:
                raise DataError(f"{patient} is in two groups of same=; join them")
            group[patient] = person
    if twice := [patient for patient, count in Counter(ids).items() if count > 1]:
        raise DataError(f"{', '.join(twice[:5])} would be dealt twice; give each patient once")
    people: dict[str | frozenset[str], Person] = {}
    for patient in ids:
        key = group.get(patient, patient)
        people[key] = (*people.get(key, ()), patient)
    return list(people.values())


def _names(sites: int) -> list[str]:
    return [f"site-{number:02d}" for number in range(1, sites + 1)]


def _check_sites(sites: int, people: int, at_least: int) -> None:
    if sites < 1 or at_least < 1 or people < sites * at_least:
        raise ValueError(f"{sites} sites of at least {at_least} patients need {sites * at_least}, got {people}; both "
                         "are 1 or more; lower them")


def _dirichlet(rng: np.random.Generator, alpha: float, sites: int) -> NDArray[np.float64]:
    if not 0.01 <= alpha <= 1e6:
        raise ValueError(f"alpha lies between 0.01 and 1e6, got {alpha}")
    return rng.dirichlet(np.full(sites, alpha))


def _sizes_from(shares: NDArray[np.float64], people: int, at_least: int) -> list[int]:
    """Whole sizes: `at_least` for everyone, the rest in proportion, the largest remainders rounded up."""
    rest = people - len(shares) * at_least
    wanted = shares / shares.sum() * rest
    sizes = np.floor(wanted).astype(int)
    sizes[np.argsort(sizes - wanted, kind="stable")[:rest - int(sizes.sum())]] += 1
    return [int(size) + at_least for size in sizes]


def _dealt(people: Sequence[Person], sizes: Sequence[int], rng: np.random.Generator) -> dict[str, list[Person]]:
    order = iter(rng.permutation(len(people)).tolist())
    return {name: [people[next(order)] for _ in range(size)]
            for name, size in zip(_names(len(sizes)), sizes, strict=True)}


def _ids(people: Iterable[Person]) -> tuple[str, ...]:
    return tuple(patient for person in people for patient in person)


def _flat(homes: Mapping[str, Sequence[Person]]) -> dict[str, tuple[str, ...]]:
    return {site: _ids(people) for site, people in homes.items()}


def _finished(sites: Mapping[str, Iterable[str]], *, how: str, held_out: float, seed: int,
              same: Sequence[frozenset[str]]) -> Partition:
    """Each site's people split, whole persons at a time."""
    train: dict[str, tuple[str, ...]] = {}
    rest: dict[str, tuple[str, ...]] = {}
    for site, members in sites.items():
        kept, held = split_patients(_people(members, same), held_out=held_out, seed=seed, site=site)
        train[site], rest[site] = _ids(kept), _ids(held)
    return Partition(train=train, held_out=rest, same=tuple(same), how=how)
