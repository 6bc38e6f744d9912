"""The local parts of itkwidgets: nothing is installed that is not what is locked, and no wait is endless."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedlab.apps.cli import main
from fedlab.core.errors import RunError
from fedlab.view import itk, itk_parts

SOURCES = {
    "lib_index_js.1.js": "\n".join([*(old for old, _ in itk_parts._EDITS["lib_index_js."]), itk_parts.ORIGINAL]),
    "vendors-node_modules_imjoy-core_1.js": "\n".join(
        old for old, _ in itk_parts._EDITS["vendors-node_modules_imjoy-core_"]),
    "remoteEntry.1.js": 'self["webpackChunkimjoy_jupyterlab_extension"]',
}
PACKAGES = {
    "imjoy-core": {"dist/imjoy-core.min.js": "\n".join(old for old, _ in itk_parts._CORE_EDITS),
                   "dist/imjoy-loader.js": ""},
    "imjoy-rpc": {"dist/imjoy-rpc.min.js": ""},
    "itk-viewer-bootstrap-ui": {"dist/bootstrapUIMachineOptions.js.es.js": ""},
    "itk-vtk-viewer": {"dist/index.html": "\n".join(old for old, _ in itk_parts._PAGE_EDITS),
                       "dist/itkVtkViewer.js": "", "dist/serviceWorker.js": "",
                       "dist/itk/web-workers/min-bundles/pipeline.worker.js": "",
                       "dist/itk/pipeline/BloscZarr.wasm": "", "dist/itk/image-io/png.wasm": ""},
    "vue": {"dist/vue.min.js": ""},
    "vue-js-modal": {"dist/index.js": "", "dist/styles.css": ""},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with the original extension, and a program npm that packs `PACKAGES` and nothing else."""
    prefix, registry, programs = tmp_path / "env", tmp_path / "registry", tmp_path / "bin"
    original = prefix / "share" / "jupyter" / "labextensions" / "imjoy-jupyterlab-extension"
    (original / "static").mkdir(parents=True)
    (original / "package.json").write_text('{"name": "imjoy-jupyterlab-extension"}')
    for name, text in SOURCES.items():
        (original / "static" / name).write_text(text)
    lock = {}
    registry.mkdir()
    for name, files in PACKAGES.items():
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for file, text in {**files, "LICENSE": "free"}.items():
                entry = tarfile.TarInfo(f"package/{file}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
        (registry / f"{name}-1.0.0.tgz").write_bytes(packed.getvalue())
        digest = base64.b64encode(hashlib.sha512(packed.getvalue()).digest()).decode()
        lock[name] = {"version": "1.0.0", "integrity": f"sha512-{digest}"}
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(f'#!/bin/sh\ncp "{registry}/$(echo "$2" | tr @ -).tgz" .\n')
    npm.chmod(0o755)
    monkeypatch.setattr(itk_parts, "_LOCK", tmp_path / "lock.json")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_: [str(prefix / "share/jupyter/labextensions")])
    monkeypatch.setattr(itk_parts.importlib.util, "find_spec", lambda name: name)
    return tmp_path


def test_install_copies_with_local_addresses_and_changes_no_installed_file(place: Path) -> None:
    extensions = place / "env" / "share" / "jupyter" / "labextensions"
    before = {file: file.read_bytes() for file in extensions.rglob("*") if file.is_file()}
    settings = place / "env" / "etc" / "jupyter" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"disabledExtensions": ["other"], "buildCheck": false}')

    folder = itk_parts.install()

    assert folder == extensions / "fedlab-itkwidgets" == itk_parts.installed()
    assert all(file.read_bytes() == content for file, content in before.items())
    assert json.loads((folder / "package.json").read_text())["name"] == "fedlab-itkwidgets"
    code = "".join(file.read_text() for file in (folder / "static").glob("*.js"))
    assert "imjoy-jupyterlab-extension" not in code and "imjoy_jupyterlab_extension" not in code
    assert "imjoy.io/static" not in code and "function injectScript(src) { src = window.fedlabItkwidgets(src);" in code
    page = (folder / "static" / "parts" / "viewer" / "index.html").read_text()
    assert "https://" not in page and "Content-Security-Policy" in page
    assert not (folder / "static" / "parts" / "viewer" / "serviceWorker.js").exists()
    assert not (folder / "static" / "parts" / "viewer" / "itk" / "image-io").exists()
    assert json.loads(settings.read_text()) == {
        "disabledExtensions": {"other": True, "imjoy-jupyterlab-extension": True}, "buildCheck": False}
    assert itk_parts.install() == folder, "a second time replaces it"
    assert itk_parts.remove() == folder and itk_parts.installed() is None and itk_parts.remove() is None


def test_a_part_that_is_not_the_locked_one_is_refused(place: Path) -> None:
    registry = place / "registry" / "vue-1.0.0.tgz"
    registry.write_bytes(registry.read_bytes() + b"more")
    with pytest.raises(RunError, match=r"another vue 1\.0\.0 than the one that fedlab was tested with"):
        itk_parts.install()
    assert itk_parts.installed() is None


def test_an_unknown_version_of_the_extension_is_refused(place: Path) -> None:
    code = place / "env/share/jupyter/labextensions/imjoy-jupyterlab-extension/static/lib_index_js.1.js"
    code.write_text("something else")
    with pytest.raises(RunError, match="not of the version that fedlab knows"):
        itk_parts.install()
    assert itk_parts.installed() is None


def test_without_npm_or_a_network_the_command_says_what_is_missing(
        place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bin" / "npm").write_text("#!/bin/sh\necho getaddrinfo EAI_AGAIN >&2\nexit 1\n")
    assert main(["itk", "install"]) == 1
    assert "npm cannot fetch imjoy-core 1.0.0: is there a network?" in (said := capsys.readouterr().err)
    assert "EAI_AGAIN" in said
    monkeypatch.setattr(itk_parts.shutil, "which", lambda *_, **__: None)
    assert main(["itk", "install"]) == 1
    assert "npm, which fetches the parts of the viewer, is not installed" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="needs the extra lab")
@pytest.mark.parametrize("answered", [False, True])
def test_the_wait_for_the_viewer_ends(answered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that never answers, and one that answers and never draws: the next cell runs, and the reason is told."""
    went_on: list[str] = []

    class Watcher:
        def __init__(self) -> None:
            self.viewers = SimpleNamespace(data={"viewer": {"ready": False}})
            self.results, self.current_request = {"getter": asyncio.Future()}, ("asked", "before")

        def viewer_ready(self, name: str) -> bool:
            return bool(self.viewers.data[name]["ready"])

        async def execute_next_request(self) -> None:
            went_on.append("next cell")

        def create_task(self, work: Any) -> None:
            self.task = asyncio.ensure_future(work())

    async def wait() -> tuple[Any, list[str | None]]:
        watcher, told = Watcher(), []
        module: Any = ModuleType("itkwidgets.cell_watcher")
        module.CellWatcher = lambda: watcher
        monkeypatch.setitem(sys.modules, "itkwidgets", ModuleType("itkwidgets"))
        monkeypatch.setitem(sys.modules, "itkwidgets.cell_watcher", module)
        rpc = SimpleNamespace(parent="viewer", **({"itk_viewer": object()} if answered else {}))
        await itk._watch(SimpleNamespace(viewer_rpc=rpc), told.append)
        await asyncio.sleep(0)
        return watcher, told

    monkeypatch.setattr(itk, "_PAUSE", 0.001)
    monkeypatch.setattr(itk, "_ANSWER", 0.01)
    monkeypatch.setattr(itk, "_DRAW", 0.01)
    watcher, told = asyncio.run(wait())
    assert watcher.viewers.data == {} and watcher.results == {} and watcher.current_request is None
    assert went_on == ["next cell"]
    assert len(told) == 1 and ("did not draw" if answered else "did not answer") in str(told[0])
