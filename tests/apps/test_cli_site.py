"""The command line at a site, and from a notebook's cell to an approved file."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlab.apps.cli import main
from fedlab.core.errors import RunError
from fedlab.core.types import SiteState
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.deploy.settings import _toml, read_settings
from fedlab.deploy.technique_file import source_of
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Terms
from fedlab.privacy.accounting.ledger_file import LedgerFile
from folders import write_patient, write_table


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans") / "data"
    names = [f"BraTS2021_0000{k}" for k in range(4)]
    for k, name in enumerate(names):
        write_patient(folder, name, seed=k)
    write_table(folder / "partitioning.csv", ["Partition_ID", "Subject_ID"], [[k % 2, n] for k, n in enumerate(names)])
    return folder


def notebook(path: Path, *cells: str) -> Path:
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell.splitlines(keepends=True)}
                                          for cell in cells]}), encoding="utf-8")
    return path


CELLS = ("import torch\nfrom fedlab import Privacy, federate\nimport os.path as place\n%matplotlib inline\n!ls",
         "BOUND = 0.01\nsites = make_cohort(sites=3)\nfor k in range(3):\n    print(k)",
         "def cut_at(update, keep):\n    return update.quantile_abs(1 - keep)",
         "class Share(Privacy):\n    broken = True", "%%html\n<b>class Share</b>", "this is not python",
         "@staticmethod\ndef unused(): ...",
         'class Share(Privacy):\n    """Only the largest."""\n\n    def __init__(self, keep=0.1, bound=BOUND):\n'
         "        self.keep, self.bound = keep, bound\n\n    def protect(self, update, state, rng):\n"
         "        shorter = self.keep if cut_at(update, self.keep) > self.bound else 1.0\n"
         "        return update.map(lambda t: torch.mul(t, shorter))",
         "class Uses(Privacy):\n    def protect(self, update, state, rng):\n        return sites[0]",
         "class Lost(Privacy):\n    def protect(self, update, state, rng):\n        return nowhere(update)")


def test_init_writes_settings_that_say_what_was_given(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["site", "init", "--data", str(scans), "--table", str(scans / "partitioning.csv"), "--partition", "1",
                 "--spacing", "4", "--shape", "32,48,48", "--held-out", "1", "hospital-a"]) == 0
    assert "4 patients" in capsys.readouterr().out
    settings = read_settings("hospital-a")
    assert (settings.name, settings.data, settings.partition) == ("hospital-a", scans, "1")
    assert (settings.spacing_mm, settings.shape, settings.held_out) == (4.0, (32, 48, 48), 1.0)
    assert settings.policy.require == () and not settings.policy.approved
    before = Path("hospital-a/site.toml").read_bytes()
    assert main(["site", "init", "--data", str(scans), "hospital-a"]) == 1
    assert "is not empty and is left as it is" in capsys.readouterr().err
    assert Path("hospital-a/site.toml").read_bytes() == before


def test_init_refuses_a_folder_without_patients_and_leaves_nothing(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "init", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "made"), "a"]) == 1
    assert "none" in capsys.readouterr().err and not (tmp_path / "made").exists()


@pytest.fixture
def folder(scans: Path, tmp_path: Path) -> Path:
    assert main(["site", "init", "--data", str(scans), "--out", str(tmp_path / "a"), "a"]) == 0
    return tmp_path / "a"


def test_every_line_of_the_template_that_is_commented_out_is_a_setting(folder: Path,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "site.toml").read_text(encoding="utf-8")
    lines = [line[2:] if line.startswith("# ") and (" = " in line.split("#")[1] or line.startswith("# [")) and
             not line.startswith(("# Tech", "# Noise", "# This", "# Every")) else line for line in text.splitlines()]
    (folder / "site.toml").write_text("\n".join(lines), encoding="utf-8")
    settings = read_settings(folder)
    assert settings.policy.secure_mode and settings.policy.max_rounds == 100 and settings.policy.min_sites == 3
    assert settings.policy.budgets == {"patient": Budget(epsilon=8.0, delta=1e-3)}
    assert [required.technique for required in settings.policy.require] == ["SecureAggregation", "DPSGD"]
    assert settings.policy.require[1].least == {"noise_multiplier": 0.8}
    assert settings.policy.installed == ("my_hospital.networks",) and settings.held_out == 0.2
    assert settings.policy == SitePolicy(
        require=settings.policy.require, budgets=settings.policy.budgets, installed=settings.policy.installed,
        secure_mode=True, max_rounds=100, max_updates=500, min_sites=3, max_steps=200, max_batch=16, max_crops=4,
        max_passes=10, broadcast_clip=(0.01, 10.0))
    assert main(["site", "show", str(folder)]) == 0
    printed = capsys.readouterr().out
    for words in ("at most 200 optimiser steps per round (max_steps)", "at most 16 patients per step (max_batch)",
                  "at most 4 crops of a patient per gradient (max_crops)", "at most 10 passes per round (max_passes)",
                  "a broadcast clipping norm lies between 0.01 and 10", "max_updates = 500", "secure_mode"):
        assert words in printed


def test_the_help_shows_every_rule_in_an_example_that_is_valid(folder: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["site", "init", "--help"])
    example = capsys.readouterr().out.partition("  [policy]\n")[2].partition("\npositional")[0]
    example = "\n".join(line.strip() for line in example.splitlines())
    path = folder / "site.toml"
    before = path.read_text(encoding="utf-8").partition("[policy]")[0]
    path.write_text(f"{before}[policy]\n{example}", encoding="utf-8")
    shown = {f.name for f in fields(SitePolicy) if f"{f.name} = " in example} | {"budgets"}
    assert shown == {f.name for f in fields(SitePolicy)} - {"approved", "installed", "tell_errors"}
    assert read_settings(folder).policy.max_crops == 4


def test_the_budget_of_a_required_technique_is_limited_by_its_own_name() -> None:
    read = Required.read({"technique": "DPSGD", "max_epsilon": 3.0, "max_clip": 1.0, "secure_mode": True})
    assert read == Required(technique="DPSGD", most={"max_epsilon": 3.0, "clip": 1.0}, exactly={"secure_mode": True})


@pytest.mark.parametrize(("old", "new", "words"), [
    ("[policy]", "[policy]\nmax_epsilon = 3", "knows .*budget"), ("[policy]", "[polcy]", "unknown tables .'polcy'"),
    ("[policy]", "[policy]\nmax_rounds = 0", "positive whole"), ("[policy]", "[policy]\nsecure_mode = 1", "true or"),
    ("[policy]", "[policy]\nrequire = [3]", "name or a table"), ("[policy]", "[policy", "cannot be read"),
    ("[policy]", "[policy.budget.patient]\nmax_epsilon = 3.0\n[policy]", "max_epsilon and delta"),
    ("[policy]", "[policy.budget.cat]\nmax_epsilon = 3.0\ndelta = 0.1\n[policy]", "per 'patient'"),
    ("[policy.approved]", "[policy.approved]\nx = 'abc'", "64 hexadecimal"), ("name =", "nam =", "knows .*name"),
    ("[policy]", "[policy]\nrequire = [{technique = 'DPSGD', min_noise_multiplier = 'x'}]", "is a number"),
])
def test_invalid_settings_are_refused(folder: Path, old: str, new: str, words: str) -> None:
    path = folder / "site.toml"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises((ValueError, RunError), match=words):
        read_settings(folder)


@given(st.text(), st.lists(st.integers(-5, 5)))
def test_text_is_written_as_toml_reads_it(text: str, numbers: list[int]) -> None:
    import tomllib

    if not any(0xD800 <= ord(character) <= 0xDFFF or character == "\x7f" for character in text):
        assert tomllib.loads(f"a = {_toml(text)}\nb = {_toml(numbers)}") == {"a": text, "b": numbers}


def test_show_prints_policy_and_what_was_spent_with_its_terms(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "show", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "nothing was released" in printed and "demands nothing" in printed
    state = SiteState()
    with LedgerFile(folder / "ledger", "a").kept(state):
        ledger = Ledger.open(state, site="a", round=0, stream="s")
        ledger.charge(Gaussian(noise_multiplier=1.0, sample_rate=0.5, steps=3),
                      terms=Terms(unit="patient", delta=1e-3, adjacency="add or remove one patient"))
    with (folder / "site.toml").open("a", encoding="utf-8") as file:
        file.write("\n[policy.budget.patient]\nmax_epsilon = 8.0\ndelta = 0.001\n")
    assert main(["site", "show", str(folder)]) == 0
    printed = capsys.readouterr().out
    (spent,) = LedgerFile(folder / "ledger", "a").read().spent()
    assert str(spent) in printed and "per patient (add or remove one patient, rdp accountant)" in printed
    assert "the budget is ε = 8" in printed and "spends at most ε = 8 per patient at δ = 0.001" in printed


def test_approve_shows_asks_copies_and_enters_the_hash(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my_technique.py"
    file.write_text("secret = 'what it does'  # \x1b[2J\n", encoding="utf-8")
    before = (folder / "site.toml").read_text(encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    assert main(["site", "approve", str(folder), str(file)]) == 1
    printed = capsys.readouterr().out
    assert "what it does" in printed and "\x1b" not in printed
    assert (folder / "site.toml").read_text(encoding="utf-8") == before and not any((folder / "techniques").iterdir())
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    assert main(["site", "approve", str(folder), str(file)]) == 0
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_settings(folder).policy.approved == {"my_technique": digest}
    assert (folder / "techniques" / "my_technique.py").read_bytes() == file.read_bytes()
    kept = (folder / "site.toml").read_text(encoding="utf-8").splitlines()
    kept.remove(f'my_technique = "{digest}"')
    assert kept == before.splitlines()
    file.write_text("other", encoding="utf-8")
    assert main(["site", "approve", "--yes", str(folder), str(file)]) == 1
    assert "exists with another content" in capsys.readouterr().err
    (folder / "techniques" / "my_technique.py").write_text("changed", encoding="utf-8")
    assert main(["site", "show", str(folder)]) == 0
    assert "CHANGED" in capsys.readouterr().out


def test_a_class_is_taken_with_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", *CELLS)
    text = source_of(path, "Share")
    assert "class Share" in text and "def cut_at" in text and "BOUND = 0.01" in text and "import torch" in text
    assert text.index("def cut_at") < text.index("class Share") and text.count("class Share") == 1
    for left_out in ("make_cohort", "federate", "place", "unused", "broken", "html"):
        assert left_out not in text
    made: dict[str, Any] = {}
    exec(compile(text, "share.py", "exec"), made)
    assert made["Share"](keep=0.5).bound == 0.01
    for name, words in (("Uses", "computes .*make_cohort"), ("Lost", "nowhere.*no cell"),
                        ("Gone", "Lost, Share, Uses")):
        with pytest.raises(RunError, match=words):
            source_of(path, name)
    with pytest.raises(RunError, match="no readable notebook"):
        source_of(tmp_path / "none.ipynb", "Share")


def test_export_writes_a_file_that_was_imported_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    path, target = notebook(tmp_path / "n.ipynb", *CELLS), tmp_path / "share_it.py"
    assert main(["export", "technique", "Share", "--from", str(path), "--to", str(target), "--call",
                 "Share(keep=0.5)"]) == 0
    printed = capsys.readouterr().out
    assert "fails closed" in printed and f"sha256:  {hashlib.sha256(target.read_bytes()).hexdigest()}" in printed
    monkeypatch.syspath_prepend(tmp_path)
    assert repr(importlib.import_module("share_it").Share()) == "Share(keep=0.1, bound=0.01)"
    before = target.read_bytes()
    assert main(["export", "technique", "Share", "--from", str(path), "--to", str(target)]) == 1
    assert "not overwritten" in capsys.readouterr().err and target.read_bytes() == before


@pytest.mark.parametrize(("cell", "words"), [
    ("class Bad:\n    pass", "no class derived from fedlab.Privacy"),
    ("from fedlab import Privacy\nclass Bad(Privacy):\n    def __init__(self, keep):\n        self.keep = keep",
     "needs arguments"),
])
def test_export_writes_nothing_where_the_technique_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str,
                                                         words: str) -> None:
    path, target = notebook(tmp_path / "n.ipynb", cell), tmp_path / "bad_one.py"
    assert main(["export", "technique", "Bad", "--from", str(path), "--to", str(target)]) == 1
    assert words in capsys.readouterr().err and not target.exists()


@pytest.mark.parametrize("command", [["site"], ["site", "init"], ["site", "show"], ["site", "approve"], ["export"],
                                     ["export", "technique"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 150
