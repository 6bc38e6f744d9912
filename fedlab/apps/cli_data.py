"""The commands for data, `fedlab data`: generate patients, inspect a folder, fetch a data set, write a data card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import add_command, add_group, add_layout, add_reading, new_path, read_shape

__all__ = ["add_data"]


def add_data(commands: Any) -> None:
    """Adds `data` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "data", help="generate, inspect or fetch data, write a data card")
    phantom = add_command(kinds, "phantom", _phantom, help="write generated patients as a BraTS folder", about="""
        Generates patients and writes them in the layout of BraTS 2021, with partitioning.csv as institution table,
        so that any reader or viewer can open them.""")
    phantom.add_argument("--out", type=Path, required=True, help="new directory")
    phantom.add_argument("--sites", type=int, default=4, help="number of sites (default 4)")
    phantom.add_argument("--patients", type=int, default=16, help="patients of all sites together (default 16)")
    phantom.add_argument("--shape", type=read_shape, default=(64, 64, 64), help="voxels (default 64,64,64)")
    phantom.add_argument("--spacing", type=float, default=3.0, metavar="MM", help="voxel size (default 3 mm)")
    phantom.add_argument("--seed", type=int, default=0, help="of anatomy, tumours and scanners (default 0)")

    inspect = add_command(kinds, "inspect", _inspect, help="what a folder of scans holds and what is wrong with it",
                          about="""
        Reads every file of every patient of a folder in any BraTS layout, FeTS, the Medical Segmentation Decathlon
        or a CSV table of paths. Prints a table and all findings and writes an HTML page with one slice per patient.
        Changes nothing. Exit status: 0 every patient is usable (there may be warnings), 3 some patient has an error,
        1 the folder cannot be inspected at all, 2 wrong arguments.""")
    inspect.add_argument("folder", type=Path, metavar="DIR", help="the folder, or a CSV table of paths")
    add_layout(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON, one entry per patient, instead of the "
                                                             "table; writes the page only if --html is given")
    inspect.add_argument("--html", "--out", dest="html", type=Path, metavar="FILE",
                         help="the page, a new file (default runs/inspect-TIME.html)")

    fetch = add_command(kinds, "fetch", _fetch, help="download a public data set whose licence allows it", about="""
        Prints licence and citation, then downloads with MONAI's downloader, compares the checksum and unpacks.
        Data sets: msd-brain (Medical Segmentation Decathlon, Task01_BrainTumour, about 7 GB).""")
    fetch.add_argument("name", metavar="NAME", help="the data set")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
    fetch.add_argument("--url", help="another address of the same archive, such as a mirror in your hospital")
    fetch.add_argument("--md5", help="checksum of the archive at --url, if it differs")

    card = add_command(kinds, "card", _card, help="a data card for a folder of scans, or croissant.json of a finished "
                       "card", about="""
        For a folder: reads its patients as one site, counts what the site may publish, and writes card.md, in which
        the parts that only people can fill in are marked, and croissant.json as a draft. For a card (FILE.md): lists
        the parts still to be completed and, if there are none, writes croissant.json. Nothing is overwritten or
        sent.""")
    card.add_argument("folder", type=Path, metavar="DIR", help="the folder, a CSV table of paths, or a card (FILE.md)")
    add_reading(card)
    card.add_argument("--site", metavar="NAME", help="name of the site (default: the folder's name)")
    card.add_argument("--minimum", type=int, default=5, metavar="N",
                      help="withhold counts of fewer than N patients (default 5)")
    card.add_argument("--out", type=Path, metavar="DIR", help="new directory (default runs/card-TIME)")


def _phantom(options: argparse.Namespace) -> None:
    from fedlab.data.phantom.generator import write_brats

    write_brats(options.out, sites=options.sites, patients=options.patients, shape=options.shape,
                spacing_mm=options.spacing, seed=options.seed)
    print(f"{options.patients} patients and partitioning.csv in {options.out}")


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
    from fedlab.data.cards.card import card_template, fill_card, read_card

    out = new_path(options.out, "card")
    _refuse_existing(out, "--out")
    if options.folder.suffix.lower() == ".md" and not options.folder.is_dir():
        card = read_card(options.folder)
        card.save_croissant(out / "croissant.json")
        print(f"{card}\n\nmetadata: {out / 'croissant.json'}")
        return
    card = fill_card(card_template(), _statistics(options))
    card.save(out / "card.md")
    card.save_croissant(out / "croissant.json", draft=True)
    print(f"{card}\n\nStill to be completed by people at the hospital:")
    print(*(f"  - {part}" for part in card.open), sep="\n")
    print(f"\ncard: {out / 'card.md'}\ndraft of the metadata: {out / 'croissant.json'}\n"
          f"When it is complete: fedlab data card {out / 'card.md'}")


def _refuse_existing(path: Path, option: str) -> None:
    from fedlab.core.errors import RunError

    if path.exists():
        raise RunError(f"{path} exists already and is not overwritten; choose another {option}")


def _statistics(options: argparse.Namespace) -> Any:
    """The statistics of the folder's patients, taken as one site."""
    from fedlab.core.types import Site
    from fedlab.data.readers.folders import read_cohort
    from fedlab.data.sites.statistics import site_statistics

    patients = read_cohort(options.folder, layout=options.layout, label_convention=options.label_convention,
                           broken="skip" if options.skip_broken else "raise")
    site = Site(name=options.site or options.folder.resolve().name, train=patients)
    return site_statistics(site, minimum=options.minimum)
