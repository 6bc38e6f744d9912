"""Functions and classes of notebooks and of files beside them are known by their code, in any process."""

from __future__ import annotations

import json
import linecache
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fedlab.run.recipe import recipe
from warm import PYTHON

CELLS = iter(range(10**6))


def notebook(*cells: str) -> dict[str, Any]:
    """The globals of a kernel after some cells, whose sources are in no file."""
    shared: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        name, source = f"<ipython-input-{next(CELLS)}>", textwrap.dedent(cell)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), shared)
    return shared


PART = """
    FACTOR = {factor}
    class Base:
        table = ({table}, 2)
        @staticmethod
        def scaled(x):
            return x * {static}
        @property
        def half(self):
            return {half}
        def __getitem__(self, round):
            return {item}
    class Schedule(Base):
        def __init__(self, start):
            self.start = start
        def __call__(self, round):
            return self.scaled(self.start) * helper(round) * self.half + self[round]
    def helper(x):
        return FACTOR ** x
    def twice(function):
        import functools
        @functools.wraps(function)
        def wrapper(round):
            return {twice} * function(round)
        return wrapper
    @twice
    def plain(round):
        return helper(round)
    made = [Schedule({start}), plain]
    """
DEFAULT = dict(factor=0.9, table=1, static=1, half=0.5, item=0.0, twice=2, start=1e-3)


def made(**changes: object) -> object:
    """Objects of a notebook, with some constants changed."""
    return notebook(PART.format(**{**DEFAULT, **changes}))["made"]


@pytest.mark.parametrize("name", DEFAULT)
def test_every_constant_that_the_code_of_a_notebook_uses_counts(name):
    assert recipe(made()) == recipe(made())
    assert recipe(made()) != recipe(made(**{name: 7}))


def test_comments_layout_cells_and_names_that_are_not_used_do_not_count():
    plain = "rate = 0.9\ndef schedule(round):\n    return 1e-3 * rate ** round\n"
    spaced = "x = 3\n\ndef schedule(round):  # decays\n    # slowly\n    return (1e-3 *\n            rate ** round)\n"
    one, other = notebook(plain)["schedule"], notebook("rate = 0.9\nround = 5", spaced)["schedule"]
    assert recipe(one) == recipe(other)
    assert recipe(one) != recipe(notebook(plain, "rate = 0.8")["schedule"])


def test_a_global_with_the_name_of_an_attribute_does_not_count():
    source = "def loss(x, y):\n    return (x.mean() - y.size).weight\n"
    assert recipe(notebook(source, "mean = 1; size = 2; weight = 3")["loss"]) == recipe(
        notebook(source, "mean = 4")["loss"])


def test_the_line_around_a_lambda_does_not_count():
    short = notebook("made = dict(lr=lambda r: 1e-3 / (1 + r), rounds=1)")["made"]["lr"]
    other = notebook("made = dict(rounds=20,  # more\n    lr=lambda r: 1e-3 / (1 + r))")["made"]["lr"]
    assert recipe(short) == recipe(other)


def test_functions_of_a_file_beside_the_notebook_count_where_they_are_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number, scale in enumerate((2, 2, 3)):
        (tmp_path / f"helpers_{number}.py").write_text(f"def scale(x):\n    return {scale} * x\ndef unused():\n"
                                                       f"    return {number}\n")
        cell = f"import helpers_{number} as helpers\ndef schedule(r):\n    return helpers.scale(r)"
        found.append(json.dumps(recipe(notebook(cell)["schedule"])).replace(f"helpers_{number}", "helpers"))
    assert found[0] == found[1] != found[2]


SCRIPT = """
    import linecache, sys
    import torch
    from fedlab.core.types import Site
    from fedlab.privacy import DPSGD, TopK
    from fedlab.run.recipe import recipe_sha256
    from fedlab.training.trainer import SiteTrainer
    from monai.losses import DiceFocalLoss
    from cohorts import TinyNet

    cell = '''
    WORDS = {"alpha", "beta", "gamma", "delta"}
    def helper(x):
        return x if x in {"one", "two", "three", "four"} else len(WORDS)
    class Mine(torch.nn.Module):
        def forward(self, x, y):
            return ((x - y) ** 2).mean() * helper("one")
    part = SiteTrainer(model=TinyNet(), steps=2, loss=Mine(), lr=lambda r: 1e-3 * (r in {1, 2, 3}) + helper("x"),
                       optimiser=lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))
    '''
    name = sys.argv[1]
    source = cell
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"))
    parts = [part, DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-3, batch=2) + TopK(keep=0.1),
             DiceFocalLoss(sigmoid=True), {"x": {"a", "b", "c", "d"}}]
    print(recipe_sha256(parts))
    """


def test_another_process_and_a_restarted_kernel_find_the_same_recipe():
    printed = []
    for number, python in ((1, PYTHON), (2, (sys.executable,))):  # hashes of texts differ
        out = subprocess.run([*python, "-c", textwrap.dedent(SCRIPT), f"<ipython-input-{number}>"],
                             capture_output=True, text=True, timeout=300,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(
                                 [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
                                 "PYTHONHASHSEED": str(number)})
        assert out.returncode == 0, out.stderr
        printed.append(out.stdout.split()[-1])
    assert printed[0] == printed[1] and len(printed[0]) == 64
