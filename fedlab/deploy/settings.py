"""The file site.toml: a site's name, where its patients are, and what it allows."""

from __future__ import annotations

import json
import tomllib
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.core.files import filled_in, write_new, write_whole
from fedlab.core.types import Site
from fedlab.data.cards.card import read_card
from fedlab.data.readers.folders import read_cohort, read_sites
from fedlab.data.sites.partition import split_patients
from fedlab.data.sites.persons import in_columns
from fedlab.deploy.policy import Budget, SitePolicy
from fedlab.deploy.required import Required, nearest

__all__ = ["SiteSettings", "enter_approved", "read_settings", "read_site", "write_settings"]

_FILE = "site.toml"


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """The content of site.toml; `templates/site.toml.j2` explains each setting."""

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
        RunError: site.toml is missing or no TOML.
        ValueError: an unknown, missing or invalid setting.
    """
    path = Path(folder) / _FILE
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{folder} is no site's folder: it has no {_FILE}; make one with: fedlab site init --data DIR "
                       "NAME") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
    site = _table(found, "site", {f.name for f in fields(SiteSettings)} - {"policy"}, path)
    policy = _table(found, "policy", {f.name for f in fields(SitePolicy)} - {"budgets"} | {"budget"}, path)
    if found:
        raise ValueError(f"{path} has unknown tables {sorted(found)}{nearest(min(found), ('site', 'policy'))}; "
                         "expected [site] and [policy]")
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
    budgets = {}
    for unit, terms in found.pop("budget", {}).items():
        if not isinstance(terms, dict) or terms.keys() != {"max_epsilon", "delta"}:
            raise ValueError(f"[policy.budget.{unit}] has max_epsilon and delta and nothing else, got {terms!r}")
        budgets[unit] = Budget(epsilon=terms["max_epsilon"], delta=terms["delta"])
    lists = {name: found.pop(name, []) for name in ("require", "installed")}
    if not all(isinstance(value, list) for value in lists.values()):
        raise ValueError(f"require and installed are lists, such as [\"DPSGD\"], got {lists!r}")
    if "broadcast_clip" in found and isinstance(found["broadcast_clip"], list):
        found["broadcast_clip"] = tuple(found["broadcast_clip"])
    return SitePolicy(**found, installed=tuple(lists["installed"]), budgets=budgets,
                      require=tuple(map(Required.read, lists["require"])))


def _table(found: dict[str, Any], name: str, known: set[str], path: Path) -> dict[str, Any]:
    table = found.pop(name, {})
    if not isinstance(table, dict) or not table.keys() <= known:
        unknown = sorted(table.keys() - known) if isinstance(table, dict) else table
        meant = nearest(unknown[0], known) if isinstance(unknown, list) else ""
        raise ValueError(f"{path}: [{name}] knows {', '.join(sorted(known))}; got {unknown!r}{meant}")
    return table


def read_site(settings: SiteSettings, *, cache: Path | None = None, progress: bool = True) -> Site:
    """The site's patients, prepared; whether one is held out depends on the site's name and the patient only.

    Prepared patients are kept in the folder `cache`, which needs the same care as the scans.

    Raises:
        DataError: the patients cannot be used.
    """
    card = None if settings.card is None else read_card(settings.card)
    reading: dict[str, Any] = {
        "layout": settings.layout, "label_convention": settings.label_convention, "spacing_mm": settings.spacing_mm,
        "shape": settings.shape, "broken": "skip" if settings.skip_broken else "raise", "cache": cache,
        "progress": progress}
    if settings.table is not None:
        sites = {site.name: site for site in read_sites(settings.data, settings.table, held_out=settings.held_out,
                                                        at_least=0, common_grid=False, **reading)}
        name = settings.partition or settings.name
        if name not in sites:
            raise ValueError(f"{settings.table} has no site {name!r}, only {list(sites)}; set partition = \"…\"")
        return replace(sites[name], name=settings.name, card=card)
    found = read_cohort(settings.data, **reading)
    labelled = [patient for patient in found.ids if found.files[patient].label is not None]
    same = in_columns({name: found.files[name].columns for name in labelled})
    train, val = split_patients(labelled, held_out=settings.held_out, seed=0, site=settings.name, same=same, at_least=0)
    return Site(name=settings.name, train=list(map(found.read, train)), val=list(map(found.read, val)), card=card,
                same=same)


def write_settings(folder: Path | str, *, name: str, data: Path | str, **given: Any) -> Path:
    """Makes a site's folder with a commented site.toml; `given` are fields of `SiteSettings`.

    Raises:
        RunError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and is left as it is; choose another folder")
    optional = {key: _toml(value) for key, value in given.items() if value is not None}
    (folder / "techniques").mkdir(parents=True, exist_ok=True)
    return write_new(folder / _FILE, filled_in("fedlab.deploy", "site.toml", name=_toml(name), data=_toml(Path(data)),
                                               given=optional).encode())


def enter_approved(folder: Path | str, module: str, digest: str) -> None:
    """Enters a file's SHA-256 under [policy.approved] in site.toml and leaves the rest of its text as it is.

    Raises:
        ValueError: the table is missing or of another form, so that the file has to be entered by hand.
    """
    path, line = Path(folder) / _FILE, f'{module} = "{digest}"'
    before = path.read_bytes()
    kept = [old for old in before.decode().splitlines() if old.split("=")[0].strip() != module]
    if "[policy.approved]" in kept:
        kept.insert(kept.index("[policy.approved]") + 1, line)
        write_whole(path, ("\n".join(kept) + "\n").encode())
        with suppress(RunError, ValueError):
            if read_settings(folder).policy.approved.get(module) == digest:
                return
        write_whole(path, before)
    raise ValueError(f"{path} has no line [policy.approved], or a form that this command cannot change; add the line "
                     f"at its end, and below it: {line}")


def _toml(value: Any) -> str:
    """A string, number, boolean or list in TOML, which is the same as in JSON."""
    if isinstance(value, Path):
        value = str(value.resolve())
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
