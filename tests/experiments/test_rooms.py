"""Who may import whom in `experiments/`, imports inside functions and for types included."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("running", "paper", "own")  # lowest first
SCRIPTS = (
    *("causal_lens", "gate_of_two_classes", "what_the_vectors_say"),
    *("transfer_across_behaviors", "transfer_across_layers", "transfer_across_models"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "experiments").rglob("*.py")
}


def imports_of(module):
    """The modules of `experiments` that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (named & MODULES.keys()) or ({node.module} & MODULES.keys())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


def folder_of(module):
    """The folder of a module, or of a folder itself; "" of what lies on top."""
    inside = module.split(".")[1:2]
    return inside[0] if inside and inside[0] in FOLDERS else ""


def test_no_modules_import_each_other_in_a_circle():
    order = list(graphlib.TopologicalSorter({module: imports_of(module) for module in MODULES}).static_order())
    assert set(order) == set(MODULES)
    assert order.index("experiments.running.units") < order.index("experiments.running.experiment")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_folder_imports_from_itself_and_from_those_below(module):
    folder, imported = folder_of(module), {name: folder_of(name) for name in imports_of(module)}
    if not folder:
        return
    above = {name for name, other in imported.items() if other not in FOLDERS[: FOLDERS.index(folder) + 1]}
    assert not above, f"{module} imports {above}"
    if folder == "own":
        assert "own" not in imported.values()


def test_every_module_is_used_or_a_program():
    used = set().union(*map(imports_of, MODULES))
    programs = {"experiments.__main__", "experiments.export", *(f"experiments.own.{name}" for name in SCRIPTS)}
    folders = {"experiments", *(f"experiments.{folder}" for folder in FOLDERS)}
    assert set(MODULES) - used == programs | folders


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_belongs_there_and_what_is_never_imported(folder):
    (said,) = ast.parse(MODULES[f"experiments.{folder}"].read_text(encoding="utf-8")).body
    assert "ever" in said.value.value
    assert "imported" in said.value.value


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_stay_short_enough_to_read(module):
    assert MODULES[module].read_text(encoding="utf-8").count("\n") <= 400
