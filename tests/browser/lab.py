"""JupyterLab and Chromium for tests, without a network; both are ended by their process ids."""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib.image
import nbformat
import numpy as np
import numpy.typing as npt
import psutil
import pytest

LOOPBACK = ("127.0.0.1", "localhost")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-quic", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",  # WebGL without a GPU
]
#: Switches off questions to the user and to other machines.
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "docmanager-extension/plugin": {"autosave": False},
            "notebook-extension/tracker": {"recordTiming": True}}
#: The extension of itkwidgets requests scripts from a CDN whenever JupyterLab opens, used or not.
DISABLED = {"disabledExtensions": {"imjoy-jupyterlab-extension": True}}
#: Selector of an error in any output of the notebook.
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'

Pixels = npt.NDArray[np.float32]


class Lab:
    """A JupyterLab on a folder of notebooks, on a free port of this machine.

    Args:
        folder: new or empty, for its settings and its log.
        notebooks: the root folder of JupyterLab.
        newcomer: whether `fedlab lab` starts it, as `make lab` does, without any settings of a user or of these tests.

    Attributes:
        url: of the server.
        token: for access.
    """

    def __init__(self, folder: Path, notebooks: Path, *, newcomer: bool = False) -> None:
        self._folder, self._port = folder, _free_port()
        self.url, self.token = f"http://127.0.0.1:{self._port}", secrets.token_hex(16)
        self._log = (folder / "lab.log").open("wb")
        program = (["-m", "fedlab.apps.cli", "lab", f"--folder={notebooks}", "--"] if newcomer else
                   ["-m", "jupyterlab", f"--ServerApp.root_dir={notebooks}", "--LabApp.extension_manager=readonly"])
        self._process = subprocess.Popen(
            [sys.executable, *program, "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={self._port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={self.token}", "--LabApp.expose_app_in_browser=True"],
            cwd=notebooks, env=_environment(folder, quiet=not newcomer), stdout=self._log, stderr=subprocess.STDOUT)

    def wait(self, seconds: float = 300) -> None:
        """Waits until the server answers."""
        def answers() -> bool:
            if self._process.poll() is not None:
                raise RuntimeError(f"JupyterLab ended during its start:\n{self._log_tail()}")
            try:
                return bool(self.ask("/api/status"))
            except OSError:
                return False

        wait_for(answers, seconds=seconds, why=lambda: f"JupyterLab does not answer:\n{self._log_tail()}")

    def ask(self, path: str, *, method: str = "GET") -> Any:
        """The answer of its REST interface, None if it is empty."""
        request = urllib.request.Request(self.url + path, method=method,
                                         headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def end_kernels(self) -> None:
        """Ends every kernel, so that the next notebook has the machine to itself."""
        for session in self.ask("/api/sessions"):
            self.ask(f"/api/sessions/{session['id']}", method="DELETE")

    def stop(self) -> list[int]:
        """Ends the server and its children; returns the ids of those that had to be killed."""
        server = psutil.Process(self._process.pid)
        family = [*server.children(recursive=True), server]
        server.terminate()
        _, left = psutil.wait_procs(family, timeout=60)
        for process in left:
            process.kill()
        self._process.wait()
        self._log.close()
        return [process.pid for process in left]

    def _log_tail(self) -> str:
        return (self._folder / "lab.log").read_text("utf-8", "replace")[-3000:]


class Visit:
    """A notebook open in a browser, with the requests and errors of the page.

    Args:
        browser: Playwright's Chromium.
        lab: the JupyterLab.
        name: of the notebook; None opens what JupyterLab opens by itself.

    Attributes:
        page: Playwright's page.
        foreign: addresses on other machines that the page requested; all were blocked.
        errors: reported by the browser's console.
        failed: addresses whose request failed, or was answered with an error.
    """

    def __init__(self, browser: Any, lab: Lab, name: str | None) -> None:
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.failed: list[str] = []
        self._lab = lab
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, service_workers="block")
        context.set_default_timeout(120_000)
        context.route("**/*", self._route)
        self.page = context.new_page()
        self.page.on("console", lambda said: self.errors.append(f"{said.text} ({said.location.get('url')})")
                     if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("websocket", lambda socket: self._note(socket.url))
        self.page.on("requestfailed", lambda request: self.failed.append(f"{request.url}: {request.failure}"))
        self.page.on("response", lambda answer: self.failed.append(f"{answer.url}: {answer.status}")
                     if answer.status >= 400 else None)
        place = "/?" if name is None else f"/lab/tree/{name}?reset&"
        self.page.goto(f"{lab.url}{place}token={lab.token}", wait_until="domcontentloaded")
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext")
        self.page.evaluate("""async () => {
            const panel = window.jupyterapp.shell.currentWidget;
            await panel.context.ready; await panel.sessionContext.ready; await panel.revealed;
        }""")
        self.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")

    def run_all(self) -> None:
        """Starts the command Run All Cells; `finished` reports its end."""
        self.started = time.monotonic()
        self.page.evaluate("""() => {
            window.allCells = 'running';
            window.jupyterapp.commands.execute('notebook:run-all-cells')
                .then(() => { window.allCells = 'finished'; }, error => { window.allCells = String(error); });
        }""")

    def finished(self) -> bool:
        """Whether all cells have run; fails at once if one ended in an error."""
        self.no_errors_in_cells()
        state = self.page.evaluate("() => window.allCells")
        assert state in ("running", "finished"), f"Run All Cells: {state}"
        return bool(state == "finished")

    def no_errors_in_cells(self) -> None:
        """Fails with the text of an error that a cell shows."""
        shown = self.page.locator(ERRORS)
        assert shown.count() == 0, f"a cell shows an error:\n{shown.first.inner_text()}"

    def cell(self, name: str) -> Any:
        """Playwright's locator of the cell with this id, scrolled into view: JupyterLab draws visible cells only."""
        order = self.page.evaluate("""name => window.jupyterapp.shell.currentWidget.content.widgets
            .findIndex(cell => cell.model.id === name)""", name)
        assert order >= 0, f"the notebook has no cell {name}"
        cell = self.page.locator(".jp-Notebook-cell").nth(order)
        cell.evaluate("cell => cell.scrollIntoView({block: 'nearest'})")
        return cell

    def image(self, name: str) -> Pixels | None:
        """The first picture (PNG) in the output of a cell; None until there is one."""
        found = self.cell(name).locator(".jp-OutputArea-output img")
        if not found.count():
            return None
        return pixels(base64.b64decode(found.first.get_attribute("src").partition("base64,")[2]))

    def began(self, name: str) -> float | None:
        """Time at which the kernel began a cell, in seconds (`time.time`); None before."""
        said = self.page.evaluate("""name => window.jupyterapp.shell.currentWidget.content.widgets
            .find(cell => cell.model.id === name).model.getMetadata('execution')?.['iopub.execute_input']""", name)
        return None if said is None else datetime.fromisoformat(said).timestamp()

    def check_quiet(self) -> None:
        """Fails if the page sent a request to another machine, or the console reported an error."""
        assert self.foreign == [], f"the page sent requests to other machines: {self.foreign}"
        assert self.errors == [], "the browser's console reports errors:\n" + "\n".join(self.errors)

    def close(self) -> None:
        """Closes the page and ends its kernel."""
        self.page.context.close()
        self._lab.end_kernels()

    def _route(self, route: Any) -> None:
        if self._note(route.request.url):
            route.continue_()
        else:
            route.abort()

    def _note(self, address: str) -> bool:
        home = urlsplit(address).hostname in LOOPBACK or address.startswith(("data:", "blob:", "about:"))
        if not home:
            self.foreign.append(address)
        return home


class Seen:
    """Screenshots and timings of this run of the tests, in runs/browser/ of the checkout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def keep(self, name: str, png: bytes) -> None:
        """Keeps a screenshot."""
        (self._folder / f"{name}.png").write_bytes(png)

    def time(self, what: str, seconds: float) -> None:
        """Prints and keeps a duration."""
        file = self._folder / "timings.json"
        times = json.loads(file.read_text("utf-8")) if file.exists() else {}
        times[what] = round(seconds, 2)
        file.write_text(json.dumps(times, indent=1) + "\n", "utf-8")
        print(f"{what}: {seconds:.1f} s")


def pixels(png: bytes) -> Pixels:
    """A picture as an array of rows, columns and red, green, blue from 0 to 1."""
    picture: Pixels = matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]
    return picture


def coloured(picture: Pixels) -> int:
    """Number of pixels in a colour of the tumour: red, green or yellow, not grey, nor blue like the crosshair."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    return int(((np.ptp(picture, axis=-1) > 0.2) & (blue <= np.maximum(red, green))).sum())


def grey(picture: Pixels) -> int:
    """Number of grey pixels: neither coloured, nor black, nor white."""
    level = picture.mean(axis=-1)
    return int(((np.ptp(picture, axis=-1) < 0.05) & (level > 0.1) & (level < 0.9)).sum())


#: A viewer with a head has at least this many grey pixels; names, letters and lines alone have about 10,000.
BRAIN = 50_000


def tiles(canvas: Any) -> dict[str, Pixels]:
    """The views of a viewer's canvas as displayed, by name; " beside" ends the name of one for comparison."""
    places = json.loads(canvas.get_attribute("data-tiles") or "[]")
    whole, found = pixels(canvas.screenshot()), {}
    for place in places:
        left, top = round(place["left"]), round(place["top"])
        found[place["view"] + " beside" * place["beside"]] = whole[
            top:top + round(place["height"]), left:left + round(place["width"])]
    return found


def differing(one: Pixels, other: Pixels) -> int:
    """Number of pixels that differ visibly between two pictures; all of them if the sizes differ."""
    if one.shape != other.shape:
        return one[..., 0].size
    return int((np.abs(one - other).max(axis=-1) > 0.1).sum())


def wait_for(what: Callable[[], object], *, seconds: float, why: str | Callable[[], str]) -> None:
    """Waits until `what` is true; fails with `why` after `seconds`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds:g} s: {why() if callable(why) else why}"
        time.sleep(0.5)  # a look costs a picture of the page


def with_parameters(source: Path, **parameters: object) -> Any:
    """A notebook with some of its parameters changed, as papermill would.

    Raises:
        KeyError: unknown parameter.
    """
    notebook = nbformat.read(source, as_version=nbformat.NO_CONVERT)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    known: dict[str, object] = {}
    exec(cell.source, known)
    if missing := set(parameters) - set(known):
        raise KeyError(f"{source.name} has no parameter {', '.join(sorted(missing))}")
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


def require_chromium(program: str | None, *, ci: bool) -> None:
    """Skips the current test without Chromium, with the reason; fails it in continuous integration."""
    if program is None:
        why = "no Chromium here (Debian: apt-get install chromium)"
        pytest.fail(f"{why}; continuous integration must not skip the browser") if ci else pytest.skip(why)


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, without a screen, a GPU or a network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(folder: Path, *, quiet: bool) -> dict[str, str]:
    """The environment of a JupyterLab that reads and writes settings in `folder` only; `quiet` has those of tests."""
    settings = folder / "settings"
    for name, values in SETTINGS.items() if quiet else ():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), "utf-8")
    if quiet:
        page = folder / "config" / "labconfig" / "page_config.json"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(DISABLED), "utf-8")
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
              "IPYTHONDIR": "ipython", "npm_config_cache": "npm"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "PYTEST"))}
    return {**inherited, **{name: str(folder / place) for name, place in places.items()}, "OMP_NUM_THREADS": "1"}
