"""Startup kits: one for the server, one for each site, one for the researcher, with certificates of the project's own.

NVFLARE makes keys, certificates and what its processes read at their start. What a process may do at its site is
decided by files in the kit's folder `local`, which stays at the site; fedlab writes them strict: only fedlab's two
classes may be run by a job, no job brings code, no log leaves a site, nobody can look into a site's files from afar.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.deploy.policy import SitePolicy
from fedlab.engines.nvflare.requirement import need_nvflare

__all__ = ["check_site_names", "class_rules", "link_site", "make_kits", "server_policy", "settle",
           "site_folder"]

#: All that a job may make at a server or site.
_CLASSES = ["nvflare.collab.runtime.controller.CollabController", "nvflare.collab.runtime.executor.CollabExecutor",
            "fedlab.engines.nvflare.server_part.ServerPart", "fedlab.engines.nvflare.site_part.SitePart"]
_RIGHTS = {"submit_job": "any", "clone_job": "none", "manage_job": "any", "download_job": "any", "view": "any",
           "operate": "o:site", "shell_commands": "none", "byoc": "none", "app_command": "any"}
_SITE_NOTE = """\
# The folder that `fedlab site init` has made at this site: its data, ledger and policy.
# folder = "..."
"""
_SERVER_NOTE = """\
# What a run may name at this server besides fedlab, torch and MONAI. The sites decide for themselves.
# installed = ["my_hospital.strategies"]      # modules that are installed here

# Files in local/techniques, by SHA-256, that the server's people have read.
[approved]
# my_technique = "..."
"""


def check_site_names(names: Sequence[str]) -> None:
    """Raises `ValueError` for names that NVFLARE wouldn't take."""
    odd = [name for name in names if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) is None or name in ("server", "admin")]
    if odd or not names or len(set(names)) != len(names):
        raise ValueError(f"on NVFLARE sites have different names of letters, digits, - and _, other than 'server' and "
                         f"'admin'; got {list(names)!r}")


def make_kits(folder: Path, *, server: str, sites: Sequence[str], port: int = 8002,
              researcher: str = "researcher@fedlab.example") -> Path:
    """Writes `project.yml` and the kits of a new project.

    Args:
        folder: a new or empty folder. `kits/server`, `kits/NAME` and `kits/admin` in it go to those whom they are for;
            `authority`, with the project's root key, stays with whoever made them and goes nowhere.
        server: name of the server's machine as the sites reach it; with "localhost" it listens on loopback only.
        sites: their names.
        port: that sites and researcher connect to; the only one that the server needs open.
        researcher: an e-mail address, the name on the researcher's certificate.

    Returns:
        The folder of the kits.

    Raises:
        ValueError: names that NVFLARE doesn't take.
        RunError: the folder isn't empty, or NVFLARE is missing or failed.
    """
    need_nvflare()
    check_site_names(sites)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose another folder, nothing is overwritten")
    import yaml

    project = _project(server, sites, port, researcher)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = _provision(project, Path(scratch))
        for name, kit in {server: "server", researcher: "admin", **{site: site for site in sites}}.items():
            _harden(made / name)
            shutil.copytree(made / name, folder / "kits" / kit)
        shutil.copytree(made.parent / "state", folder / "authority")
    for private in (folder / "authority", *(folder / "kits").glob("*/startup")):
        os.chmod(private, 0o700)
    return folder / "kits"


def _project(server: str, sites: Sequence[str], port: int, researcher: str) -> dict[str, Any]:
    people = [{"name": site, "type": "client", "org": re.sub(r"\W", "_", site)} for site in sites]
    return {
        "api_version": 3, "name": "fedlab", "description": "a fedlab project",
        "participants": [
            {"name": server, "type": "server", "org": "fedlab", "fed_learn_port": port, "admin_port": port}, *people,
            {"name": researcher, "type": "admin", "org": "fedlab", "role": "lead"}],
        "builders": [
            {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
            {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
             "args": {"config_folder": "config", "scheme": "tcp", "require_signed_jobs": True}},
            {"path": "nvflare.lighter.impl.cert.CertBuilder"},
            {"path": "nvflare.lighter.impl.signature.SignatureBuilder"}],
    }


def _provision(project: dict[str, Any], scratch: Path) -> Path:
    """Where NVFLARE has put the kits. Its command line would also write into the home directory; this doesn't."""
    from nvflare.lighter.provision import prepare_builders, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    said = _Said()
    try:
        done = Provisioner(str(scratch), prepare_builders(project)).provision(prepare_project(project), logger=said)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"NVFLARE can't make such a project: {error}") from error
    if done.get("build_error") or said.errors:
        raise RunError(f"NVFLARE could not make the kits: {'; '.join(said.errors) or 'it gave no reason'}")
    return scratch / str(project["name"]) / "prod_00"


class _Said:
    """What NVFLARE has to say while it makes kits."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def info(self, *said: Any) -> None:
        """Not kept."""

    debug = warning = info

    def error(self, *said: Any) -> None:
        self.errors.append(" ".join(map(str, said)))


def _harden(kit: Path) -> None:
    """Writes what the kit's process may do, as files that go before NVFLARE's defaults."""
    local = kit / "local"
    default = local / "resources.json.default"
    resources = json.loads(default.read_text(encoding="utf-8"))
    if "components" not in resources:  # the researcher's kit runs nothing
        return
    resources |= class_rules()
    resources["components"] = [c for c in resources["components"] if "logging" not in c["path"]]
    if "servers" in resources:
        resources["servers"][0]["heart_beat_timeout"] = 60
    (local / "resources.json").write_text(json.dumps(resources, indent=2), encoding="utf-8")
    rights = {"format_version": "1.0", "permissions": {"project_admin": _RIGHTS, "lead": _RIGHTS}}
    (local / "authorization.json").write_text(json.dumps(rights, indent=2), encoding="utf-8")
    at_site = (kit / "startup" / "fed_client.json").is_file()
    (local / "fedlab.toml").write_text(_SITE_NOTE if at_site else _SERVER_NOTE, encoding="utf-8")


def class_rules() -> dict[str, Any]:
    """What NVFLARE's processes may make for a job, and that no log leaves them."""
    return {"class_list_enforcement_mode": "enforce", "class_allow_list": _CLASSES, "allow_log_streaming": False}


def settle(kit: Path) -> None:
    """Has a server keep its jobs in its own kit, wherever that lies now; NVFLARE's default is a folder for all."""
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8"))
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit.resolve() / "jobs")
    if "snapshot_persistor" in resources:
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit.resolve() / "snapshots")
    path.write_text(json.dumps(resources, indent=2), encoding="utf-8")


def link_site(kit: Path, folder: Path) -> None:
    """Tells a site's kit where the site's own folder is.

    Raises:
        RunError: no kit of a site, or no folder of one.
    """
    note = kit / "local" / "fedlab.toml"
    if not (kit / "startup" / "fed_client.json").is_file() or not note.is_file():
        raise RunError(f"{kit} is no kit of a site")
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; make the site's own folder with fedlab site init")
    note.write_text(f"folder = {json.dumps(str(folder.resolve()))}\n", encoding="utf-8")


def site_folder(kit: Path) -> Path:
    """The site's own folder, as its kit says.

    Raises:
        RunError: the kit doesn't say.
    """
    note = kit / "local" / "fedlab.toml"
    try:
        folder = tomllib.loads(note.read_text(encoding="utf-8")).get("folder")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{note} can't be read: {error}") from error
    if not isinstance(folder, str):
        raise RunError(f"{note} doesn't say where this site's own folder is; write it there, or start the kit with "
                       "fedlab deploy start --site FOLDER")
    return Path(folder)


def server_policy(kit: Path) -> SitePolicy:
    """What a plan may name at the server: fedlab, torch, MONAI, and what `local/fedlab.toml` in its kit approves.

    Raises:
        RunError: the file can't be read.
        ValueError: it says something else.
    """
    note = kit / "local" / "fedlab.toml"
    try:
        found = tomllib.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{note} can't be read: {error}") from error
    if not found.keys() <= {"installed", "approved"}:
        raise ValueError(f"{note} says installed and approved, and nothing else; it has {sorted(found)}")
    return SitePolicy(installed=tuple(found.get("installed", ())), approved=found.get("approved", {}))
