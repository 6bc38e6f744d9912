"""The README's example runs as it stands, as a script of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from warm import PYTHON


def test_the_example_runs(repository: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    script = tmp_path / "example.py"
    script.write_text(blocks[0], encoding="utf-8")
    done = subprocess.run([*PYTHON, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "FEDLAB_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "8 of 8 rounds" in done.stdout and re.search(r"WT +0\.\d", done.stdout)


def test_it_fits_on_three_screens(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    assert text.count("![") == 1, "one picture"
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 15


def test_three_pictures_show_what_make_lab_offers(repository: Path) -> None:
    """tests/browser/pictures.py makes them."""
    (table,) = re.findall(r"<table>.*?</table>", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = re.findall(r'<img src="([^"]+)" width="270" alt="([^"]+)">', table)
    assert [Path(file).stem for file, _ in shown] == ["viewer", "dashboard", "playground"]
    assert table.count("<tr>") == 1 and table.count("<td") == 3, "side by side in one row"
    files = [(repository / file).read_bytes() for file, _ in shown]
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in files)
    assert sum(map(len, files)) <= 400_000


def test_what_it_points_to_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    named = r"`((?:notebooks|fedlab|benchmarks|data_cards)/[\w./-]*|[A-Z]+\.(?:md|cff))`|\]\(([\w./-]+)\)"
    paths = re.findall(named, text)
    assert len(paths) >= 5
    assert [p for pair in paths for p in pair if p and not (repository / p).exists()] == []


def test_the_figures_of_the_demo_are_those_of_this_generator_start_and_settings(repository: Path, monkeypatch) -> None:
    """Run benchmarks/demo.py again when this fails: something that its results depend on has changed since."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import demo

    kept = json.loads((repository / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    assert kept["result"]["settings"] == demo.settings()
    text = (repository / "README.md").read_text(encoding="utf-8")
    shown = text[text.index(demo.MARKS[0]) : text.index(demo.MARKS[1])]
    made = demo.section(kept["result"], "first line\nprinted", kept["machine"]).removesuffix(demo.MARKS[1])
    assert shown.split("```")[2] == made.split("```")[2] and shown.split("```")[0] == made.split("```")[0]
    for arm, dice in kept["result"]["seeds"]["0"]["dice"].items():
        assert "".join(f"{dice[name]:8.3f}" for name in ("WT", "TC", "ET", "mean")) in shown, arm
