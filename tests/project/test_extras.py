"""What is installed in any case is enough for the main job, and what is not names its extra when it is missing."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from helpers.models import ROOT, demo_folder

from caa_lens.extras import EXTRA_OF, needed_for

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
# They come with a package of the core, whose types they hold.
WITH_THE_CORE = {"tokenizers"}
# Whoever asks for another tool's objects, or Inspect's, has that tool.
OTHER_TOOLS = {"steering_vectors", "vllm_lens", "inspect_ai"}
# Rooms and modules that are an extra as a whole: whoever opens them has asked for it, and their way in is guarded.
WHOLE = {
    "caa_lens/cli/": "caa_lens/__main__.py",
    "caa_lens/demo/": "caa_lens/__main__.py",
    "caa_lens/measures/open_ended/judge_client.py": "caa_lens/measures/open_ended/judging.py",
    "caa_lens/paper/fetch.py": "caa_lens/paper/fetch.py",
}
# Inspect opens these from its entry point.
INSPECTS_OWN = "caa_lens/evaluation/inspect_"


def plain(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def everything_in(extra):
    """Names of the distributions of an extra, with those of the extras that it has."""
    found = set()
    for requirement in OPTIONAL[extra]:
        if inner := re.match(r"caa-lens\[(.+)\]", requirement):
            for one in inner.group(1).split(","):
                found |= everything_in(one)
        else:
            found.add(plain(requirement))
    return found


CORE = {plain(requirement) for requirement in PROJECT["dependencies"]}


def imports_of(tree):
    """(top-level name, line, whether inside `with needed_for(...)` or in a branch for type checkers)."""

    def walk(node, guarded):
        for child in ast.iter_child_nodes(node):
            inside = guarded
            if isinstance(child, ast.With):
                inside |= any("needed_for(" in ast.unparse(item.context_expr) for item in child.items)
            if isinstance(child, ast.If):
                inside |= "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                yield child.module.partition(".")[0], child.lineno, inside
            else:
                yield from walk(child, inside)

    yield from walk(tree, False)


def test_every_import_is_of_the_core_or_says_which_extra_it_takes():
    distributions = packages_distributions()
    wrong = []
    for path in sorted((ROOT / "caa_lens").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        whole = any(where.startswith(room) for room in (*WHOLE, INSPECTS_OWN))
        for name, line, guarded in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            if name in {"caa_lens", "compression"} | sys.stdlib_module_names | WITH_THE_CORE | OTHER_TOOLS:
                continue
            of = {one.lower().replace("_", "-") for one in distributions.get(name, [name])}
            if of & CORE:
                continue
            if not (name in EXTRA_OF and (guarded or whole)):
                wrong.append(f"{where}:{line} imports {name}")
    assert not wrong
    assert all(ROOT.joinpath(guard).read_text().count("needed_for(") for guard in WHOLE.values())


@pytest.mark.parametrize("name", EXTRA_OF)
def test_each_package_is_in_the_extra_that_its_error_names(name):
    distribution, extra = EXTRA_OF[name]
    assert distribution.lower() in everything_in(extra)
    assert distribution.lower() not in CORE
    assert distribution.lower() in everything_in("all")


def test_the_extras_of_the_developers_hold_all_others_but_inspect():
    assert set().union(*map(everything_in, OPTIONAL)) - everything_in("dev") == {"inspect-ai"}


def test_only_a_missing_package_is_told_of():
    told = r"for maps, the package scikit-learn is missing: pip install 'caa-lens\[analysis\]'"
    with pytest.raises(ImportError, match=told), needed_for("maps"):
        raise ModuleNotFoundError("No module named 'sklearn.linear_model'", name="sklearn.linear_model")
    with pytest.raises(ImportError, match=r"caa-lens\[experiments\]"), needed_for("x", extra="experiments"):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")
    with pytest.raises(ModuleNotFoundError, match="made up"), needed_for("x"):
        raise ModuleNotFoundError("made up", name="something_else")
    with pytest.raises(ValueError, match="other"), needed_for("x"):
        raise ValueError("other")


def test_the_command_line_says_in_one_line_what_it_needs(monkeypatch, capsys):
    from caa_lens import __main__

    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("caa_lens.cli")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"caa-lens: for the command line, the package typer .*caa-lens\[cli\]'$"):
        __main__.main()


def test_the_core_alone_does_the_main_job():
    script = ROOT / "tests" / "helpers" / "core_alone.py"
    done = subprocess.run([sys.executable, script, demo_folder()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["job"]["layers"] == [10, 14]
    assert said["job"]["text"]
    for extra, message in said["refused"].items():
        assert f"'caa-lens[{extra.partition(',')[0]}]'" in message
    assert len(said["refused"]) == 7
