"""A table that says which patient is at which site, such as those of FeTS."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedlab.core.errors import DataError
from fedlab.data.readers.findings import bullets
from fedlab.data.readers.tables import find_column, read_table
from fedlab.data.sites.persons import persons_apart

__all__ = ["Groups", "SiteTable", "alike", "by_number", "group_by_site", "read_site_table", "spelled"]

#: Groups of ids that belong to one person each.
Groups = Sequence[frozenset[str]]


class SiteTable(NamedTuple):
    """The ids of each site's patients in a table, and the groups of ids that its column `person` gives one person."""

    sites: dict[str, list[str]]
    same: Groups


def read_site_table(table: str | os.PathLike[str], *, site_column: str = "Partition_ID",
                    patient_column: str = "Subject_ID") -> SiteTable:
    """The patients of each site, from a CSV table such as those of FeTS (Pati et al. 2022).

    A column `person` is optional: rows with the same value in it are scans of one person.

    Returns:
        Sites in the order of their numbers or names, ids in the order of the table.

    Raises:
        DataError: the table cannot be read, lacks a column, has empty cells, lists a patient twice, writes one site in
            two ways, or has scans of one person at two sites: no split could keep that person out of the held-out
            scans of every model, and a guarantee per patient would not hold for this person.
    """
    columns, rows = read_table(Path(table))
    return group_by_site(table, "line", columns, rows, site_column, patient_column)


def group_by_site(table: object, unit: str, columns: Sequence[str], rows: Sequence[tuple[int, Mapping[str, str]]],
                  site_column: str, patient_column: str) -> SiteTable:
    """The patients of each site from the rows of a table; `unit` is what a row is called in messages."""
    site_key, patient_key, person_key = (find_column(columns, each) for each in (site_column, patient_column, "person"))
    if site_key is None or patient_key is None:
        missing = [name for name, key in ((site_column, site_key), (patient_column, patient_key)) if key is None]
        raise DataError(f"{table}: no column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}; rename "
                        f"them, or pass site_column= and patient_column=")
    sites: dict[str, list[str]] = {}
    listed: dict[str, tuple[str, int]] = {}
    people: dict[str, set[str]] = {}
    problems: list[str] = []
    for line, row in rows:
        site, patient, person = row[site_key].strip(), row[patient_key].strip(), row.get(person_key or "", "").strip()
        if not site or not patient:
            problems.append(f"{unit} {line}: {site_column if not site else patient_column} is empty")
        elif patient in listed:
            other, earlier = listed[patient]
            problems.append(f"{unit} {line}: {patient} is at site {site}, and on {unit} {earlier} at site {other}")
        else:
            listed[patient] = site, line
            sites.setdefault(site, []).append(patient)
            if person:
                people.setdefault(person, set()).add(patient)
    same = tuple(frozenset(person) for person in people.values() if len(person) > 1)
    written: dict[str, list[str]] = {}
    for site in sites:
        written.setdefault(alike(site), []).append(site)
    if twice := [" and ".join(spelled(*names)) for names in written.values() if len(names) > 1]:
        raise DataError(f"{table}: names of sites that differ only in how they are written would become sites of their "
                        f"own: {'; '.join(twice)}; write each site in one way")
    if problems:
        raise DataError(f"{table}: a patient must belong to exactly one site:\n{bullets(problems)}\ncorrect the table")
    if apart := persons_apart({patient: f"site {site}" for patient, (site, _) in listed.items()}, same):
        raise DataError(f"{table}: all scans of a person must be at one site:\n{bullets(apart)}\ncorrect the sites, or "
                        "leave out all rows of that person but those of one site")
    if not sites:
        raise DataError(f"{table}: no row below its header; expected one row per patient")
    return SiteTable({site: sites[site] for site in sorted(sites, key=by_number)}, same)


def alike(name: str) -> str:
    """The same text for names that differ only in case, spaces, Unicode form, leading zeros, or as 1 and 1.0 do."""
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"^(\d+)\.0+$", r"\1", plain))


def spelled(*names: str) -> list[str]:
    """The names in quotes, so that a difference can be seen: with codes of the letters where two look the same."""
    shown = len({unicodedata.normalize("NFKC", name) for name in names}) == len(names)
    return [repr(name) if shown else ascii(name) for name in names]


def by_number(site: str) -> tuple[int, int, str]:
    """A sorting key: sites named by numbers first, in the order of the numbers, then the others by name."""
    return (0, int(site), site) if site.isdecimal() and len(site) < 19 else (1, 0, site)
