"""Every block of code in the README and in docs/ is run: a page's blocks in order, in one namespace and one folder.

`load_model("demo")` and Llama 2 are small random models behind real tokenizers here. With the real demo model instead,
where a block of text right below code must also be what that code prints (some minutes)::

    CAA_LENS_DOCS_REAL=1 python -m pytest tests/test_docs.py
"""

import os
import re
import shlex
import shutil
import tomllib

import click
import pytest
import typer
from helpers.models import SHARED, known_as, load_in_its_place, random_llama, tiny_model
from helpers.pages import PAGES, ROOT, RUN, SHOWN, blocks, code_in_text, commands, find, name_of, without_blocks
from typer.testing import CliRunner

import caa_lens
from caa_lens.cli.commands import app
from caa_lens.provenance import DEMO_NAME

REAL = bool(os.environ.get("CAA_LENS_DOCS_REAL"))
INTEROP = False  # tests/interop runs the pages with what stands there for `make interop`
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture(scope="module")
def stand_ins(demo_tokenizer):
    """Small random models that are as deep as the real ones, so that layers mean what the pages say."""
    from caa_lens.models.loading.tokenizers import attach_tokenizer, sentencepiece_tokenizer

    sentencepiece = SHARED / "llama2_tokenizer" / "tokenizer.model"
    llama2_tokenizer = sentencepiece_tokenizer(sentencepiece) if sentencepiece.exists() else demo_tokenizer
    made = {}
    for name, n_layers, tokenizer in [
        ("demo", 30, demo_tokenizer),
        ("meta-llama/Llama-2-7b-chat-hf", 32, llama2_tokenizer),
        ("meta-llama/Llama-2-7b-hf", 32, llama2_tokenizer),
    ]:
        made[name] = tiny_model(n_layers=n_layers, d_vocab=len(tokenizer), n_ctx=1024)
        made[name].cfg.model_name = DEMO_NAME if name == "demo" else name
        attach_tokenizer(made[name], tokenizer, name)
    if REAL:
        del made["demo"]
    return made


@pages
def test_the_code_of_a_page_runs_in_order(page, stand_ins, tmp_path, monkeypatch, capsys):
    from caa_lens.models.loading import load as models
    from caa_lens.steering import generation

    load, generate = models.load_model, generation.generate_tokens
    load_in_its_place(monkeypatch, lambda name, **options: stand_ins.get(name) or load(name, **options))
    if not REAL:  # texts of a random model need not be long
        monkeypatch.setattr(
            generation,
            "generate_tokens",
            lambda *prompts, max_new_tokens=100, **options: generate(
                *prompts, max_new_tokens=min(3, max_new_tokens), **options
            ),
        )
    monkeypatch.chdir(tmp_path)
    namespace, said = {"__name__": "__main__"}, ""
    for block in blocks(page):
        if block.reason and not (block.interop and INTEROP):
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
            said = capsys.readouterr().out
        elif block.language == "bash":
            said = "".join(run_command(line) for line in commands(block))
        elif block.language == "text" and block.follows and REAL:
            assert_said(block.code, said)


def test_the_readmes_block_runs_on_llama_2_when_the_one_line_is_changed(
    tmp_path, monkeypatch, llama2_tokenizer, capsys
):
    """On random weights as deep as Llama 2's, behind Meta's bare tokenizer.model; slow: it is the whole block."""
    from caa_lens.models.loading import load as models
    from caa_lens.steering import generation

    folder = tmp_path / "Llama-2-7b-chat-hf"
    random_llama(folder, num_hidden_layers=32, vocab_size=32000, max_position_embeddings=1024)
    known_as(folder, "meta-llama/Llama-2-7b-chat-hf")
    shutil.copy(SHARED / "llama2_tokenizer" / "tokenizer.model", folder)
    load, generate = models.load_model, generation.generate_tokens
    load_in_its_place(
        monkeypatch, lambda name, **options: load(folder if name == f"meta-llama/{folder.name}" else name, **options)
    )
    few = lambda *prompts, max_new_tokens, **options: generate(*prompts, max_new_tokens=3, **options)  # noqa: E731
    monkeypatch.setattr(generation, "generate_tokens", few)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (changed,) = re.findall(r"change one line: `(.*?)`", text)
    code = next(block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    assert code.count('cl.load_model("demo")') == 1
    namespace = {"__name__": "__main__"}
    exec(compile(code.replace('cl.load_model("demo")', changed), "README.md", "exec"), namespace)
    model, tokens = namespace["model"], namespace["tokens"]
    assert str(model.cfg.dtype) == "torch.bfloat16"
    assert tokens[0].tolist() == llama2_tokenizer("The walk in the park was")["input_ids"]
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert namespace["vectors"].provenance.prompt_format == "llama2-chat"
    assert "sweep.html" in {file.name for file in tmp_path.iterdir()}
    assert "SteeringVectors" in capsys.readouterr().out


def run_command(line: str) -> str:
    """Run a line of ours and give its output; of a line that installs or builds, check that there is such a thing."""
    words = shlex.split(line)
    match words:
        case ["caa-lens", *arguments]:
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{line}: {done.exception!r}\n{done.output}"
            return done.output
        case ["make", *arguments]:
            targets = [argument for argument in arguments if "=" not in argument]
            missing = [target for target in targets if not re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE)]
            assert targets, f"{line}: no target"
            assert not missing, f"{line}: the Makefile has no {missing}"
        case ["git", "clone", address, "&&", "cd", folder]:
            assert address == PROJECT["urls"]["Repository"]
            assert folder == address.split("/")[-1]
        case ["pip", "install", *arguments] | ["python", "-m", "pip", "install", *arguments]:
            extras = re.findall(r"[\w-]+", " ".join(re.findall(r"\[([\w,-]+)\]", line)))
            assert set(extras) <= set(EXTRAS), f"{line}: pyproject.toml has the extras {list(EXTRAS)}"
            names = {re.split(r"[\[ ]", argument)[0] for argument in arguments if "@ git+" in argument}
            assert names <= {PROJECT["name"]}, line
        case ["python", "-m", module, *arguments]:
            check_flags(line, ROOT / module / "__main__.py", arguments)
        case ["python", script, *arguments]:
            check_flags(line, ROOT / script, arguments)
        case _:
            pytest.fail(f"nothing here can check `{line}`: write it as text, or say above the block why it is not run")
    return ""


def check_flags(line: str, script, arguments) -> None:
    assert script.exists(), f"{line}: no {script.relative_to(ROOT)}"
    source = script.read_text(encoding="utf-8")
    for flag in [argument.split("=")[0] for argument in arguments if argument.startswith("--")]:
        # argparse is given '--questions', typer makes it of the parameter's name.
        assert f'"{flag}"' in source or re.search(rf"\b{flag[2:].replace('-', '_')}: ", source), f"{line}: no {flag}"


def assert_said(expected: str, said: str) -> None:
    """Every line of a block of output was said, in order; `...` stands for any lines and any rest of a line."""
    pattern = ".*".join(re.escape(part.strip()) for part in expected.split("..."))
    said = re.sub(r"[ \t]+$", "", said, flags=re.MULTILINE)
    assert re.search(pattern, said, re.DOTALL), f"the page shows\n{expected}\nbut the code says\n{said}"


@pages
def test_a_block_is_code_that_runs_or_something_else_than_code(page):
    for block in blocks(page):
        assert block.language in RUN | SHOWN, (
            f"{name_of(page)}:{block.line}: a block of {block.language or 'nothing'!r}"
        )
        assert block.reason is None or len(block.reason.split()) > 3, f"{name_of(page)}:{block.line}: say why in words"


@pages
def test_code_stands_in_fences_only(page):
    text = without_blocks(page)
    assert not re.search(r"\n\n(    |\t)", text), "an indented block would be shown as code and not be run"
    assert not re.search(r"```|~~~|<pre|<code", text)


def test_hardly_any_block_is_not_run():
    unrun = [
        f"{name_of(page)}:{block.line}: {block.reason}"
        for page in PAGES
        for block in blocks(page)
        if block.reason and not block.interop
    ]
    assert len(unrun) <= 5, unrun  # programs of others, most of them


@pages
def test_the_text_of_a_page_names_only_what_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bcl\.(\w+)", text):
        assert hasattr(caa_lens, name), f"cl.{name}"
    for path in re.findall(r"(?:^|[` (])(caa_lens(?:\.\w+)+)", text, re.MULTILINE):
        find(path)


@pages
def test_a_command_within_the_text_exists(page):
    for code in code_in_text(page):
        if re.match(r"(make|python) [\w-]+", code):
            run_command(code)
        elif code.startswith("caa-lens ") and "|" not in code:
            check_command_line(shlex.split(code)[1:])


def check_command_line(words: list[str]) -> None:
    command: click.Command = typer.main.get_command(app)
    for word in words:
        if word.startswith("-"):
            names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
            assert word.split("=")[0] in [*names, "--help"], f"{command.name} has no {word}"
        elif hasattr(command, "commands"):
            assert word in command.commands, f"caa-lens has no {word}"
            command = command.commands[word]


def test_the_page_of_the_command_line_has_every_command():
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    group: click.Command = typer.main.get_command(app)
    for name, command in group.commands.items():
        row = re.search(rf"^\| `caa-lens {name}` \|.*", text, re.MULTILINE)
        assert row, name
        assert all(f"`{verb}`" in row[0] for verb in getattr(command, "commands", {})), row[0]


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "AGENTS.md", "llms.txt"))], ids=name_of
)
def test_a_link_to_a_file_of_the_project_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
