"""Output of the command line: closed pipes, characters that cannot be written, full disks, and the words of errors."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from fedlab.apps.cli import main
from fedlab.apps.cli_arguments import HELP
from fedlab.apps.comparison import read_job
from fedlab.apps.comparison_results import _notes
from fedlab.core.errors import RunError, SiteError
from fedlab.data.readers.conventions import CONVENTIONS
from fedlab.data.readers.layouts import LAYOUTS
from fedlab.data.sites.partition import Partition
from folders import NEW, ball, save_files, write_patient, write_table
from runs import SMALL, finished_demo

COMMANDS = ["demo", "run", "assess", "resume", "evaluate", "show", "report", "lab", "verify", "data", "data phantom",
            "data inspect", "data fetch", "data card", "site", "site init", "site show", "site approve", "export",
            "export technique", "deploy", "deploy init", "deploy start", "deploy stop", "deploy logs",
            "deploy status", "deploy submit", "deploy abort", "itk", "itk install", "itk remove"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_demo(tmp_path_factory.getbasetemp()).folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans") / "data"
    names = [f"BraTS2021_0000{k}" for k in range(6)]
    for k, name in enumerate(names):
        write_patient(folder, name, seed=k)
    write_table(folder / "sites.csv", ["Partition_ID", "Subject_ID"], [[k % 2, name] for k, name in enumerate(names)])
    write_table(folder / "other.csv", ["site", "patient"], [[1, "A"]])
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


def standard_output(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    """Makes this the process's standard output, as `fedlab` finds it when it starts."""
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, stream)


def closed_pipe() -> io.TextIOWrapper:
    """What a command writes to after `head` has read its lines."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8", closefd=False)


@pytest.mark.parametrize("words", COMMANDS)
def test_help_with_a_closed_pipe_ends_as_usual(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_output(monkeypatch, closed_pipe())
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--help"])
    assert ended.value.code == 0


def test_a_closed_pipe_changes_neither_the_work_nor_the_status(
        demo: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "trace.jsonl"
    damaged.write_bytes((demo / "trace.jsonl").read_bytes()[:-30])
    standard_output(monkeypatch, closed_pipe())
    assert main(["verify", str(demo)]) == 0
    assert main(["verify", str(damaged)]) == 1
    assert main(["data", "inspect", str(scans), "--html", "page.html"]) == 0 and Path("page.html").is_file()
    assert main(["site", "init", "--data", str(scans), "a"]) == 0
    assert main(["site", "show", "a"]) == 0
    assert main(["resume", str(demo)]) == 0


def test_a_missing_output_is_no_error(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_output(monkeypatch, None)  # fedlab verify RUN >&-
    assert main(["verify", str(demo)]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_output_lacks_is_written_as_an_escape(
        scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    assert main(["site", "init", "--data", str(scans), "a"]) == 0
    with (tmp_path / "a" / "site.toml").open("a", encoding="utf-8") as file:
        file.write("\n[policy.budget.patient]\nmax_epsilon = 8.0\ndelta = 0.001\n")
    with (tmp_path / "out").open("w", encoding=encoding) as stream:
        standard_output(monkeypatch, stream)
        assert main(["site", "show", "a"]) == 0
    assert "spends at most \\u03b5 = 8 per patient" in (tmp_path / "out").read_text(encoding=encoding)


def test_a_real_pipe_that_is_closed_and_a_locale_without_the_characters(scans: Path) -> None:
    run = [sys.executable, "-m", "fedlab.apps.cli"]
    c_locale = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    shown = subprocess.run([*run, "site", "show", "--help"], env=c_locale, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "") and "\\u03b5" in shown.stdout
    inspecting = subprocess.Popen([*run, "data", "inspect", "--json", str(scans)], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
    assert inspecting.stdout is not None and inspecting.stderr is not None
    inspecting.stdout.close()
    assert (inspecting.stderr.read(), inspecting.wait()) == ("", 0)
    inspecting.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_an_output_on_a_full_disk_is_said(demo: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        standard_output(monkeypatch, stream)
        assert main(["verify", str(demo)]) == 1
    assert capsys.readouterr().err == "fedlab: the disk is full; free some space, then repeat the command\n"


class HalfWritten:
    """A file on a disk that is full after half of what is written."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.file.write(data[:len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fills the disk for files whose names contain a word; what it returns makes space again."""
    original = Path.open

    def fill(word: str, number: int = errno.ENOSPC) -> Any:
        def opened(path: Path, mode: str = "r", *more: Any, **settings: Any) -> Any:
            if word in path.name and set(mode) & set("wxa"):
                if number != errno.ENOSPC:
                    raise OSError(number, os.strerror(number), str(path))
                return HalfWritten(original(path, mode, *more, **settings))
            return original(path, mode, *more, **settings)

        monkeypatch.setattr(Path, "open", opened)
        return lambda: monkeypatch.setattr(Path, "open", original)

    return fill


def left_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_line_and_leaves_no_half_file(demo: Path, scans: Path, tmp_path: Path, fill_disk: Any,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", str(demo / "model.safetensors"), "--data", str(scans), "--out"]
    for word, arguments, left in (
            ("page", ["data", "inspect", str(scans), "--html", "x/page.html"], set()),
            ("card", ["data", "card", str(scans), "--out", "c"], set()),
            ("croissant", ["data", "card", str(scans), "--out", "d"], {"d/card.md"}),
            ("00000_pred", [*evaluate, "e"], set()),
            ("scores.csv", [*evaluate, "f"], {f"f/BraTS2021_0000{k}_pred.nii.gz" for k in range(6)}),
    ):
        before = left_in(tmp_path)
        empty_disk = fill_disk(word)
        capsys.readouterr()
        assert main(arguments) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedlab: the disk")]
        assert len(said) == 1 and "free some space, then repeat the command" in said[0]
        assert left_in(tmp_path) - before == left
        empty_disk()


def test_a_run_on_a_full_disk_goes_on_when_there_is_space(demo: Path, tmp_path: Path, fill_disk: Any,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    empty_disk = fill_disk("history.json")
    assert main(["demo", *SMALL, "--out", "run"]) == 1
    assert "fedlab: the disk is full: run; free some space, then continue with: fedlab resume run\n" \
        in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.part")) and not (tmp_path / "run" / "summary.json").exists()
    empty_disk()
    assert main(["resume", "run"]) == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (demo, tmp_path / "run")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [
    NO_SPACE, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RunError(f"the checkpoint cannot be written ({NO_SPACE})"), SiteError("a", 0, "keep", f"OSError: {NO_SPACE}")],
    ids=lambda error: type(error).__name__)
def test_a_full_disk_is_recognised_in_the_errors_of_libraries_and_sites(
        error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("fedlab.apps.comparison.run_job", fail)
    assert main(["demo", *SMALL, "--out", "run"]) == 1
    assert capsys.readouterr().err == ("fedlab: the disk is full: run; free some space, then continue with: fedlab "
                                       "resume run\n")


def test_a_mistake_in_fedlab_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlab.apps.comparison.run_job", lambda *_: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        main(["demo", *SMALL, "--out", "run"])


@pytest.mark.parametrize(("number", "words"), [
    (errno.EROFS, "the file system is read-only: x/page.html; choose a path on another one, then repeat the command"),
    (errno.EDQUOT, "the disk quota is used up: x/page.html; free some space, then repeat the command"),
    (errno.EACCES, "permission denied: x/page.html; change the permissions, or choose another path, then repeat the "
                   "command")])
def test_a_disk_that_cannot_be_written_is_named_with_the_remedy(
        scans: Path, fill_disk: Any, number: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill_disk("page", number)
    assert main(["data", "inspect", str(scans), "--html", "x/page.html"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"fedlab: {words}"


@pytest.mark.parametrize(("arguments", "words"), [
    ("run --data {scans} --sites {scans}/sites.csv --spacing 0", "--spacing lies between 0.1 and 20 mm"),
    ("run --data {scans} --sites {scans}/sites.csv --rounds 0", "--rounds is a positive whole number"),
    ("run --data {scans} --sites {scans}/sites.csv --label-convention x", "--label-convention must be one of"),
    ("data phantom --out x --spacing 0.5", "--spacing must be between 1 and 8 mm"),
    ("data phantom --out x --shape 32,32,32", "a larger --spacing"),
    ("data inspect {scans} --label-convention x", "--label-convention must be one of"),
    ("data card {broken}", "pass --skip-broken to continue without these patients"),
    ("evaluate {demo}/model.safetensors --data {scans} --spacing 2", "got --spacing 2; leave it out"),
    ("run --data {scans} --sites none.csv", "there is no table none.csv"),
    ("run --data {scans} --sites {scans}/other.csv", "it has site, patient; rename them\n"),
])
def test_errors_name_the_options_of_the_command(demo: Path, scans: Path, tmp_path: Path, arguments: str, words: str,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("BraTS2021_00000", "BraTS2021_00001"):
        write_patient(tmp_path / "broken", name)
    next((tmp_path / "broken").rglob("*_t2.nii.gz")).write_bytes(b"nothing")
    assert main(arguments.format(demo=demo, scans=scans, broken=tmp_path / "broken").split()) == 1
    said = capsys.readouterr().err
    assert words in said and "spacing_mm" not in said and "label_convention" not in said


def test_run_says_which_scans_of_one_person_stay_together(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ["BraTS-GLI-00001-100", "BraTS-GLI-00001-101", "BraTS-GLI-00002-100", "BraTS-GLI-00003-100"]
    for name in ids:
        save_files(ball(name), tmp_path / "scans" / name, names=NEW, mark="-", convention="brats2023")
    write_table(tmp_path / "t.csv", ["Partition_ID", "Subject_ID"], [[1, name] for name in ids])
    done = []

    def prepare(job: Any, out: Path) -> None:
        done.append(Partition.of(job.source.prepare(seed=job.seed, workers=0)))
        raise RunError("no further")

    monkeypatch.setattr("fedlab.apps.comparison.run_job", prepare)
    said = "1 person has several scans, which stay on one side of the split: BraTS-GLI-00001-100 = BraTS-GLI-00001-101"
    assert main(["run", "--data", "scans", "--sites", "t.csv", "--out", "run"]) == 1
    assert said in capsys.readouterr().err
    outcome: Any = SimpleNamespace(job=read_job(Path("run")), sites=[], partition=done[0], arms={}, histories={},
                                   main="federated")
    assert f"{said}." in _notes(outcome, {"empty_regions": "none"})


def test_the_question_of_approve_needs_a_terminal(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "init", "--data", str(scans), "a"]) == 0
    (tmp_path / "mine.py").write_text("x = 3\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["site", "approve", "a", "mine.py"]) == 1
    assert "pass --yes" in capsys.readouterr().err and not (tmp_path / "a" / "techniques" / "mine.py").exists()


def test_the_help_names_every_layout_and_convention_and_no_other() -> None:
    texts = HELP["shared"]
    layouts = texts["--layout"].split(" (")[0].replace(" or ", ", ").split(", ")
    assert layouts == list(LAYOUTS)
    named = [word for word in texts["--label-convention"].replace(",", " ").split() if word in CONVENTIONS]
    assert named == list(CONVENTIONS)


def test_every_text_of_the_help_belongs_to_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for words in COMMANDS:
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        printed = "".join(capsys.readouterr().out.split())
        texts: Any = HELP
        for word in words.split():
            texts = texts[word]
        for line in texts.get("arguments", {}).values():
            assert "".join(line.split()) in printed, f"{words}: {line}"


