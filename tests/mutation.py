"""Plant small faults in the sources, one at a time, and see whether the tests notice.

    python tests/mutation.py --per-module 12 --seed 0
    python tests/mutation.py --modules caa_lens/measures/sweeps.py caa_lens/engine/edits.py --out mutants.json
    python tests/mutation.py --again mutants.json      # those that survived, with the tests of today
    python tests/mutation.py --list --modules caa_lens/engine/edits.py

A mutant is one changed node of a module's syntax tree: a comparison or a sum turned round, an integer off by one, a
condition negated, two arguments, tuple elements or dictionary values exchanged, a keyword, a statement, a decorator, a
`.T`, a `sorted` or a slice's bound dropped, a list cut to its first element, one word of a closed set replaced by
another ("positive" by "negative"). It is planted in a copy of the tree, and the module's test files run, the specific
ones first; a test that fails, or runs into the time limit, has killed it. The sample is drawn by seed, evenly over the
kinds of fault, so the same tree gives the same mutants.

Left out, because no test ought to notice, or none on a single CPU can: docstrings, annotations, the text of errors,
warnings, titles and captions, `__repr__`, figures, progress bars, `strict=` of `zip` and `device=`.

Each mutant runs in a fork of one process that has imported torch and the other libraries, but never the package. The
name has no `test_`: pytest does not collect it.
"""

import argparse
import ast
import copy
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# For each module its test files in stages, quick ones first: a stage runs only if the mutant survived those before.
ASKED = [
    f"tests/experiments/test_{name}.py"
    for name in (
        *("what_experiments_ask", "what_sections_say_of_scores", "what_sections_say_of_texts_and_vectors"),
        *("units_needs_and_costs", "beside_the_paper"),
    )
]
WHOLE_RUN = "tests/experiments/test_a_whole_run.py"
FINETUNING = "tests/experiments/test_finetuning.py"
SLOW = [  # the real model; left to the last stage
    "tests/measures/test_sweeps.py::test_sentiment_steers_the_real_model_in_a_dose_dependent_way",
    "tests/transfers/test_across_models.py::"
    "test_a_short_finetune_of_the_real_model_turns_its_vectors_a_little_and_they_still_steer_it",
    "tests/vectors/test_extraction.py::test_vectors_are_those_of_hugging_faces_hidden_states",
    "tests/vectors/test_extraction.py::test_with_unbalanced_letters_the_vector_is_mostly_the_letter",
    "tests/measures/test_answers.py::test_scores_on_the_real_model_equal_one_full_forward_a_condition",
]
PROMPTS = [
    [f"tests/prompts/test_{name}.py" for name in ("prompt_formats", "chat_templates", "special_tokens")],
    ["tests/prompts/test_prompt_laws.py", "tests/steering/test_start_offset.py", "tests/models/test_bare_models.py"],
    ["tests/measures/test_answers.py", "tests/vectors/test_extraction.py"],
]
TESTS: dict[str, list[list[str]]] = {
    **{f"caa_lens/prompts/{name}.py": PROMPTS for name in ("formats", "token_spans", "users_words", "batches")},
    "caa_lens/models/unembedding.py": [
        ["tests/models/test_unembedding.py", "tests/interpretation/test_lens.py"],
        ["tests/engine/test_any_model.py"],
    ],
    "caa_lens/models/structure.py": [["tests/engine/test_any_model.py"]],
    "caa_lens/engine/positions.py": [["tests/engine/test_positions.py"], ["tests/steering/test_steered_block.py"]],
    "caa_lens/engine/edits.py": [
        ["tests/engine/test_edits.py", "tests/engine/test_positions.py"],
        ["tests/steering/test_interventions.py", "tests/steering/test_steered_block.py"],
        ["tests/steering/test_generation.py", "tests/card/test_waits.py"],
    ],
    "caa_lens/engine/overflow.py": [["tests/engine/test_overflow.py"]],
    "caa_lens/engine/shared_prefix.py": [
        ["tests/engine/test_shared_prefix.py"],
        ["tests/engine/test_any_model.py"],
        ["tests/measures/test_answers.py"],
    ],
    "caa_lens/engine/staircase.py": [
        ["tests/engine/test_staircase.py", "tests/engine/test_shared_prefix.py"],
        ["tests/measures/test_answers.py"],
        ["tests/measures/test_sweeps.py"],
    ],
    "caa_lens/engine/plain_runs.py": [["tests/engine/test_any_model.py"]],
    "caa_lens/vectors/extraction.py": [
        [
            "tests/vectors/test_extraction.py",
            "tests/vectors/test_zero_vectors.py",
            "tests/prompts/test_special_tokens.py",
        ],
        ["tests/interpretation/test_pair_geometry.py", "tests/vectors/test_storage.py"],
    ],
    "caa_lens/steering/interventions.py": [
        ["tests/steering/test_interventions.py", "tests/steering/test_steered_block.py"],
        ["tests/engine/test_positions.py", "tests/engine/test_overflow.py"],
        ["tests/test_arguments.py"],
    ],
    "caa_lens/measures/answers.py": [
        ["tests/measures/test_answers.py", "tests/steering/test_start_offset.py", "tests/engine/test_overflow.py"],
        ["tests/measures/test_sweeps.py", "tests/engine/test_shared_prefix.py"],
    ],
    "caa_lens/measures/sweeps.py": [["tests/measures/test_sweeps.py"], ["tests/test_demo.py", "tests/cli/test_cli.py"]],
    "caa_lens/explorer/session.py": [["tests/explorer/test_session.py"]],
    "caa_lens/explorer/turns.py": [["tests/explorer/test_turns.py"]],
    "caa_lens/explorer/shown.py": [["tests/explorer/test_explorer_shown.py"]],
    "caa_lens/transfers/across_layers.py": [["tests/transfers/test_across_layers.py"]],
    "caa_lens/transfers/across_behaviors.py": [["tests/transfers/test_across_behaviors.py"]],
    "caa_lens/transfers/across_models.py": [["tests/transfers/test_across_models.py"]],
    "caa_lens/transfers/residual_map.py": [["tests/transfers/test_residual_map.py"]],
    "experiments/paper/tables_4_10_13_finetuning.py": [ASKED, [FINETUNING]],
    "experiments/paper/tables_4_10_13_finetuned_text.py": [ASKED, [FINETUNING]],
    **{
        f"experiments/{name}.py": [ASKED, [WHOLE_RUN]]
        for name in (
            *("running/measures", "running/comparison", "own/vector_words", "paper/figure_2_contrast_pca"),
            *(
                "paper/layer_choice",
                "paper/figure_3_layer_sweep",
                "paper/figure_4_multipliers",
                "paper/figure_5_open_ended",
            ),
            *("paper/figure_6_token_similarities", "paper/figure_7_cross_layer_cosines"),
            *("paper/figure_8_vector_transfer", "paper/figures_9_10_base_to_chat", "paper/table_3_system_prompts"),
            "paper/tables_5_12_knowledge",
        )
    },
    "experiments/running/first_units.py": [["tests/experiments/test_plans.py"]],
}

COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
WORDS = (
    ("positive", "negative"),
    ("own", "foreign"),
    ("source", "target"),
    ("layer", "other_layer"),
    ("first", "second"),
    ("low", "high"),
    ("matching", "not matching"),
    ("pca", "separability"),
    ("answers", "pairs"),
    ("add", "ablate"),
    ("keep", "target"),
    ("multiplier", "norm"),
    ("lora", "full"),
    ("normed", "in_context"),
    ("p_matching", "margin"),
    ("ab", "completion"),
    ("score", "question"),
    ("vectors", "layer_sweep"),
    ("behavior", "metric"),
    ("mean", "median"),
)
OTHER_WORD = {a: b for pair in reversed(WORDS) for a, b in (pair, pair[::-1])}
OTHER_NAME = {"max": "min", "min": "max", "idxmax": "idxmin", "mean": "sum", "sum": "mean", "any": "all", "all": "any"}
OTHER_NAME |= {"idxmin": "idxmax", "low": "high", "high": "low", "positive": "negative", "negative": "positive"}
DROPPED_CALLS = {"sorted": "list", "reversed": "list", "set": "list"}
DROPPED_METHODS = {"argsort", "abs", "exp", "clone", "strip", "rstrip", "copy", "round", "sort_values", "dropna"}

COSMETIC = {"title", "text", "label", "labels", "desc", "unit", "caption", "description", "name", "digits"}
UNSEEN = {"strict", "device", "progress", "stacklevel", "encoding", "disable", "repr", "slots", "kw_only", "eq"}
SILENT_CALLS = {"tqdm", "warn", "curves", "curves_by_metric", "update"}
SKIPPED_FUNCTIONS = {"__repr__", "_repr_mimebundle_", "plot", "plot_layer", "plot_cosine", "explain"}


@dataclass(frozen=True)
class Mutant:
    module: str
    number: int
    kind: str
    where: str
    diff: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.module}#{self.number}"


# ---- making mutants --------------------------------------------------------------------------------------------


def called(node: ast.AST) -> str:
    """The last name of what is called."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def faults(node: ast.AST, field_of: str, parent: ast.AST | None) -> Iterator[tuple[str, ast.AST | list]]:
    """(kind, what stands in the node's place) for every fault that this node can have; [] drops a statement."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in COMPARED[type(operator)]:
                new = copy.deepcopy(node)
                new.ops[i] = other()
                yield "comparison", new
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not is_text(node.left, node.right):
        new = copy.deepcopy(node)
        new.op = COMPUTED[type(node.op)]()
        yield "arithmetic", new
    if isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "condition", new
        yield "condition", copy.deepcopy(node.values[0])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "condition" if isinstance(node.op, ast.Not) else "arithmetic", copy.deepcopy(node.operand)
    if isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.Compare):
        new = copy.deepcopy(node)
        new.test = ast.UnaryOp(op=ast.Not(), operand=new.test)
        yield "condition", new
    if isinstance(node, ast.comprehension) and node.ifs:
        new = copy.deepcopy(node)
        new.ifs = []
        yield "condition", new
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield "constant", ast.Constant(node.value + 1)
            if node.value > 0:
                yield "constant", ast.Constant(node.value - 1)
        elif isinstance(node.value, str) and node.value in OTHER_WORD:
            yield "word", ast.Constant(OTHER_WORD[node.value])
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        if node.attr == "T":
            yield "dropped", copy.deepcopy(node.value)
        if node.attr in OTHER_NAME:
            yield "word", ast.Attribute(copy.deepcopy(node.value), OTHER_NAME[node.attr], ast.Load())
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in OTHER_NAME:
        yield "word", ast.Name(OTHER_NAME[node.id], ast.Load())
    if isinstance(node, ast.Call):
        yield from faults_of_call(node)
    if isinstance(node, ast.Tuple | ast.List) and len(node.elts) > 1 and field_of != "slice":
        a, b = node.elts[:2]
        if ast.dump(a) != ast.dump(b) and "isinstance" not in called(parent):
            new = copy.deepcopy(node)
            new.elts[:2] = new.elts[1], new.elts[0]
            yield "swapped", new
    if isinstance(node, ast.Dict) and len(node.values) > 1 and all(node.keys[:2]):
        new = copy.deepcopy(node)
        new.values[:2] = new.values[1], new.values[0]
        yield "swapped", new
    if isinstance(node, ast.Slice):
        for bound in ("lower", "upper", "step"):
            if getattr(node, bound) is not None:
                new = copy.deepcopy(node)
                setattr(new, bound, None)
                yield "dropped", new
    if isinstance(node, ast.ListComp):
        cut = ast.Slice(upper=ast.Constant(1))
        yield "first only", ast.Subscript(copy.deepcopy(node), cut, ast.Load())
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and called(node.value) not in SILENT_CALLS:
        yield "dropped", []
    if isinstance(node, ast.AugAssign | ast.Raise | ast.Continue):
        yield "dropped", []
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript | ast.Attribute):
        yield "dropped", []
    for i in range(len(getattr(node, "decorator_list", []))):
        new = copy.deepcopy(node)
        del new.decorator_list[i]
        yield "dropped", new


def faults_of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
        new = copy.deepcopy(node)
        new.args[:2] = new.args[1], new.args[0]
        if called(node) not in ("isinstance", "max", "min"):
            yield "swapped", new
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in COSMETIC | UNSEEN:
            new = copy.deepcopy(node)
            del new.keywords[i]
            yield "dropped", new
    if isinstance(node.func, ast.Name) and node.func.id in DROPPED_CALLS and len(node.args) == 1:
        new = copy.deepcopy(node)
        new.func.id, new.keywords = DROPPED_CALLS[node.func.id], []
        yield "dropped", new
    if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_METHODS:
        yield "dropped", copy.deepcopy(node.func.value)


def is_text(*nodes: ast.AST) -> bool:
    return any(isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str) for node in nodes)


def children(node: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    """(field, index, child) of all that may hold a fault."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_params", "msg", "exc", "cause", "ctx", "format_spec"):
            continue
        if field == "decorator_list":
            continue
        if isinstance(node, ast.arguments) and field == "kw_defaults":
            value = [
                None if arg.arg in UNSEEN else default for arg, default in zip(node.kwonlyargs, value, strict=True)
            ]
        for i, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(child, ast.AST) and not is_left_out(child):
                yield field, i, child


def is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.operator | ast.cmpop | ast.boolop | ast.unaryop):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.FunctionDef) and node.name in SKIPPED_FUNCTIONS:
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.keyword) and node.arg in COSMETIC | UNSEEN:
        return True
    if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
        return True
    return isinstance(node, ast.Call) and called(node) in SILENT_CALLS


def mutants_of(module: str, root: Path = ROOT) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    tree = ast.parse((root / module).read_text(encoding="utf-8"))
    original = ast.unparse(tree)
    found: list[Mutant] = []
    seen = {original}

    def visit(node: ast.AST, inside: str) -> None:
        for field, index, child in list(children(node)):
            for kind, new in list(faults(child, field, node)):
                place(node, field, index, new if new != [] else ast.Pass())
                source = ast.unparse(ast.fix_missing_locations(tree))
                place(node, field, index, child)
                if source not in seen:
                    seen.add(source)
                    found.append(Mutant(module, len(found), kind, inside, difference(original, source), source))
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            visit(child, f"{inside}.{child.name}".lstrip(".") if named else inside)

    visit(tree, "")
    return found


def place(node: ast.AST, field: str, index: int | None, new: ast.AST) -> None:
    if index is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[index] = new


def difference(old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def sample(mutants: list[Mutant], n: int, seed: int) -> list[Mutant]:
    """So many of them by chance, evenly over the kinds of fault, in the order of the text."""
    rng = random.Random(f"{seed}:{mutants[0].module}")
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in rng.sample(mutants, len(mutants)):
        kinds[mutant.kind].append(mutant)
    chosen: list[Mutant] = []
    while len(chosen) < n and any(kinds.values()):
        for kind in sorted(kinds):
            if kinds[kind] and len(chosen) < n:
                chosen.append(kinds[kind].pop())
    return sorted(chosen, key=lambda mutant: mutant.number)


# ---- running tests on them -------------------------------------------------------------------------------------


class Copy:
    """A copy of the tree that one module at a time is changed in."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / ROOT.name
        for name in ("caa_lens", "experiments", "tests", "benchmarks", "docs", "pyproject.toml", "README.md"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, self.root / name)
        if (ROOT.parent / "shared").exists():
            (folder / "shared").symlink_to(ROOT.parent / "shared")
        # Python compares compiled files with their source's size and whole second: no two texts may share them.
        self._second = int(time.time())

    def write(self, module: str, source: str | None) -> None:
        """Put a text in a module's place; None puts back the original."""
        text = (ROOT / module).read_text(encoding="utf-8") if source is None else source
        (self.root / module).write_text(text, encoding="utf-8")
        self._second += 1
        os.utime(self.root / module, (self._second, self._second))

    def passes(self, files: list[str], limit: float, *, slow: bool) -> tuple[bool, str]:
        """Run test files in a fork, or only their slow tests; whether they pass, and who failed."""
        of_these = [test for test in SLOW if test.split("::")[0] in files]
        words = of_these if slow else [*files, *(f"--deselect={test}" for test in of_these)]
        if not words:
            return True, ""
        log = self.root.parent / "log"
        child = os.fork()
        if child == 0:
            self._run_tests(words, log)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.02)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, f"over {limit:.0f} s"
        lines = log.read_text(errors="replace").splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
        return status == 0, failed[0][:200] if failed else ""

    def _run_tests(self, chosen: list[str], log: Path) -> None:
        code = 70
        try:
            os.setsid()
            os.nice(5)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.root)
            os.environ["PYTHONPATH"] = str(self.root)
            here = {"", str(ROOT), str(ROOT / "tests")}
            sys.path[:] = [str(self.root), *(path for path in sys.path if path not in here)]
            sys.argv[:] = ["pytest", *chosen]
            import pytest

            words = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
            words += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
            code = int(pytest.main([*words, f"--basetemp={self.root.parent / 'scratch'}", *chosen]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def check_table(modules: list[str]) -> None:
    """A module or test file that was moved is said, not left out without a word."""
    if unknown := [module for module in modules if module not in TESTS]:
        sys.exit(f"{', '.join(unknown)}: the table of this program has no tests for them")
    files = {file for module in modules for stage in TESTS[module] for file in (module, *stage)}
    files |= {test.split("::")[0] for test in SLOW}
    if missing := sorted(file for file in files if not (ROOT / file).exists()):
        sys.exit(f"{', '.join(missing)}: not there any more; bring the table of this program up to date")


def import_libraries() -> None:
    """What every test process needs, once, and nothing of the package."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import beartype  # noqa: F401
    import hypothesis  # noqa: F401
    import pandas  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.linear_model
    import sklearn.model_selection  # noqa: F401
    import torch
    import transformer_lens  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401  # imported when named

    torch.set_num_threads(1)
    ours = [name for name in sys.modules if name.split(".")[0] in ("caa_lens", "experiments", "conftest", "helpers")]
    assert not ours, f"imported too early: {ours}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-module", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=list(TESTS))
    parser.add_argument("--again", type=Path, help="only the survivors of a file that --out wrote")
    parser.add_argument("--only", nargs="*", help="only these mutants, e.g. caa_lens/measures/sweeps.py#12")
    parser.add_argument("--quick", action="store_true", help="only each module's first, specific tests")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--out", type=Path, help="a JSON file for the verdicts")
    given = parser.parse_args()

    wanted = set(given.only or ())
    if given.again:
        wanted = {one["name"] for one in json.loads(given.again.read_text()) if one["verdict"] == "survived"}
    modules = [m for m in TESTS if m in {name.split("#")[0] for name in wanted}] if wanted else given.modules
    check_table(modules)
    chosen: list[Mutant] = []
    for module in modules:
        every = mutants_of(module)
        some = [m for m in every if m.name in wanted] if wanted else sample(every, given.per_module, given.seed)
        chosen += some
        print(f"{module}: {len(some)} of {len(every)} mutants", flush=True)
    if given.list:
        for mutant in chosen:
            print(f"\n{mutant.name} {mutant.kind}, in {mutant.where or 'the module'}\n{mutant.diff}")
        return

    import_libraries()
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Copy(Path(folder))
        limits: dict[tuple[tuple[str, ...], bool], float] = {}
        for mutant in chosen:
            began, verdict, by = time.monotonic(), "survived", ""
            stages = [(tuple(files), False) for files in TESTS[mutant.module]]
            stages.append((tuple(file for files in TESTS[mutant.module] for file in files), True))
            for stage in stages[: 1 if given.quick else None]:
                files, slow = stage
                if stage not in limits:
                    tree.write(mutant.module, None)
                    start = time.monotonic()
                    fine, failed = tree.passes(list(files), 1800, slow=slow)
                    assert fine, f"{files} fail without a mutant: {failed}"
                    limits[stage] = 60 + 4 * (time.monotonic() - start)
                tree.write(mutant.module, mutant.source)
                fine, by = tree.passes(list(files), limits[stage], slow=slow)
                if not fine:
                    verdict = "killed"
                    break
            tree.write(mutant.module, None)
            verdicts.append({**asdict(mutant), "name": mutant.name, "verdict": verdict, "by": by})
            took = time.monotonic() - began
            print(f"\n{mutant.name} {mutant.kind}, in {mutant.where or 'the module'}\n{mutant.diff}")
            print(f"{verdict} in {took:.0f} s {by}", flush=True)
            if given.out:
                slim = [{k: v for k, v in one.items() if k != "source"} for one in verdicts]
                given.out.write_text(json.dumps(slim, indent=1))

    print()
    counts = Counter((one["module"], one["verdict"]) for one in verdicts)
    for module in modules:
        print(f"{module:45} {counts[module, 'killed']:4} killed {counts[module, 'survived']:4} survived")
    survived = sum(one["verdict"] == "survived" for one in verdicts)
    print(f"{len(verdicts)} mutants, {survived} survived ({survived / max(1, len(verdicts)):.1%})")


if __name__ == "__main__":
    main()
