"""The file site.toml, in which a site says who it is, where its patients are and what it allows."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.core.files import write_whole
from fedlab.core.types import Site
from fedlab.data.cards.card import read_card
from fedlab.data.readers.brats import read_cohort, read_sites
from fedlab.data.sites.partition import split_patients
from fedlab.deploy.policy import Budget, Required, SitePolicy

__all__ = ["SiteSettings", "enter_approved", "read_settings", "read_site", "write_settings"]

_FILE = "site.toml"
_SITE = {"name", "data", "layout", "label_convention", "table", "partition", "spacing_mm", "shape", "held_out", "card",
         "skip_broken"}
_POLICY = {"require", "budget", "max_rounds", "max_updates", "secure_mode", "min_sites", "approved", "installed",
           "tell_errors"}


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What site.toml says.

    Attributes:
        name: of the site; the server knows it by this name.
        data: folder of scans or CSV table of paths, as in `fedlab.data.readers.brats.read_cohort`.
        layout, label_convention: where they can't be found out.
        table: institution table, if only some of the folder's patients are this site's; then
        partition: names the site in the table (default its name).
        spacing_mm, shape: of the grid that patients are put on; the same at every site of a run.
        held_out: share or number of patients that are never trained on.
        card: path of the data card, if there is one.
        skip_broken: whether to go on without patients whose files have errors.
        policy: what the site allows.
    """

    name: str
    data: Path
    layout: str | None = None
    label_convention: str | None = None
    table: Path | None = None
    partition: str | None = None
    spacing_mm: float = 3.0
    shape: tuple[int, int, int] | None = None
    held_out: float = 0.2
    card: Path | None = None
    skip_broken: bool = False
    policy: SitePolicy


def read_settings(folder: Path | str) -> SiteSettings:
    """The settings of a site's folder. Paths in site.toml are relative to it.

    Raises:
        RunError: there is no site.toml, or it is no TOML.
        ValueError: a setting that is unknown, missing or none.
    """
    path = Path(folder) / _FILE
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{folder} is no site's folder: it has no {_FILE}; make one with: fedlab site init --data DIR "
                       "NAME") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{path} can't be read ({error})") from error
    site, policy = _table(found, "site", _SITE, path), _table(found, "policy", _POLICY, path)
    if found:
        raise ValueError(f"{path} has tables that a site doesn't have: {sorted(found)}; expected [site] and [policy]")
    for key in ("name", "data"):
        if not isinstance(site.get(key), str) or not site[key]:
            raise ValueError(f"{path}: [site] needs {key} = \"…\"")
    for key in ("data", "table", "card"):
        if key in site:
            site[key] = (Path(folder) / Path(site[key]).expanduser()).resolve()
    if "shape" in site:
        site["shape"] = tuple(site["shape"])
    try:
        return SiteSettings(**site, policy=_policy(policy))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _policy(found: dict[str, Any]) -> SitePolicy:
    budgets = {unit: Budget(epsilon=terms["max_epsilon"], delta=terms["delta"]) if isinstance(terms, dict) and
               terms.keys() == {"max_epsilon", "delta"} else _no_budget(unit, terms)
               for unit, terms in found.pop("budget", {}).items()}
    require = tuple(map(Required.read, found.pop("require", [])))
    return SitePolicy(**{**found, "installed": tuple(found.get("installed", ()))}, budgets=budgets, require=require)


def _no_budget(unit: str, terms: object) -> Budget:
    raise ValueError(f"a budget says max_epsilon and delta and nothing else, [policy.budget.{unit}] says {terms!r}")


def _table(found: dict[str, Any], name: str, known: set[str], path: Path) -> dict[str, Any]:
    table = found.pop(name, {})
    if not isinstance(table, dict) or not table.keys() <= known:
        raise ValueError(f"{path}: [{name}] knows {', '.join(sorted(known))}; it has "
                         f"{sorted(table.keys() - known) if isinstance(table, dict) else table!r} besides")
    return table


def read_site(settings: SiteSettings, *, cache: Path | None = None, progress: bool = True) -> Site:
    """The site's patients, prepared; the held-out ones are drawn by the site's name and always the same.

    Args:
        settings: of the site.
        cache: a folder that keeps prepared patients; treat it like the scans.
        progress: show a bar.

    Raises:
        DataError: the patients can't be used.
    """
    card = None if settings.card is None else read_card(settings.card)
    broken: Any = "skip" if settings.skip_broken else "raise"
    if settings.table is not None:
        sites = read_sites(settings.data, settings.table, spacing_mm=settings.spacing_mm, shape=settings.shape,
                           held_out=settings.held_out, layout=settings.layout, broken=broken, cache=cache,
                           label_convention=settings.label_convention, progress=progress)
        wanted = settings.partition or settings.name
        own = [site for site in sites if site.name == wanted]
        if not own:
            raise ValueError(f"{settings.table} has no site {wanted!r}, only {[site.name for site in sites]}; say "
                             "partition = \"…\"")
        return Site(name=settings.name, train=own[0].train, val=own[0].val, card=card)
    found = read_cohort(settings.data, layout=settings.layout, label_convention=settings.label_convention,
                        spacing_mm=settings.spacing_mm, shape=settings.shape, broken=broken, cache=cache,
                        progress=progress)
    labelled = [patient for patient in found.ids if found.files[patient].label is not None]
    train, val = split_patients(labelled, held_out=settings.held_out, seed=0, site=settings.name)
    return Site(name=settings.name, train=[found.read(patient) for patient in train],
                val=[found.read(patient) for patient in val], card=card)


def write_settings(folder: Path | str, *, name: str, data: Path | str, **given: Any) -> Path:
    """Makes a site's folder with a site.toml that explains itself. See `fedlab.apps.cli_site`.

    Raises:
        RunError: the folder exists and isn't empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and is left as it is; choose another folder")
    path = folder / _FILE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "techniques").mkdir(exist_ok=True)
    optional = "".join(f"{key} = {_toml(value)}\n" for key, value in given.items() if value is not None)
    path.write_text(_TEMPLATE.format(name=_toml(name), data=_toml(str(Path(data).resolve())), optional=optional),
                    encoding="utf-8")
    return path


def enter_approved(folder: Path | str, module: str, digest: str) -> None:
    """Enters a file's SHA-256 under [policy.approved] in site.toml and leaves the rest of its text as it is.

    Raises:
        ValueError: the table can't be found, so it has to be entered by hand.
    """
    path, line = Path(folder) / _FILE, f'{module} = "{digest}"'
    text = path.read_text(encoding="utf-8")
    kept = [old for old in text.splitlines() if old.split("=")[0].strip() != module]
    if "[policy.approved]" not in kept:
        raise ValueError(f"{path} has no line [policy.approved]; add one at its end, and below it: {line}")
    kept.insert(kept.index("[policy.approved]") + 1, line)
    before = path.read_bytes()
    write_whole(path, ("\n".join(kept) + "\n").encode())
    try:
        entered = read_settings(folder).policy.approved.get(module) == digest
    except (RunError, ValueError):
        entered = False
    if not entered:
        write_whole(path, before)
        raise ValueError(f"{path} is written in a way that this can't change; add to [policy.approved]: {line}")


def _toml(value: Any) -> str:
    """A string, number, boolean or list as TOML writes it, which is as JSON does."""
    if isinstance(value, Path):
        value = str(value.resolve())
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


_TEMPLATE = """\
# This site in fedlab. Everything here is decided at the site: no server can change or loosen it.
# Look at it with: fedlab site show FOLDER

[site]
name = {name}
data = {data}
{optional}# layout = "brats2021"            # where it can't be found out; see: fedlab data inspect --help
# label_convention = "brats2021"
# table = "partitioning.csv"       # if only some of the folder's patients are this site's, with
# partition = "1"                  # this site's name in the table
# spacing_mm = 3.0                 # voxels, the same at every site of a run
# shape = [64, 64, 64]             # voxels of the grid; without it the smallest that holds every brain
# held_out = 0.2                   # share, or number, of patients that are never trained on
# card = "card.md"                 # this site's data card; see: fedlab data card --help
# skip_broken = true               # go on without patients whose files have errors

[policy]
# Techniques that every run must protect this site with. min_… and max_… bound a setting, other names fix it.
# require = ["SecureAggregation", {{technique = "DPSGD", min_noise_multiplier = 0.8, max_clip = 1.0}}]

# Noise from the operating system only: without it whoever knows the seed of the run can take the noise off again.
# secure_mode = true

# max_rounds = 100                 # of one run
# max_updates = 500                # that ever leave this site, of all runs
# min_sites = 3                    # a sum over few sites hides little

# Whether the text of errors may leave where no guarantee forbids it; it can quote file names or pseudonyms.
# tell_errors = false

# Modules beyond fedlab, torch and MONAI that are installed here and that a run may name.
# installed = ["my_hospital.networks"]

# The most privacy that this site spends, over all runs; read from its own ledger before an update leaves.
# [policy.budget.patient]
# max_epsilon = 8.0
# delta = 1e-3

# Technique files in techniques/, by SHA-256: written by fedlab site approve FOLDER FILE, after you have read the file.
[policy.approved]
"""
