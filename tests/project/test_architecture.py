"""The house: which room may import which, no circles, short modules, names that are found where they are said to be."""

import ast
import importlib
import subprocess
import sys
from types import ModuleType

import pytest
from helpers.models import ROOT
from importlinter import cli

PACKAGE = ROOT / "caa_lens"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))
SOURCES = sorted(file for folder in ("caa_lens", "experiments", "benchmarks") for file in (ROOT / folder).rglob("*.py"))

MINI = """
[tool.importlinter]
root_package = "mini"
[[tool.importlinter.contracts]]
id = "circles"
name = "no circles"
type = "acyclic_siblings"
ancestors = ["mini"]
"""


def test_rooms_import_only_from_below_and_nothing_is_in_a_circle(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    broken = cli.lint_imports(no_cache=True, no_logo=True)
    assert broken == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "back",
    [
        "from mini import a",
        "def f():\n    from mini import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mini.a import x",
    ],
)
def test_a_circle_is_found_however_the_import_is_written(tmp_path, back):
    package = tmp_path / "mini"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from mini import b\nx = 1\n")
    (package / "b.py").write_text(back + "\n")
    (tmp_path / "pyproject.toml").write_text(MINI)
    code = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No cycles are allowed in mini" in done.stdout


def test_the_graph_that_is_printed_has_every_module_and_no_circle():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "import_graph.py")], capture_output=True, text=True, check=True
    )
    printed = {line.partition(" -> ")[0] for line in done.stdout.splitlines() if " -> " in line}
    expected = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in SOURCES}
    assert printed == expected
    assert done.stdout.endswith("no circle\n")


def test_the_page_of_the_architecture_names_every_room_and_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {file.stem for file in PACKAGE.rglob("*.py") if not file.stem.startswith("__")}
    assert [name for name in sorted(modules) if f"`{name}`" not in page] == []
    folders = {file.parent.name for file in PACKAGE.glob("*/**/__init__.py")}
    assert [name for name in sorted(folders) if f"`{name}/`" not in page and f"/{name}/`" not in page] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_belongs_in_it_and_what_may_never_be_imported_there(room):
    said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert said
    assert len(said.split()) > 10
    assert "imported here" in said or "Nothing in the package imports it" in said


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_stay_short_enough_to_read(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines: one idea a module"


def test_importing_the_package_pulls_in_nothing_heavy():
    code = (
        "import sys, caa_lens; "
        "heavy = {'torch', 'transformers', 'transformer_lens', 'plotly', 'pandas', 'sklearn'} & set(sys.modules); "
        "sys.exit(f'import caa_lens pulled in {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: str(stub.parent.relative_to(ROOT)))
def test_every_public_name_can_be_imported_is_told_by_completion_and_has_a_docstring(stub):
    package = importlib.import_module(".".join(stub.parent.relative_to(ROOT).parts))
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert (getattr(package, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_a_public_name_is_not_the_name_of_a_module_beside_it():
    for stub in STUBS:
        package = importlib.import_module(".".join(stub.parent.relative_to(ROOT).parts))
        beside = {path.stem for path in stub.parent.iterdir()}
        modules = {
            name for name in package.__all__ if isinstance(getattr(package, name), ModuleType)
        }  # those are meant
        assert (set(package.__all__) & beside) - modules == set(), f"importing the module would hide the name in {stub}"


def test_the_top_of_the_package_is_what_a_first_day_needs():
    import caa_lens

    names = [name for name in caa_lens.__all__ if name not in ROOMS]
    assert 15 <= len(names) <= 27
    assert [name for name in names if name not in caa_lens.__doc__] == []


def test_a_name_that_is_mistyped_is_answered_with_the_nearest():
    import caa_lens

    with pytest.raises(AttributeError, match="try 'logit_lens'"):
        _ = caa_lens.logit_lense
    with pytest.raises(AttributeError, match="try 'pair_pca'"):
        _ = caa_lens.interpretation.pair_pcas


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("vector_norms", "it is caa_lens.interpretation.vector_norms"),
        ("Sweep", "it is caa_lens.measures.Sweep"),
        ("explain", "it is caa_lens.prompts.explain"),
        ("norms", "try caa_lens.interpretation.vector_norms"),
        ("pca", "try caa_lens.interpretation.pair_pca"),
        ("judge", "try caa_lens.measures.judge_texts"),
        ("measures.extract", "it is caa_lens.vectors.extract"),
        ("measures.judge", "try 'judge_texts'"),
        ("nothing_like_it", "no attribute 'nothing_like_it'$"),
    ],
)
def test_a_name_in_another_room_is_told_where_it_is(asked, answer):
    import caa_lens

    room, _, name = asked.rpartition(".")
    with pytest.raises(AttributeError, match=answer):
        getattr(getattr(caa_lens, room) if room else caa_lens, name)
