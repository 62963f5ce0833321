"""The notebooks: what is committed is what runs; it is light, clean, and says no number that its outputs do not show.

Every notebook is run from top to bottom, with its hidden solutions, on fewer pairs than the committed outputs have.
`NOTEBOOK_PAIRS=all` runs them in full; a number is the most pairs, questions or steps of each kind.
"""

import ast
import base64
import copy
import importlib.util
import io
import os
import re
import struct
import symtable
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers.browser import CHROMIUM
from helpers.models import SHARED

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra: pip install -e '.[notebooks]'")
Image = pytest.importorskip("PIL.Image", reason="needs the notebooks extra: pip install -e '.[notebooks]'")
pytest.importorskip("nbclient", reason="needs the notebooks extra: pip install -e '.[notebooks]'")
from nbclient.exceptions import CellExecutionError  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
_spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

WANTED = os.environ.get("NOTEBOOK_PAIRS", "6")
PAIRS = None if WANTED == "all" else int(WANTED)
PAPER = "https://arxiv.org/abs/2312.06681"
MACHINE = re.compile(r"/(?:home|root|tmp|work|opt|usr|Users)/|[A-Z]:\\|\b\d{1,2}:\d{2}:\d{2}\b|it/s\b|\d+%\|")
NUMBER = re.compile(r"(?<![\w.])(\d+\.\d+)(?![\w.]|\d)")
SETTINGS = 3  # which cell has them: behind what is learnt, what Colab needs, and the imports
EXERCISE = re.compile(r"\*\*Change this\.\*\* (●○○|●●○|●●●) · (\d+) minutes\. ")
CHECKED = ("1_", "2_", "3_")  # the notebooks whose exercises have a check
DETAILS = re.compile(r"<details>.*?</details>", re.DOTALL)


@pytest.fixture(params=run.NOTEBOOKS, ids=[path.stem for path in run.NOTEBOOKS])
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook):
    """What outputs say in words and numbers; figures aside."""
    for output in outputs(notebook):
        yield output.text if output.output_type == "stream" else output.data.get("text/plain", "")


def width_of(png):
    """Pixels of a PNG, which stand behind its signature and the name of its first part."""
    return struct.unpack(">I", base64.b64decode(png)[16:20])[0]


def switched_on(path, flag, target):
    """A copy of a notebook in which a flag is true."""
    notebook = nbformat.read(path, as_version=4)
    assert f"{flag} = False" in notebook.cells[SETTINGS].source
    notebook.cells[SETTINGS].source = notebook.cells[SETTINGS].source.replace(f"{flag} = False", f"{flag} = True", 1)
    nbformat.write(notebook, target)


def bound_names(code):
    """Names that a cell binds at its top level: by assignments, functions and loops, but not inside of them."""
    return {name.get_name() for name in symtable.symtable(code, "cell", "exec").get_symbols() if name.is_assigned()}


def tagged(notebook, tag):
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def answers(notebook):
    return [notebook.cells[i] for i in tagged(notebook, run.ANSWER)]


def answer_of(cell):
    """The one name of an answer cell that is still open."""
    (name,) = (
        node.targets[0].id
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is ...
    )
    return name


def levels_of(path):
    """Of a notebook's exercises in their order: how hard, and how many minutes."""
    text = "\n".join(sources(nbformat.read(path, as_version=4), "markdown"))
    return [(level, int(minutes)) for level, minutes in EXERCISE.findall(text)]


def test_there_are_six_and_each_leads_to_the_next():
    assert [path.name[:2] for path in run.NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_", "6_"]
    for one, following in zip(run.NOTEBOOKS, [*run.NOTEBOOKS[1:], run.NOTEBOOKS[0]], strict=True):
        assert f"]({following.name})" in sources(nbformat.read(one, as_version=4), "markdown")[-1]


def test_a_notebook_begins_with_what_it_teaches_the_paper_its_imports_and_the_flag(notebook):
    first, _, imports, settings = notebook.cells[: SETTINGS + 1]
    assert first.cell_type == "markdown"
    assert "What you will learn" in first.source
    assert PAPER in first.source
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(imports.source).body)
    assert settings.source.startswith("LLAMA_2 = False")
    assert settings.source.splitlines()[1].startswith("BRIDGE = False")
    for code in sources(notebook, "code")[2:]:
        assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_first_cell_installs_the_library_in_colab_and_does_nothing_elsewhere(notebook, monkeypatch):
    cell, asked = notebook.cells[1], []
    assert cell.source == run.COLAB.strip()
    assert not cell.outputs
    known = {"get_ipython": lambda: SimpleNamespace(run_line_magic=lambda *words: asked.append(words))}
    exec(cell.source, dict(known))
    assert not asked
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(cell.source, dict(known))
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((magic, words),) = asked
    assert magic == "pip"
    assert words.endswith(f"'{project['name']}[all] @ git+{project['urls']['Repository']}'")
    assert "all" in project["optional-dependencies"]


def test_the_first_cell_is_put_once_and_outputs_stay_as_they_are(path):
    notebook = nbformat.read(path, as_version=4)
    before = copy.deepcopy(notebook)
    run.put_first_cell(notebook)
    assert notebook == before
    del notebook.cells[1]
    run.put_first_cell(notebook)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in before.cells]
    assert [len(cell.get("outputs", [])) for cell in notebook.cells] == [
        len(cell.get("outputs", [])) for cell in before.cells
    ]


def test_every_part_ends_with_an_exercise_and_its_solution(notebook):
    parts = [[]]
    for text in sources(notebook, "markdown"):
        if text.startswith("## "):
            parts.append([])
        parts[-1].append(text)
    assert len(parts) > 3
    for part in parts[1:]:
        assert len(EXERCISE.findall("\n".join(part[-2:]))) == 1
        assert run.SOLUTION.search(part[-1])


def test_a_solution_overwrites_nothing_that_the_notebook_uses(notebook):
    names = set().union(*map(bound_names, sources(notebook, "code"))) - {answer_of(cell) for cell in answers(notebook)}
    for text in sources(notebook, "markdown"):
        for code in run.SOLUTION.findall(text):
            assert not bound_names(code) & names


def test_an_exercise_is_an_empty_answer_then_its_check_and_then_the_hidden_solution(path, notebook):
    checks = tagged(notebook, run.CHECK)
    n_exercises = len(EXERCISE.findall("\n".join(sources(notebook, "markdown"))))
    assert len(checks) == len(answers(notebook)) == (n_exercises if path.name.startswith(CHECKED) else 0)
    for i in checks:
        task, answer, check, solution = notebook.cells[i - 2 : i + 2]
        name = answer_of(answer)
        assert EXERCISE.search(task.source)
        assert answer.source.splitlines()[-1].startswith(f"{name} = ...  # your code: ")
        assert solution.source.startswith("<details><summary>Solution</summary>")
        assert name in bound_names(run.SOLUTION.findall(solution.source)[0])
        (asked,) = (node.value for node in ast.parse(check.source).body)
        assert asked.func.value.id == "check"
        assert asked.args[0].id == name
        constants = [node.value for node in ast.walk(asked) if isinstance(node, ast.Constant)]
        assert all(isinstance(value, str) for value in constants), "a number might be the answer"
        assert [output.data["text/plain"] for output in check.outputs] == ["not answered yet"]
        for later in notebook.cells[i + 1 :]:
            if later.cell_type == "code":
                assert not re.search(rf"\b{name}\b", later.source), f"{name} may still be open"


def test_every_check_belongs_to_an_exercise():
    for path in run.NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        imported = re.search(r"from caa_lens\.lessons import (\w+) as check", notebook.cells[2].source)
        assert bool(imported) == path.name.startswith(CHECKED)
        if imported:
            module = importlib.import_module(f"caa_lens.lessons.{imported[1]}")
            made = [name for name, of in vars(module).items() if getattr(of, "__module__", "") == module.__name__]
            asked = [notebook.cells[i].source.partition("(")[0] for i in tagged(notebook, run.CHECK)]
            assert [f"check.{name}" for name in made if not name.startswith("_")] == asked


@pytest.mark.parametrize(("answer", "right"), [(2, True), (3, False)])
def test_a_solution_that_its_check_finds_wrong_stops_the_run(tmp_path, answer, right):
    verdict = "type('Verdict', (), {'right': given == 2})()"
    cells = [
        nbformat.v4.new_code_cell("given = ...", metadata={"tags": ["answer"]}),
        nbformat.v4.new_code_cell(verdict, metadata={"tags": ["check"]}),
        nbformat.v4.new_markdown_cell(f"<details>\n\n```python\ngiven = {answer}\n```\n</details>"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    run.execute(tmp_path / "one.ipynb")
    if right:
        run.execute(tmp_path / "one.ipynb", solutions=True)
    else:
        with pytest.raises(CellExecutionError, match="AssertionError"):
            run.execute(tmp_path / "one.ipynb", solutions=True)


def test_the_plan_of_the_lesson_has_ninety_minutes_and_the_exercises_of_its_notebooks():
    plan = (FOLDER.parent / "docs" / "teaching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) to (\d+) \|.*\| ?(?:(●\S+) (\d+))? \|$", plan, re.MULTILINE)
    starts, ends = ([int(row[i]) for row in rows] for i in (0, 1))
    assert [0, *ends] == [*starts, 90]
    assert all(int(row[3] or 0) < int(row[1]) - int(row[0]) for row in rows)
    taught = [*levels_of(run.NOTEBOOKS[0]), *levels_of(run.NOTEBOOKS[2])]
    assert [(level, int(minutes)) for *_, level, minutes in rows if level] == taught
    for path in run.NOTEBOOKS:
        (minutes,) = re.findall(rf"^\| \[.*\]\(\.\./notebooks/{path.name}\) \| \d+ \| (\d+) \|", plan, re.MULTILINE)
        assert int(minutes) == sum(minutes for _, minutes in levels_of(path))


def test_the_committed_outputs_come_from_one_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]  # no warnings either


def test_the_committed_outputs_say_nothing_about_the_machine_that_made_them(path):
    found = MACHINE.findall(re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8")))
    assert not found


def test_a_notebook_is_light_and_every_figure_has_a_picture_for_sites_that_draw_none(path, notebook):
    assert path.stat().st_size < 1_500_000
    for cell in notebook.cells:
        shown = [output for output in cell.get("outputs", []) if run.FIGURE in output.get("data", {})]
        assert len(shown) <= 1, "one picture a cell"
        assert all("image/png" in output.data for output in shown)
        assert all(width_of(output.data["image/png"]) <= run.WIDTH for output in shown)
    pages = [output.data["text/html"] for output in outputs(notebook) if "text/html" in output.get("data", {})]
    assert not [page for page in pages if "<script" in page]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which draws the pictures")
def test_a_picture_is_as_wide_as_a_notebooks_column_and_keeps_its_colours():
    steps = [[i / 400 for i in range(400)]]
    layout = {"width": 1200, "height": 300, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}}
    scale = [[0, "#dd5f4a"], [0.5, "#ffffff"], [1, "#4584d6"]]
    (wide, usual) = (
        {"data": [{"type": "heatmap", "z": steps, "colorscale": scale, "showscale": False}], "layout": each}
        for each in (layout, {"height": 300})
    )
    drawn = run.draw([wide, usual])
    assert [width_of(base64.b64encode(png)) for png in drawn] == [run.WIDTH, run.WIDTH]
    for png in drawn:
        assert len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24)) > 350


def test_a_saved_output_holds_no_script(tmp_path):
    cell = nbformat.v4.new_code_cell("from IPython.display import HTML\nHTML('<b>text</b><script>alert(1)</script>')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    (made,) = outputs(run.execute(tmp_path / "one.ipynb"))
    assert made.data["text/html"] == "<b>text</b>"


def test_every_number_with_decimals_in_the_prose_stands_in_an_output(notebook):
    shown = [float(number) for text in texts(notebook) for number in NUMBER.findall(text)]
    for text in sources(notebook, "markdown"):
        for said in NUMBER.findall(re.sub(r"\]\(.*?\)|`.*?`", "", DETAILS.sub("", text))):
            decimals = len(said.split(".")[1])
            assert any(round(number, decimals) == float(said) for number in shown), f"{said} in {text[:80]!r}"


def test_a_notebook_and_its_solutions_run_and_show_what_is_committed(path, notebook):
    again = run.execute(path, pairs=PAIRS, solutions=True)
    assert run.structure(again) == run.structure(notebook)
    assert not [text for text in texts(again) if "Warning:" in text and "LetterBalanceWarning" not in text]


def test_a_notebook_runs_with_the_flag_for_llama_2(path, tmp_path):
    tokenizer = SHARED / "llama2_tokenizer" / "tokenizer.model"
    if not tokenizer.exists():
        pytest.skip("needs ../shared/llama2_tokenizer/tokenizer.model beside the project")
    switched_on(path, "LLAMA_2", tmp_path / path.name)
    # In the place of Llama 2: its depth, its tokenizer and a name of its kind, with small random weights.
    stand_in = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import caa_lens
from pathlib import Path
from helpers.models import tiny_model
from caa_lens.models.loading.tokenizers import attach_tokenizer, sentencepiece_tokenizer
def load_model(name, dtype, backend):
    assert dtype == "bfloat16" and backend is None
    model = tiny_model(n_layers=32, d_vocab=32000, n_ctx=512)
    attach_tokenizer(model, sentencepiece_tokenizer(Path({str(tokenizer)!r})), name)
    model.cfg.model_name = name
    return model
caa_lens.load_model = load_model
"""
    run.execute(tmp_path / path.name, pairs=PAIRS or 6, before=stand_in)


# In the demo model's place: its depth, its tokenizer and its name, with small random weights.
SMALL_BRIDGE = """
import caa_lens
import torch
from caa_lens.models.loading.demo_model import demo_model_path
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
load = caa_lens.load_model
def load_model(name, dtype, backend):
    assert (name, dtype, backend) == ("demo", None, "bridge")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 30, "max_position_embeddings": 512}
    n_vocab = len(AutoTokenizer.from_pretrained(demo_model_path()))
    return load(name, hf_model=LlamaForCausalLM(LlamaConfig(vocab_size=n_vocab, **shape, **heads)))
caa_lens.load_model = load_model
"""


# The first notebook writes hooks of its own, so it is the one that `make test` runs with TransformerLens 4, too. Where
# NOTEBOOK_PAIRS is set, all run on the real model.
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.bridge] * path.name.startswith("1_"))
        for path in run.NOTEBOOKS
    ],
)
def test_a_notebook_runs_with_the_flag_for_a_bridge(path, tmp_path):
    real = "NOTEBOOK_PAIRS" in os.environ
    switched_on(path, "BRIDGE", tmp_path / path.name)
    again = run.execute(tmp_path / path.name, pairs=PAIRS, solutions=True, before="" if real else SMALL_BRIDGE)
    loading = again.cells[SETTINGS]
    said = [output for output in loading.outputs if "untouched Hugging Face module" in str(output)]
    assert len(said) == 1  # what was compared as the bridge was made
    loading.outputs = [output for output in loading.outputs if output not in said]
    warned = [text for text in texts(again) if "Warning:" in text]
    assert not [text for text in warned if "LetterBalanceWarning" not in text]
    if real:
        assert run.structure(again) == run.structure(nbformat.read(path, as_version=4))
