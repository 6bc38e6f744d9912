"""The commands for data, `fedlab data`: generate patients, inspect a folder, fetch a data set, write a data card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import (
    FLAG,
    LAYOUT,
    READING,
    REQUIRED_PATH,
    add_command,
    add_group,
    new_path,
    read_shape,
)
from fedlab.core.errors import RunError
from fedlab.core.text import counted

__all__ = ["add_data"]


def add_data(commands: Any) -> None:
    """Adds `data` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "data")
    add_command(kinds, "data phantom", _phantom, {
        "--out": REQUIRED_PATH, "--sites": {"type": int, "default": 4}, "--patients": {"type": int, "default": 16},
        "--shape": {"type": read_shape, "default": (64, 64, 64)},
        "--spacing": {"type": float, "default": 3.0, "metavar": "MM"}, "--seed": {"type": int, "default": 0}})
    add_command(kinds, "data inspect", _inspect, {
        "folder": {"type": Path, "metavar": "DIR"}, **LAYOUT, "--json": FLAG,
        "--html --out": {"dest": "html", "type": Path, "metavar": "FILE"}})
    add_command(kinds, "data fetch", _fetch, {
        "name": {"metavar": "NAME"}, "--out": {**REQUIRED_PATH, "metavar": "DIR"}, "--url": {}, "--md5": {}})
    add_command(kinds, "data card", _card, {
        "folder": {"type": Path, "metavar": "DIR"}, **READING, "--site": {"metavar": "NAME"},
        "--minimum": {"type": int, "default": 5, "metavar": "N"}, "--out": {"type": Path, "metavar": "DIR"}})


def _phantom(options: argparse.Namespace) -> None:
    from fedlab.data.phantom.generator import write_brats

    write_brats(options.out, sites=options.sites, patients=options.patients, shape=options.shape,
                spacing_mm=options.spacing, seed=options.seed)
    print(f"{counted(options.patients, 'patient')} and partitioning.csv in {options.out}")


def _inspect(options: argparse.Namespace) -> int:
    from fedlab.core.extras import MissingExtra
    from fedlab.data.readers.inspection import inspect_folder

    page = None if options.json and options.html is None else new_path(options.html, "inspect", ".html")
    if page is not None:
        _refuse_existing(page, "--html")
        try:
            from fedlab.view.inspection_page import write_page
        except MissingExtra as error:
            if options.html is not None:
                raise
            print(f"fedlab: no page is written: {error}", file=sys.stderr)
            page = None
    found = inspect_folder(options.folder, layout=options.layout, label_convention=options.label_convention)
    print(json.dumps(found.as_json(), indent=1, allow_nan=False) if options.json else found)
    if page is not None:
        print(f"\npage: {write_page(page, found)}", file=sys.stderr if options.json else sys.stdout)
    return 3 if found.broken else 0


def _fetch(options: argparse.Namespace) -> None:
    from fedlab.data.fetch import fetch

    print(f"\nscans: {fetch(options.name, options.out, url=options.url, md5=options.md5)}")


def _card(options: argparse.Namespace) -> None:
    from fedlab.core.types import Site
    from fedlab.data.cards.card import card_template, fill_card, read_card
    from fedlab.data.readers.folders import read_cohort
    from fedlab.data.sites.statistics import site_statistics

    out = new_path(options.out, "card")
    _refuse_existing(out, "--out")
    if options.folder.suffix.lower() == ".md" and not options.folder.is_dir():
        card = read_card(options.folder)
        print(f"{card}\n\nmetadata: {card.save_croissant(out / 'croissant.json')}")
        return
    patients = read_cohort(options.folder, layout=options.layout, label_convention=options.label_convention,
                           broken="skip" if options.skip_broken else "raise")
    site = Site(name=options.site or options.folder.resolve().name, train=patients)
    card = fill_card(card_template(), site_statistics(site, minimum=options.minimum))
    written, draft = card.save(out / "card.md"), card.save_croissant(out / "croissant.json", draft=True)
    print(f"{card}\n\nStill to be completed by people at the hospital:")
    print(*(f"  - {part}" for part in card.open), sep="\n")
    print(f"\ncard: {written}\ndraft of the metadata: {draft}\nWhen it is complete: fedlab data card {written}")


def _refuse_existing(path: Path, option: str) -> None:
    if path.exists():
        raise RunError(f"{path} exists already and is not overwritten; choose another {option}")
