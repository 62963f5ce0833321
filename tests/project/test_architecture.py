"""Arrows point down only: what a module may import, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "caa_lens"

# Lowest first. A module may import (at its top level) modules of lower rows only.
LEVELS = [
    {"atomic_files", "provenance", "number_checks", "algebra.expressions", "algebra.subspaces", "model_structure"},
    {"formats.kinds", "formats.gguf_tensors", "positions"},
    {"algebra.rules", "model_check", "words"},
    {"algebra.methods"},
    {"algebra.combinations"},
    {"vectors", "algebra.expression_parser"},
    {"token_spans", "chat_templates", "prompt_batches"},
    {"prompt_words", "loading.checkpoints", "loading.hub", "loading.device_memory"},
    {"loading.tokenizers"},
    {"contrast_files", "prompts", "intervals"},
    {"paper.numbers", "open_ended.rubrics", "open_ended.judge_client", "open_ended.judge_file", "open_ended.answers"},
    {"loading.weights", "loading.demo_model", "paper.sources", "open_ended.judging"},
    {"hooks", "contrast_pair", "storage", "geometry"},
    {"formats.tensor_files", "formats.control_vectors", "formats.vllm_lens_files"},
    {"formats.caa_files"},
    {"contrast", "shared_prefix", "staircase", "paper.downloads", "interchange"},
    {"loading.llama_config", "loading.fingerprint"},
    {"models", "paper.questions", "plain_runs", "unembedding", "steered_runs"},
    {"arguments", "overflow", "paper.fetch"},
    {"activations", "open_ended.text_measures", "open_blocks"},
    {"extraction", "answers", "steering"},
    {"generation", "sweeps", "residual_lens"},
    {"lens_in_context"},
    {"lens", "attribution", "pair_reading", "transfers.transfer_grid"},
    {"pair_geometry", "transfers.layer_transfer", "transfers.residual_map"},
    {"transfers.foreign_vectors"},
    {"similarity", "plots.style", "report"},
    {"run_report"},
    {"plots.sweeps", "plots.lens", "plots.geometry", "plots.attribution", "plots.transfer"},
    {"cli.outputs"},
    {"demo", "cli.vectors", "cli.data", "cli.report"},
    {"cli.commands"},
    {"__main__", "__init__"},
]
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}
PURE = (
    "vectors",
    "hooks",
    "positions",
    "geometry",
    "contrast",
    "contrast_pair",
    "contrast_files",
    "prompts",
    "storage",
    "report",
)
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent == PACKAGE
)


def source_of(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def imports_of(module: str, *, top_level_only: bool) -> set[str]:
    """Names of `caa_lens` modules that a module imports."""
    tree = ast.parse(source_of(module))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("caa_lens."):
            _, _, inside = (node.module or "").partition(".")
            named = {".".join(filter(None, (inside, alias.name))) for alias in node.names}
            found |= {inside} if inside in LEVEL_OF else named & LEVEL_OF.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("caa_lens.")}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_level(module):
    assert module in LEVEL_OF, f"add {module} to LEVELS in tests/test_architecture.py, and to docs/architecture.md"


def test_the_page_of_the_architecture_names_every_module_of_the_line_and_every_folder():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {module for module in MODULES if "." not in module and not module.startswith("__")}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert [folder for folder in FOLDERS if f"`{folder}/`" not in page] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_is_in_it_and_imports_nothing(folder):
    (said,) = ast.parse(source_of(f"{folder}.__init__")).body
    assert isinstance(said, ast.Expr)
    assert len(said.value.value) > 20


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_below(module):
    upward = {name for name in imports_of(module, top_level_only=True) if LEVEL_OF[name] >= LEVEL_OF[module]}
    assert not upward, f"{module} imports {upward}, which do not stand below it"


@pytest.mark.parametrize("module", MODULES)
def test_the_package_never_imports_from_scripts(module):
    tree = ast.parse(source_of(module))
    roots = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not roots & {"experiments", "benchmarks", "tests"}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_no_model_library(module):
    tree = ast.parse(source_of(module))
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name.split(".")[0] for name in names} & {"transformer_lens", "transformers"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short_enough_to_read(module):
    lines = source_of(module).count("\n")
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
