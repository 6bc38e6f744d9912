"""The README's example runs as it stands, as a script of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_example_runs(repository: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    script = tmp_path / "example.py"
    script.write_text(blocks[0], encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600,
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


def test_what_it_points_to_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    named = r"`((?:notebooks|fedlab|benchmarks|data_cards)/[\w./-]*|[A-Z]+\.(?:md|cff))`|\]\(([\w./-]+)\)"
    paths = re.findall(named, text)
    assert len(paths) >= 5
    assert [p for pair in paths for p in pair if p and not (repository / p).exists()] == []
