"""Which patients belong to which site, and which of them a site holds out."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fedlab.errors import DataError
from fedlab.seeds import generator
from fedlab.types import Patient

__all__ = ["read_partitioning", "split_patients"]


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
    if missing := [name for name in (site_column, patient_column) if name not in columns]:
        raise DataError(f"{table}: no column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}; rename "
                        f"them, or say site_column= and patient_column=")
    sites: dict[str, list[str]] = {}
    home: dict[str, tuple[str, int]] = {}
    problems: list[str] = []
    for line, row in rows:
        site, patient = ((row.get(name) or "").strip() for name in (site_column, patient_column))
        if not site or not patient:
            problems.append(f"line {line}: {site_column if not site else patient_column} is empty")
        elif patient in home:
            other, earlier = home[patient]
            problems.append(f"line {line}: {patient} stands at site {site}, and on line {earlier} at site {other}")
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


def split_patients(patients: Sequence[Patient], *, held_out: float, seed: int,
                   site: str) -> tuple[list[Patient], list[Patient]]:
    """Patients to train on and held-out ones, drawn at random per (seed, site).

    Args:
        patients: of one site.
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
