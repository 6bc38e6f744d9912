"""The form of the notebooks. That they run, and that their marked outputs hold, is checked by nbval (`make test`)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

import fedlab

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CHECKED, THUMBNAIL = "nbval-check-output", "thumbnail"
LONGEST_CELL, LONGEST_FUNCTION = 15, 20
CLOSING = ["What could go wrong", "Recap", "Exercises", "References"]
#: A path from the root of a file system, of a home directory or of a Windows drive; not the "/" of a fraction or URL.
ABSOLUTE = re.compile(r"""(?<![\w/:.<>~])/(?!/)[A-Za-z_][\w.-]*/[\w.-]|(?<!\w)~/\w|(?<!\w)[A-Za-z]:\\""")

TEX = re.compile(r"\$\$|\\begin\{|(?<![\w$\\])\$[^\s$][^$\n]*\$")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, f"no notebook in {FOLDER.name}/: every other test here would pass unseen"


def test_valid_and_clean(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    extra = set(notebook.metadata) - {"kernelspec", "language_info"}
    assert not extra, f"state of a tool or a widget in the metadata: {sorted(extra)}"
    assert set(notebook.metadata.language_info) == {"name"}, "the version of one machine's Python"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, f"cell {cell.id}: {sorted(cell.metadata)}"


def test_stripped_but_for_checked_text(notebook: Any) -> None:
    for cell in code(notebook):
        assert "NBVAL_" not in cell.source, f"cell {cell.id}: a reader sees this mark; use the tag {CHECKED}"
        if CHECKED not in cell.metadata.get("tags", ()):
            assert not cell.outputs, f"cell {cell.id} holds outputs; strip it, or give it the tag {CHECKED}"
            assert cell.execution_count is None, f"cell {cell.id} holds a number of its execution; strip it"
            continue
        assert cell.execution_count is not None, f"cell {cell.id}: nbval refuses an output without execution_count"
        kinds = {(output.output_type, output.get("name")) for output in cell.outputs}
        assert kinds == {("stream", "stdout")}, f"cell {cell.id} is compared, so it prints text and no more: {kinds}"


def test_checked_text_speaks_to_the_reader(notebook: Any) -> None:
    for cell in code(notebook):
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert not re.search(r": (True|False)\b", said), f"cell {cell.id} prints a test's result; say what it means"


def test_one_figure_stands_for_the_notebook(notebook: Any) -> None:
    tagged = [cell for cell in notebook.cells if THUMBNAIL in cell.metadata.get("tags", ())]
    assert [cell.cell_type for cell in tagged] == ["code"], f"one cell of code has the tag {THUMBNAIL}"


def test_opens_with_a_title_and_a_promise(notebook: Any) -> None:
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source), "the first cell is the title"
    assert len(re.findall(r"(?<!\w)You will ", first.source)) == 1, "it says in one sentence what 'You will' do"
    assert re.search(r"\b(minutes?|seconds)\b", first.source) and re.search(r"\b(CPU|GPU)\b", first.source), \
        "the promise says how long it takes on which hardware"


def test_one_cell_of_imports_and_then_one_of_parameters(notebook: Any) -> None:
    cells = code(notebook)
    importing = [cell.id for cell in cells
                 if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(cell.source)))]
    assert importing == [cells[0].id], "one cell imports, and it is the first"
    tagged = [cell.id for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert tagged == [cells[1].id], "one cell is tagged 'parameters', the one after the imports"
    assert "fl.core.need_lab()" in cells[0].source, "the first cell checks what the notebook needs"
    statements = ast.parse(cells[1].source).body
    assert all(isinstance(node, ast.Assign | ast.AnnAssign) for node in statements), "parameters are assignments only"


def test_short_cells(notebook: Any) -> None:
    for cell in code(notebook):
        length = len(cell.source.splitlines())
        assert length <= LONGEST_CELL, f"cell {cell.id} has {length} lines, more than {LONGEST_CELL}; split it"
        for node in functions(ast.parse(cell.source)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name}() has {lines} lines: it belongs in fedlab"


def test_code_is_explained(notebook: Any) -> None:
    for earlier, cell, later in zip(notebook.cells[2:], notebook.cells[3:], notebook.cells[4:], strict=False):
        kinds = (earlier.cell_type, cell.cell_type, later.cell_type)
        assert kinds != ("code", "code", "code"), f"three cells of code in a row around {cell.id}, and no word between"


def test_sections(notebook: Any) -> None:
    heads = [line.removeprefix("## ") for cell in prose(notebook) for line in cell.source.splitlines()
             if line.startswith("## ")]
    assert heads[-len(CLOSING):] == CLOSING
    exercises = next(cell.source for cell in prose(notebook) if cell.source.startswith("## Exercises"))
    tasks, _, solutions = exercises.partition("<details>")
    for part in (tasks, solutions):
        assert re.findall(r"^(\d)\.", part, re.MULTILINE) == ["1", "2", "3"], "three exercises, each with a solution"
    assert "<summary>" in solutions and solutions.rstrip().endswith("</details>"), "solutions are folded away"


def test_references_are_listed_and_used(notebook: Any) -> None:
    listed = next(cell.source for cell in prose(notebook) if cell.source.startswith("## References"))
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", listed, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    cited = [int(n) for cell in prose(notebook) for n in re.findall(r"\[(\d+)\](?!\()", cell.source)]
    assert set(cited) == set(numbers), "every reference is cited in the text, and nothing else is"
    first = list(dict.fromkeys(cited))
    assert all(a < b for a, b in pairwise(first)), f"references are numbered as they first come: {first}"


def test_what_you_see_follows_what_is_seen(notebook: Any) -> None:
    seen = [number for number, cell in enumerate(notebook.cells) if cell.source.startswith("**What you see.**")]
    assert len(seen) >= 2, "figures are explained below them, under 'What you see.'"
    for number in seen:
        assert notebook.cells[number - 1].cell_type == "code", f"nothing is seen above cell {notebook.cells[number].id}"


def test_no_tex(notebook: Any) -> None:
    """It would have to be drawn by a script from elsewhere, in the gallery and in exports."""
    for cell in prose(notebook):
        found = TEX.search(cell.source)
        assert not found, f"cell {cell.id}: write {found[0]!r} without TeX, as in ε or x²"


def test_other_notebooks_that_are_named_exist(notebook: Any) -> None:
    numbers = {path.stem[:2] for path in NOTEBOOKS}
    for cell in prose(notebook):
        gone = set(re.findall(r"\bnotebook (\d\d)\b", cell.source)) - numbers
        assert not gone, f"cell {cell.id} names notebook {', '.join(sorted(gone))}, which isn't there"
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", cell.source)
        assert all((FOLDER / link).is_file() for link in links), f"cell {cell.id}: one of {links} isn't there"


def test_the_map_of_the_series_is_what_there_is() -> None:
    welcome, *others = [nbformat.read(path, as_version=nbformat.NO_CONVERT) for path in NOTEBOOKS]
    titles = [other.cells[0].source.splitlines()[0].removeprefix("# ") for other in others]
    series = next(cell.source for cell in prose(welcome) if "\n| [" in cell.source)
    listed = re.findall(r"^\| \[(\d\d) (.+?)\]\((\S+)\.ipynb\) \| \S", series, re.MULTILINE)
    assert listed == [(path.stem[:2], title, path.stem) for path, title in zip(NOTEBOOKS[1:], titles, strict=True)]


def namespace(node: ast.expr) -> ModuleType | None:
    """The package that `fl` or `fl.privacy` stands for; None for any other expression."""
    if isinstance(node, ast.Name):
        return fedlab if node.id == "fl" else None
    if isinstance(node, ast.Attribute) and namespace(node.value) is fedlab:
        found = getattr(fedlab, node.attr, None)
        return found if isinstance(found, ModuleType) else None
    return None


def test_uses_public_names_only(notebook: Any) -> None:
    """Also of the code in solutions, which nothing runs."""
    fenced = [re.sub(r"(?m)^ +", "", block) for cell in prose(notebook)
              for block in re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)]
    for source in [*(cell.source for cell in code(notebook)), *fenced]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and (place := namespace(node.value)) is not None:
                assert node.attr in place.__all__, f"{ast.unparse(node)} is not a public name of fedlab"
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            inner = [name for name in modules if name.startswith("fedlab.")]
            assert not inner, f"a notebook imports {inner}; what users need is a public name of fedlab"


def test_no_absolute_paths(notebook: Any) -> None:
    for cell in notebook.cells:
        for text in [cell.source, *(output.get("text", "") for output in cell.get("outputs", ()))]:
            found = ABSOLUTE.search(text)
            assert not found, f"cell {cell.id} names a place of one machine: ...{text[found.start():][:40]!r}"


@pytest.mark.parametrize("text, place", [
    ("open('/srv/scans/x.txt')", True), ("in /home/me/data", True), ("~/scans", True), (r"C:\scans", True),
    ("federated / centralised", False), ("`runs/a/report.html`", False), ("WT/TC/ET", False),
    ("https://example.org/a/b", False), ("../shared/data", False), ("a<br/>b/c", False), ("</details>", False),
])
def test_absolute_paths_are_recognised(text: str, place: bool) -> None:
    assert bool(ABSOLUTE.search(text)) is place
