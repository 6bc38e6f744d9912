"""`fedlab assess`: evidence on the techniques of a file, in a run directory that continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlab.apps.assessing import assess_file
from fedlab.apps.cli import main
from fedlab.apps.comparison import Job
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.errors import RunError

FILE = """
import torch
import fedlab as fl

class Halved(fl.Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t / 2)

trainer = fl.SiteTrainer(model=torch.nn.Conv3d(4, 3, 1), lr=1e-2, steps=1, crop=(16, 16, 16), augment=None)
techniques = {"halved": Halved()}
attacks = {"by the model": fl.evidence.ModelMembership()}
"""


@pytest.fixture
def file(tmp_path: Path, tmp_path_factory, monkeypatch) -> Path:
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_a_file_of_techniques_gives_a_page_and_its_numbers(file, tmp_path, monkeypatch, capsys):
    small = Phantoms(sizes=(2, 2), shape=(32, 32, 32), spacing_mm=6.0, held_out=1)
    monkeypatch.setattr("fedlab.apps.comparison_data.Phantoms", lambda: small)
    out = tmp_path / "out"
    assert main(["assess", str(file), "--rounds", "1", "--seeds", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"page: {out / 'page.html'}" in said and "halved: reaches Dice" in said
    assert "Halved()" in (out / "page.html").read_text(encoding="utf-8")
    found = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    assert set(found["techniques"]) == {"start", "none", "halved"}
    assert list(found["techniques"]["halved"]["findings"]) == ["by the model"]
    assert sorted(path.name for path in out.iterdir()) == ["evidence.json", "page.html", "scores.csv"]
    assert main(["assess", str(file), "--out", str(out)]) == 1
    assert "finished assessment" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("x = 1", "defines no techniques"), ("techniques = 3", "expected a dictionary by name"), ("1 / 0", "division"),
])
def test_a_file_without_techniques_is_refused_and_leaves_no_folder(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=message):
        assess_file(Job(source=Phantoms()), tmp_path / "out", file=path)
    assert not (tmp_path / "out").exists()


def test_scans_come_with_the_table_of_their_sites(capsys, tmp_path):
    assert main(["assess", "--data", str(tmp_path)]) == 1
    assert "--data and --sites go together" in capsys.readouterr().err
