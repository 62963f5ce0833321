"""Arrows point down only: what a module may import, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "caa_lens"

# Lowest first. A module may import (at its top level) modules of lower rows only.
LEVELS = [
    {"provenance", "vector_expression", "subspaces"},
    {"vector_rules"},
    {"vector_algebra"},
    {"vector_combinations"},
    {"vectors", "expression_parser"},
    {"contrast_files", "prompts", "checkpoints", "hub", "tokenizer_loading", "device_memory", "intervals"},
    {"paper_numbers", "rubrics", "judge_client", "judge_file", "open_answers"},
    {"hooks", "contrast_pair", "storage", "weights", "demo_model", "geometry", "data_sources", "judging"},
    {"caa_files", "control_vectors", "vllm_lens_files"},
    {"contrast", "prefix_cache", "staircase", "llama_config", "downloads", "interchange"},
    {"models", "paper_data"},
    {"arguments", "data_fetch"},
    {"activations", "text_measures"},
    {"extraction", "answers", "steering"},
    {"generation", "sweeps", "residual_lens"},
    {"lens", "attribution", "pair_reading", "transfer_grid"},
    {"pair_geometry", "layer_transfer", "residual_map"},
    {"foreign_vectors"},
    {"similarity", "plots", "report"},
    {"run_report"},
    {"plots_lens", "plots_geometry", "plots_attribution", "plots_transfer"},
    {"demo", "cli_vectors", "cli_data", "cli_report"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}
PURE = ("vectors", "hooks", "geometry", "contrast", "contrast_pair", "contrast_files", "prompts", "storage", "report")
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports_of(module: str, *, top_level_only: bool) -> set[str]:
    """Names of `caa_lens` modules that a module imports."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "caa_lens":
            found |= {alias.name for alias in node.names if alias.name in LEVEL_OF}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("caa_lens."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("caa_lens.")}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_level(module):
    assert module in LEVEL_OF, f"add {module} to LEVELS in tests/test_architecture.py, and to docs/architecture.md"


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_below(module):
    upward = {name for name in imports_of(module, top_level_only=True) if LEVEL_OF[name] >= LEVEL_OF[module]}
    assert not upward, f"{module} imports {upward}, which do not stand below it"


@pytest.mark.parametrize("module", MODULES)
def test_the_package_never_imports_from_scripts(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    roots = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not roots & {"experiments", "benchmarks", "tests"}


@pytest.mark.parametrize("module", [m for m in PURE if (PACKAGE / f"{m}.py").exists()])
def test_pure_modules_import_no_model_library(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name.split(".")[0] for name in names} & {"transformer_lens", "transformers"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short_enough_to_read(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{module} has {lines} lines: one idea a module"


def test_importing_the_package_pulls_in_nothing_heavy():
    code = (
        "import sys, caa_lens; "
        "heavy = {'torch', 'transformers', 'transformer_lens', 'plotly', 'pandas', 'sklearn'} & set(sys.modules); "
        "sys.exit(f'import caa_lens pulled in {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported_and_has_a_docstring():
    import caa_lens

    for name in caa_lens.__all__:
        assert (getattr(caa_lens, name).__doc__ or "").strip(), f"{name} has no docstring"
