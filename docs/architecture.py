"""The drawing of fedlab's packages and the reading list of its core, made from the imports and the files themselves.

    python docs/architecture.py            rewrites docs/architecture.svg and the reading list in docs/architecture.md
    python docs/architecture.py --check    fails where they differ from the code
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import grimp
import jinja2
import networkx as nx

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the packages of this checkout, whichever is installed
DRAWING, PAGE = REPOSITORY / "docs" / "architecture.svg", REPOSITORY / "docs" / "architecture.md"
BEGIN, END = "<!-- reading list: made by docs/architecture.py -->", "<!-- end of the reading list -->"
#: The packages in the order of their imports, the highest first, and the text in their boxes.
PACKAGES = {
    "apps": "command line, comparison", "view": "viewers, figures, reports", "engines": "processes, NVFLARE",
    "deploy": "plans, policy, site host", "faults": "sites that fail or lie", "evidence": "attacks, contributions",
    "checks": "contract batteries", "topologies": "ring, gossip, tree, buffered", "run": "rounds, checkpoints, traces",
    "data": "readers, phantoms, sites", "privacy": "techniques, ledgers", "strategies": "combining updates",
    "training": "one site, no federation", "core": "words, errors, seeds",
}
#: The core in the order of reading: the words, one site's training, strategies, one round, privacy and DP-SGD.
READING = {
    "core/types.py": "patient, site, update, round; what a site and the server keep",
    "core/protocols.py": "the parts of a run as they see each other, and the run",
    "core/kit.py": "what trains at a site in one round",
    "core/gate.py": "the check that every update passes",
    "core/errors.py": "what can go wrong, and what it is called",
    "core/seeds.py": "one seed for every random choice",
    "core/weights.py": "the weights of a model as tensors, and their hash",
    "training/trainer.py": "one site's training: crops, optimiser, the loop",
    "strategies/averaging.py": "the mean of updates, FedAvg, FedNova",
    "strategies/server_optimisers.py": "the server's step",
    "strategies/client_drift.py": "FedProx, SCAFFOLD, Ditto",
    "strategies/robust.py": "medians, Krum, bounded norms",
    "run/round.py": "one round: select, train, combine, release, step",
    "run/arrivals.py": "a filter over the answers of a round",
    "run/site_task.py": "the one way an update leaves a site",
    "run/federate.py": "the parts bound to a run, and the loop around a round",
    "run/admission.py": "rules by which a run goes on without sites that fail",
    "run/local.py": "the engine of one process",
    "privacy/base.py": "the hooks of a technique",
    "privacy/dp/dpsgd.py": "patient-level DP-SGD",
}
LONGEST = 3500  # lines of the core
WIDTH, HEIGHT, GAP, STEP = 196, 50, 28, 92  # of boxes and between them, in pixels


def packages() -> nx.DiGraph:
    """The packages of fedlab; an edge for each direct import that no chain of other imports implies.

    Only imports that go down the list are drawn; import-linter refuses all others.

    Raises:
        ValueError: `PACKAGES` lists other packages than there are.
    """
    modules, graph, order = grimp.build_graph("fedlab", cache_dir=None), nx.DiGraph(), list(PACKAGES)
    if (found := {name.split(".")[1] for name in modules.find_children("fedlab")}) != set(order):
        raise ValueError(f"PACKAGES in {Path(__file__).name} is out of date: {sorted(found ^ set(order))}")
    for module in sorted(modules.modules):
        for imported in modules.find_modules_directly_imported_by(module):
            pair = [name.split(".")[1] for name in (module, imported) if "." in name]
            if len(pair) == 2 and order.index(pair[0]) < order.index(pair[1]):
                graph.add_edge(*pair)
    return nx.transitive_reduction(graph)


def levels(graph: nx.DiGraph) -> dict[str, int]:
    """The level of each package: 0 for one that imports no other, else one above the highest that it imports."""
    found: dict[str, int] = {}
    for name in reversed(list(nx.lexicographical_topological_sort(graph))):
        found[name] = 1 + max((found[other] for other in graph[name]), default=-1)
    return found


def place(graph: nx.DiGraph, level: Mapping[str, int]) -> tuple[dict[str, tuple[float, float]], list[list[str]]]:
    """Positions of boxes and bends in pixels, and every arrow as the places it passes.

    An arrow across several levels gets a bend in each level between, so that it goes around the boxes (Sugiyama et
    al. 1981). Within a level, places move to the mean of their neighbours until they rest.
    """
    rows: dict[int, list[str]] = {}
    for name in PACKAGES:
        rows.setdefault(level[name], []).append(name)
    arrows = []
    for upper, lower in sorted(graph.edges):
        bends = [f"{upper}>{lower}:{k}" for k in range(level[upper] - 1, level[lower], -1)]
        for k, bend in zip(range(level[upper] - 1, level[lower], -1), bends, strict=True):
            rows[k].append(bend)
        arrows.append([upper, *bends, lower])
    beside: dict[str, list[str]] = {}
    for arrow in arrows:
        for one, other in pairwise(arrow):
            beside.setdefault(one, []).append(other)
            beside.setdefault(other, []).append(one)
    width = {name: WIDTH if name in PACKAGES else 24 for row in rows.values() for name in row}
    x = {name: float(k * WIDTH) for row in rows.values() for k, name in enumerate(row)}
    for _ in range(60):
        for row in rows.values():
            wanted = {name: sum(x[other] for other in beside[name]) / len(beside[name]) for name in row}
            row.sort(key=lambda name: (round(wanted[name], 3), name))
            at = {}
            for k, name in enumerate(row):
                least = at[row[k - 1]] + (width[row[k - 1]] + width[name]) / 2 + GAP if k else wanted[name]
                at[name] = max(wanted[name], least)
            shift = sum(wanted[name] - at[name] for name in row) / len(row)
            x.update({name: at[name] + shift for name in row})
    left = min(x[name] - width[name] / 2 for name in x) - GAP
    top = max(rows)
    return {name: (round(x[name] - left), (top - k) * STEP + 20 + HEIGHT // 2) for k, row in rows.items()
            for name in row}, arrows


def draw() -> str:
    """The drawing as SVG."""
    graph = packages()
    places, arrows = place(graph, levels(graph))
    core = {path.partition("/")[0] for path in READING}
    paths = []
    for arrow in arrows:
        (x, y), *rest = [places[name] for name in arrow]
        path = f"M{x},{y + HEIGHT // 2}"
        y += HEIGHT // 2
        for k, (to, below) in enumerate(rest):
            end = below - (HEIGHT // 2 + 5 if k == len(rest) - 1 else 0)
            path += f" C{x},{(y + end) // 2} {to},{(y + end) // 2} {to},{end}"
            x, y = to, end
        paths.append(path)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
                                     autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    width = max(x for x, _ in places.values()) + WIDTH // 2 + GAP
    return environment.get_template("architecture.svg.j2").render(
        boxes={name: (*places[name], text, name in core) for name, text in PACKAGES.items()}, paths=paths, width=width,
        height=max(y for _, y in places.values()) + HEIGHT // 2 + 50, box=(WIDTH, HEIGHT))


def count(path: str) -> int:
    """Lines of a file of fedlab."""
    return len((REPOSITORY / "fedlab" / path).read_text("utf-8").splitlines())


def reading_list() -> str:
    """The core in the order of reading, as a table in Markdown."""
    lines = ["| file | lines | what it holds |", "|---|---|---|"]
    lines += [f"| [{path}](../fedlab/{path}) | {count(path)} | {text} |" for path, text in READING.items()]
    return "\n".join([*lines, f"| together | {sum(map(count, READING))} | |"])


def listed(page: str) -> dict[str, int]:
    """The files of the reading list in a page, and the lines that it gives them."""
    rows = [row.split("|") for row in page.partition(BEGIN)[2].partition(END)[0].splitlines() if "../fedlab/" in row]
    return {row[1].strip()[1:].partition("]")[0]: int(row[2]) for row in rows}


def problems() -> list[str]:
    """What in the drawing and the reading list differs from the code, one line each.

    Line counts may be off by a tenth, so that not every change of a file is one of the page.
    """
    found, known = [], listed(PAGE.read_text("utf-8"))
    if DRAWING.read_text("utf-8") != draw():
        found.append("docs/architecture.svg does not show the imports of today")
    if list(known) != list(READING):
        found.append("the reading list in docs/architecture.md lists other files than docs/architecture.py")
    found += [f"{path} has {count(path)} lines, the reading list says {lines}" for path, lines in known.items()
              if path in READING and abs(count(path) - lines) > max(10, count(path) // 10)]
    if (total := sum(map(count, READING))) > LONGEST:
        found.append(f"the core has {total} lines, at most {LONGEST} are allowed")
    return found


def main() -> int:
    """The command line."""
    if "--check" in sys.argv[1:]:
        found = problems()
        print("\n".join([*found, "run: python docs/architecture.py"] if found else ["drawing and reading list hold"]))
        return bool(found)
    DRAWING.write_text(draw(), "utf-8")
    page = PAGE.read_text("utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{reading_list()}\n\n{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
