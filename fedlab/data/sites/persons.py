"""Which scans are of one person: what ids say in the data sets that number the scans of a person.

A person who is trained on in one scan and held out in another makes every score too good, and has a larger privacy
loss than is stated. An id of another form says nothing about its person, and nothing is guessed: a column `person` in
the table of sites, or `same=` where a partition is made, states it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from fedlab.core.types import Site

__all__ = ["FoundPerson", "Person", "at_site", "check_one_scan_each", "group_by_person", "in_columns", "name_several",
           "person_of", "persons_apart", "prepared_by", "several_scans"]

#: The ids of one person; most have one.
Person = tuple[str, ...]
#: The part of an id that names the person: BraTS 2023 and later (BraTS-GLI-00005-101), UCSF-PDGM-0429_FU003d,
#: UPENN-GBM-00001_21, UCSD-PTGBM-0002_01, RHUH-0001_0, TCGA-02-0003_..., CPTAC (C3L-00016_...), BIDS (sub-01_ses-02).
_PERSON = re.compile(r"(BraTS-[A-Z]+-(?:RT-)?\d{4,5}|UCSF-PDGM-\d{3,4}|UPENN-GBM-\d{5}|UCSD-PTGBM-\d{4}"
                     r"|RHUH-\d{4}|TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5}|sub-[A-Z0-9]+)(?![A-Z0-9]).*",
                     re.IGNORECASE)
#: An id that says in a word or by a date that it is one of several scans: 100001_time2 (UCSF-ALPTDG), PatientID_0003_
#: Timepoint_1 (MU-Glioma-Post), Patient-001_week-044 (LUMIERE), YG_A1_2010-01-31.
_SESSION = re.compile(r"(.*\d.*?)[-_. ](?:(?:ses(?:sion)?|time(?:[-_ ]?point)?|tp|visit|week|month|fu)[-_ ]?\d{1,4}"
                      r"(?:[-_]\d)?|baseline|follow[-_ ]?up|(?:pre|post)[-_ ]?op"
                      r"|(?:19|20)\d\d[-_.][01]\d[-_.][0-3]\d)", re.IGNORECASE)


class FoundPerson(frozenset[str]):
    """Ids of one person as the fingerprints of images say, which no differential privacy covers."""


def prepared_by(same: Iterable[object]) -> tuple[str, ...]:
    """What to say beside a guarantee of a run on sites that were made with these groups; see `Site.remarks`."""
    found = any(isinstance(person, FoundPerson) for person in same)
    return ("the fingerprints that found persons with several scans are outside it",) if found else ()


def person_of(patient: str) -> str | None:
    """The person that an id names; None if the form of the id is unknown."""
    match = _PERSON.fullmatch(patient) or _SESSION.fullmatch(patient)
    # UCSF-PDGM-0429 in names of folders is UCSF-PDGM-429 in its tables.
    return re.sub(r"(?<=PDGM-)0(?=\d{3})", "", match[1].upper()) if match else None


def group_by_person(patients: Iterable[str], same: Iterable[Iterable[str]] = ()) -> list[Person]:
    """Ids by person, both in the given order.

    Args:
        patients: their ids.
        same: groups of ids that belong to one person, in addition to what the ids say.
    """
    import networkx

    ids = list(patients)
    links = networkx.Graph()
    links.add_nodes_from(ids)
    links.add_edges_from((patient, ("person", person)) for patient in ids if (person := person_of(patient)))
    for number, group in enumerate(same):
        networkx.add_star(links, [("group", number), *group])
    numbers = {node: number for number, nodes in enumerate(networkx.connected_components(links)) for node in nodes}
    people: dict[int, list[str]] = {}
    for patient in ids:
        people.setdefault(numbers[patient], []).append(patient)
    return list(map(tuple, people.values()))


def persons_apart(place_of: Mapping[str, str], same: Iterable[Iterable[str]] = ()) -> list[str]:
    """One line per person whose scans are at several places, with the ids at each."""
    problems = []
    for person in group_by_person(place_of, same):
        places: dict[str, list[str]] = {}
        for patient in sorted(person):
            places.setdefault(place_of[patient], []).append(patient)
        if len(places) > 1:
            problems.append("one person is " + " and ".join(f"{', '.join(ids)} at {place}"
                                                            for place, ids in places.items()))
    return problems


def several_scans(patients: Iterable[str], same: Iterable[Iterable[str]] = ()) -> list[Person]:
    """The persons with more than one id."""
    return [person for person in group_by_person(patients, same) if len(person) > 1]


def at_site(same: Iterable[Iterable[str]], ids: Iterable[str]) -> tuple[frozenset[str], ...]:
    """The groups of ids of one person each, of those with several ids among these."""
    known = frozenset(ids)
    return tuple(own for person in same if len(own := known & frozenset(person)) > 1)


def in_columns(columns: Mapping[str, Mapping[str, str]]) -> tuple[frozenset[str], ...]:
    """The groups of ids to which a column `person` of a table gives one person; `columns` are by id and by name."""
    people: dict[str, set[str]] = {}
    for patient, cells in columns.items():
        for name, cell in cells.items():
            if name.strip().lower() == "person" and cell.strip():
                people.setdefault(cell.strip(), set()).add(patient)
    return tuple(frozenset(ids) for ids in people.values() if len(ids) > 1)


def check_one_scan_each(site: Site, ids: Sequence[str] = ()) -> None:
    """Refuses several scans of one person: each would be counted, clipped and drawn as a patient of its own.

    Who a scan is of is known from ids, from `Site.same`, and from a column `person` of the tables of a folder.

    Args:
        site: the site.
        ids: of the patients that count; by default those to train on.

    Raises:
        ValueError: a person has several scans.
    """
    ids = ids or getattr(site.train, "ids", None) or [patient.id for patient in site.train]
    files = getattr(site.train, "files", {})
    same = (*site.same, *in_columns({name: found.columns for name, found in files.items()}))
    if several := several_scans(ids, same):
        raise ValueError(f"site {site.name!r} has several scans of {len(several)} of its persons, such as "
                         f"{' and '.join(several[0])}; a guarantee per patient holds for one scan of each: keep one "
                         "scan per person, or use a technique whose unit is the site")


def name_several(patients: Iterable[str], same: Iterable[Iterable[str]] = ()) -> str:
    """The persons with more than one id in a sentence; empty if there is none."""
    people = [" = ".join(person) for person in several_scans(patients, same)]
    if not people:
        return ""
    more = f" and {len(people) - 3} more" if len(people) > 3 else ""
    return (f"{len(people)} {'person has' if len(people) == 1 else 'persons have'} several scans, which stay on one "
            f"side of the split: {'; '.join(people[:3])}{more}")
