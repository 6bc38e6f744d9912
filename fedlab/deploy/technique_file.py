"""From a notebook's cell to a file: a class with the definitions of other cells that it needs, and nothing else."""

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

_COMPUTING = (ast.Call, ast.Await, ast.Yield, ast.NamedExpr, ast.ListComp, ast.DictComp)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """A statement at the top of a cell: its text, the names that it defines, and the names that it needs."""

    statement: ast.stmt
    text: str
    names: frozenset[str]
    needs: frozenset[str] = frozenset()
    computed: bool = False  # importing it would compute something

    @property
    def imported(self) -> bool:
        return isinstance(self.statement, ast.Import | ast.ImportFrom)


def source_of(notebook: Path | str, name: str) -> str:
    """The source of a module with one class or function of a notebook, and with the imports, functions, classes and
    constants of its cells that it needs. The notebook is read, not run.

    Args:
        notebook: an .ipynb file.
        name: of the class or function; of several definitions the last counts, as after running all cells in order.

    Raises:
        RunError: no notebook, no such name in it, or the name needs something that the notebook computes or that is
            not defined.
    """
    pieces = list(_pieces(Path(notebook)))
    last = {defined: piece for piece in pieces for defined in piece.names}
    if name not in last:
        offered = sorted(n for n, piece in last.items() if isinstance(piece.statement, ast.ClassDef))
        raise RunError(f"{notebook} defines no {name!r} at the top of a cell; its classes are "
                       f"{', '.join(offered) or 'none'}")
    wanted, left = {last[name]}, [last[name]]
    while left:
        for needed in sorted(left.pop().needs):
            found = last.get(needed)
            if found is None and not hasattr(builtins, needed):
                raise RunError(f"{name} uses {needed!r}, which no cell of {notebook} defines by name; import or define "
                               "it there, by its name and not with *")
            if found is not None and found.computed:
                raise RunError(f"{name} uses {needed!r}, which the notebook computes ({found.text[:60]!r}): a file "
                               "must not compute when it is imported. Make it an argument of the constructor, or a "
                               "plain constant")
            if found is not None and found not in wanted:
                wanted.add(found)
                left.append(found)
    imports = "\n".join(sorted({piece.text for piece in wanted if piece.imported}))
    head = [f'"""{name}, from the notebook {Path(notebook).name}."""', "from __future__ import annotations", imports]
    others = [piece.text for piece in pieces if piece in wanted and not piece.imported]
    return "\n\n\n".join(["\n\n".join(filter(None, head)), *others]) + "\n"


def _pieces(notebook: Path) -> Iterator[_Piece]:
    """The statements at the top of all code cells, in order, with one import per name."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{notebook} is no readable notebook ({error})") from error
    for code in map(_without_magics, sources):
        try:
            statements = ast.parse(code).body
        except SyntaxError:
            continue  # a cell that does not run defines nothing
        for statement in statements:
            yield from _read(statement, code)


def _without_magics(source: str) -> str:
    """The cell without IPython's own lines; empty for a cell of another language."""
    lines = source.splitlines()
    if lines and lines[0].lstrip().startswith("%%"):
        if lines[0].split()[0] not in ("%%time", "%%timeit", "%%capture", "%%writefile"):
            return ""
        lines[0] = ""
    return "\n".join("" if line.lstrip().startswith(("%", "!", "?")) else line for line in lines)


def _read(statement: ast.stmt, code: str) -> Iterator[_Piece]:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            if alias.name == "*" or getattr(statement, "module", "") == "__future__":
                continue
            one = ast.Import([alias]) if isinstance(statement, ast.Import) else ast.ImportFrom(
                statement.module, [alias], statement.level)
            name = alias.asname or alias.name.partition(".")[0]
            yield _Piece(statement=statement, text=ast.unparse(one), names=frozenset({name}))
        return
    # The statement as it stands in the cell, with its decorators.
    first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))])
    text = "\n".join(code.splitlines()[first - 1:statement.end_lineno]).rstrip()
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        names, computed = frozenset({statement.name}), False
    else:  # of loops, with-blocks and the like all names count as computed
        names = frozenset(n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        computed = not isinstance(statement, ast.Assign | ast.AnnAssign) or any(
            isinstance(node, _COMPUTING) for node in ast.walk(statement))
    yield _Piece(statement=statement, text=text, names=names, needs=_global_names(text) - names, computed=computed)


def _global_names(text: str) -> frozenset[str]:
    """Names that a statement takes from the module around it, at any depth."""
    def names(table: symtable.SymbolTable) -> Iterator[str]:
        top = table.get_type() == "module"
        yield from (s.get_name() for s in table.get_symbols() if s.is_referenced() and (s.is_global() or top))
        for child in table.get_children():
            yield from names(child)

    return frozenset(names(symtable.symtable(text, "cell", "exec")))
