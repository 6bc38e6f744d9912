"""The command line's `fedlab data`: generate scans, look at a folder of them, fetch a public data set."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["add_data", "read_shape"]


def add_data(commands: Any) -> None:
    """Adds `data` and its own commands to argparse's sub-parsers."""
    style = argparse.RawDescriptionHelpFormatter
    data = commands.add_parser("data", help="make, inspect or fetch data")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    phantom = kinds.add_parser("phantom", help="write generated patients as a BraTS folder", formatter_class=style,
                               description=(
        "Generates patients and writes them in the layout of BraTS 2021, with partitioning.csv as institution table,\n"
        "so that any reader or viewer can open them."))
    phantom.add_argument("--out", type=Path, required=True, help="new directory")
    phantom.add_argument("--sites", type=int, default=4)
    phantom.add_argument("--patients", type=int, default=16, help="of all sites together (default 16)")
    phantom.add_argument("--shape", type=read_shape, default=(64, 64, 64), help="voxels (default 64,64,64)")
    phantom.add_argument("--spacing", type=float, default=3.0, metavar="MM", help="voxel size (default 3 mm)")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.set_defaults(command=_phantom)

    inspect = kinds.add_parser("inspect", help="what a folder of scans holds and what is wrong with it",
                               formatter_class=style, description=(
        "Reads every file of every patient of a folder in any BraTS layout, FeTS, the Medical Segmentation Decathlon\n"
        "or a CSV table of paths. Prints a table and all findings and writes an HTML page with one slice a patient.\n"
        "Changes nothing. Exit status: 0 every patient can be used (there may be warnings), 3 some patient has an\n"
        "error, 1 the folder can't be inspected at all, 2 wrong arguments."))
    inspect.add_argument("folder", type=Path, metavar="DIR", help="the folder, or a CSV table of paths")
    add_layout(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON, one entry a patient, in place of the table; "
                                                             "then the page is written only where --html is given")
    inspect.add_argument("--html", "--out", dest="html", type=Path, metavar="FILE",
                         help="the page, a new file (default runs/inspect-TIME.html)")
    inspect.set_defaults(command=_inspect)

    fetch = kinds.add_parser("fetch", help="download a public data set whose licence allows it", formatter_class=style,
                             description=(
        "Prints licence and citation, then downloads with MONAI's downloader, compares the checksum and unpacks.\n"
        "Data sets: msd-brain (Medical Segmentation Decathlon, Task01_BrainTumour, about 7 GB)."))
    fetch.add_argument("name", metavar="NAME", help="the data set")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
    fetch.add_argument("--url", help="another address of the same archive, such as a mirror in your hospital")
    fetch.add_argument("--md5", help="checksum of the archive, if the one at --url is another")
    fetch.set_defaults(command=_fetch)

    card = kinds.add_parser("card", help="a data card for a folder of scans, or croissant.json of a finished card",
                            formatter_class=style, description=(
        "For a folder: reads its patients as one site, counts what the site may tell, and writes card.md, in which\n"
        "what only people can say is marked, and croissant.json as a draft. For a card (FILE.md): lists what is still\n"
        "to be completed and, if nothing is, writes croissant.json. Nothing is overwritten or sent."))
    card.add_argument("folder", type=Path, metavar="DIR", help="the folder, a CSV table of paths, or a card (FILE.md)")
    add_layout(card)
    card.add_argument("--site", metavar="NAME", help="name of the site (default the folder's)")
    card.add_argument("--minimum", type=int, default=5, metavar="N",
                      help="withhold what fewer than N patients stand behind (default 5)")
    card.add_argument("--skip-broken", action="store_true", help="leave out patients with errors instead of stopping")
    card.add_argument("--out", type=Path, metavar="DIR", help="new directory (default runs/card-TIME)")
    card.set_defaults(command=_card)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Adds --layout and --label-convention, for folders that don't tell."""
    parser.add_argument("--layout", help="brats2018, brats2019, brats2020, brats2021, brats2023, fets, msd or table "
                                         "(default: found out)")
    parser.add_argument("--label-convention", metavar="NAME", help="brats2021 (1/2/4), brats2023 (3 enhancing), "
                        "brats2024 (4 cavity), msd (1 oedema) or brats2013 (3 non-enhancing) (default: found out)")


def read_shape(text: str) -> tuple[int, int, int]:
    """Voxels of a volume from text such as "48,64,48", for argparse."""
    try:
        x, y, z = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"three whole numbers such as 48,64,48, got {text!r}") from error
    if min(x, y, z) < 32 or any(v % 16 for v in (x, y, z)):
        raise argparse.ArgumentTypeError(f"each number is a multiple of 16 and at least 32, got {text!r}")
    return x, y, z


def _phantom(options: argparse.Namespace) -> None:
    from fedlab.data.phantom.cohort import write_brats

    write_brats(options.out, sites=options.sites, patients=options.patients, shape=options.shape,
                spacing_mm=options.spacing, seed=options.seed)
    print(f"{options.patients} patients and partitioning.csv in {options.out}")


def _inspect(options: argparse.Namespace) -> int:
    from fedlab.core.errors import RunError
    from fedlab.data.readers.inspection import inspect_folder

    page: Path | None = options.html
    if page is None and not options.json:
        page = Path("runs") / f"inspect-{time.strftime('%Y%m%d-%H%M%S')}.html"
    if page is not None and page.exists():
        raise RunError(f"{page} exists already and is not overwritten: give another --html")
    found = inspect_folder(options.folder, layout=options.layout, label_convention=options.label_convention)
    print(json.dumps(found.as_json(), indent=1, allow_nan=False) if options.json else found)
    if page is not None:
        from fedlab.view.inspection_page import write_page

        print(f"\npage: {write_page(page, found)}", file=sys.stderr if options.json else sys.stdout)
    return 3 if found.broken else 0


def _fetch(options: argparse.Namespace) -> None:
    from fedlab.data.fetch import fetch

    print(f"\nscans: {fetch(options.name, options.out, url=options.url, md5=options.md5)}")


def _card(options: argparse.Namespace) -> None:
    from fedlab.core.errors import RunError
    from fedlab.data.cards.card import card_template, fill_card, read_card

    out: Path = options.out or Path("runs") / f"card-{time.strftime('%Y%m%d-%H%M%S')}"
    if out.exists():
        raise RunError(f"{out} exists already and is not overwritten: give another --out")
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


def _statistics(options: argparse.Namespace) -> Any:
    """What the folder's patients tell as one site."""
    from fedlab.core.types import Site
    from fedlab.data.readers.brats import read_cohort
    from fedlab.data.sites.statistics import site_statistics

    cohort = read_cohort(options.folder, layout=options.layout, label_convention=options.label_convention,
                         broken="skip" if options.skip_broken else "raise")
    site = Site(name=options.site or options.folder.resolve().name, train=cohort)
    return site_statistics(site, minimum=options.minimum)
