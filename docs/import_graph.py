"""The import graph: what imports what in the package, the experiments and the benchmarks.

    python docs/import_graph.py              every module with what it imports, and the circles, if any
    python docs/import_graph.py --rooms      the rooms alone, as the table of docs/architecture.md has them

Imports inside functions and under TYPE_CHECKING count. Nothing is imported to see it: the sources are read.
"""

import argparse
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("caa_lens", "experiments", "benchmarks")

Graph = Mapping[str, set[str]]


def modules() -> Graph:
    """Every module, and the modules that it imports."""
    sys.path.insert(0, str(ROOT))  # the folders of scripts are not installed
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return {name: set(graph.find_modules_directly_imported_by(name)) for name in sorted(graph.modules)}


def rooms(graph: Graph) -> Graph:
    """What stands directly in `caa_lens`, folder or module, and what its modules import of the others."""
    found: dict[str, set[str]] = {}
    for module, imported in graph.items():
        if module.startswith("caa_lens."):
            others = {_room(one) for one in imported if one.startswith("caa_lens.")}
            found.setdefault(_room(module), set()).update(others - {_room(module)})
    return found


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in a ring, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def height(graph: Graph) -> dict[str, int]:
    """How many imports a module stands above the ground."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        heights[name] = 1 + max((heights[one] for one in graph.get(name, ())), default=-1)
    return heights


def _room(module: str) -> str:
    return module.split(".")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", action="store_true", help="the rooms of caa_lens alone")
    graph = modules()
    if parser.parse_args().rooms:
        graph = rooms(graph)
    if ring := circle(graph):
        print(" -> ".join(ring))
        raise SystemExit("a circle of imports")
    heights = height(graph)
    for name in sorted(graph, key=lambda name: (-heights[name], name)):
        print(f"{name} -> {', '.join(sorted(graph[name])) or 'nothing'}")
    print(f"\n{len(graph)} modules, {sum(map(len, graph.values()))} imports, no circle")


if __name__ == "__main__":
    main()
