"""From a notebook's cell to a file: a class with what it needs of the notebook's other cells, and nothing else."""

from __future__ import annotations

import ast
import builtins
import json
import symtable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlab.core.errors import RunError

__all__ = ["source_of"]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A statement at the top of a cell: its text, and the names that it gives and needs."""

    place: int
    text: str
    names: frozenset[str]
    needs: frozenset[str]
    computed: bool = False


def source_of(notebook: Path | str, name: str) -> str:
    """The source of a module with one class or function of a notebook, and with the imports, functions, classes and
    constants of its cells that it needs. The notebook is read, not run.

    Args:
        notebook: an .ipynb file.
        name: of the class or function; defined twice, the last one counts, as after running all cells in order.

    Raises:
        RunError: no notebook, no such name in it, or the name needs something that the notebook computes or that
            nobody defines.
    """
    pieces = _pieces(Path(notebook))
    last = {given: piece for piece in pieces for given in piece.names}
    if name not in last:
        offered = sorted(n for n, piece in last.items() if piece.text.lstrip().startswith(("class ", "@")))
        raise RunError(f"{notebook} defines no {name!r} at the top of a cell; its classes are "
                       f"{', '.join(offered) or 'none'}")
    wanted, left = {last[name]}, [last[name]]
    while left:
        piece = left.pop()
        for needed in sorted(piece.needs):
            if needed in last:
                found = last[needed]
                if found.computed:
                    raise RunError(f"{name} uses {needed!r}, which the notebook computes ({found.text[:60]!r}): a file "
                                   "must not compute when it is imported. Make it an argument of the constructor, or a "
                                   "plain constant")
                if found not in wanted:
                    wanted.add(found)
                    left.append(found)
            elif not hasattr(builtins, needed):
                raise RunError(f"{name} uses {needed!r}, which no cell of {notebook} defines by name; import or define "
                               "it there, by its name and not with *")
    ordered = sorted(wanted, key=lambda piece: piece.place)
    imports = sorted({piece.text for piece in ordered if piece.text.startswith(("import ", "from "))})
    others = [piece.text for piece in ordered if not piece.text.startswith(("import ", "from "))]
    head = f'"""{name}, from the notebook {Path(notebook).name}."""\n\nfrom __future__ import annotations\n'
    return "\n\n".join(filter(None, [head + ("\n" + "\n".join(imports) if imports else "")])) + "\n\n\n" + \
        "\n\n\n".join(others) + "\n"


def _pieces(notebook: Path) -> list[_Piece]:
    """The statements at the top of all code cells, in order, an import for each name."""
    try:
        cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
                 if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{notebook} is no notebook that can be read ({error})") from error
    found: list[_Piece] = []
    for source in sources:
        code = _without_magics(source)
        try:
            statements = ast.parse(code).body
        except SyntaxError:
            continue  # a cell that doesn't run defines nothing
        for statement in statements:
            found += [_Piece(place=len(found) + k, text=text, names=names, needs=needs, computed=computed)
                      for k, (text, names, needs, computed) in enumerate(_read(statement, code))]
    return found


def _without_magics(source: str) -> str:
    """The cell without IPython's own lines; a cell that is another language's is empty."""
    lines = source.splitlines()
    if lines and lines[0].lstrip().startswith("%%"):
        if lines[0].split()[0] not in ("%%time", "%%timeit", "%%capture", "%%writefile"):
            return ""
        lines[0] = ""
    return "\n".join("" if line.lstrip().startswith(("%", "!", "?")) else line for line in lines)


def _read(statement: ast.stmt, code: str) -> Iterator[tuple[str, frozenset[str], frozenset[str], bool]]:
    """Text, names given, names needed, and whether importing it would compute something."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            if alias.name == "*" or getattr(statement, "module", "") == "__future__":
                continue
            one = ast.Import([alias]) if isinstance(statement, ast.Import) else ast.ImportFrom(
                statement.module, [alias], statement.level)
            given = alias.asname or alias.name.partition(".")[0]
            yield ast.unparse(one), frozenset({given}), frozenset(), False
        return
    text = _text(statement, code)
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield text, frozenset({statement.name}), _needs(text) - {statement.name}, False
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = frozenset(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        computed = any(isinstance(node, ast.Call | ast.Await | ast.Yield | ast.NamedExpr | ast.ListComp | ast.DictComp)
                       for node in ast.walk(statement))
        yield text, names, _needs(text) - names, computed
    else:  # loops, with-blocks and the like give names by computing
        names = frozenset(node.id for node in ast.walk(statement)
                          if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        if names:
            yield text, names, frozenset(), True


def _text(statement: ast.stmt, code: str) -> str:
    """The statement as it stands in the cell, with its decorators."""
    first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))])
    return "\n".join(code.splitlines()[first - 1:statement.end_lineno]).rstrip()


def _needs(text: str) -> frozenset[str]:
    """Names that a statement takes from the module around it, however deep inside."""
    found: set[str] = set()

    def walk(table: symtable.SymbolTable) -> None:
        top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or top):
                found.add(symbol.get_name())
        for child in table.get_children():
            walk(child)

    walk(symtable.symtable(text, "cell", "exec"))
    return frozenset(found)
