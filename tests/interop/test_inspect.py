"""Inspect's own runner with the demo model, steered and not: its answers are those of `generate`, number for number."""

import json
import logging
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import test_docs
import torch
from helpers.pages import ROOT, blocks
from other_tools import needs
from test_docs import stand_ins  # noqa: F401 (a fixture)

import caa_lens as cl

inspect_ai = needs("inspect_ai")
# Inspect asks the first distribution of our name on the path whether it is installed, which the checkout's metadata do
# not say: so the checkout goes behind the environment.
sys.path.sort(key=lambda place: Path(place or ".").resolve() == ROOT)

from inspect_ai.dataset import MemoryDataset, Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.model import _model as inspect_model  # noqa: E402
from inspect_ai.solver import generate, system_message  # noqa: E402
from inspect_ai.tool import ToolInfo  # noqa: E402

from caa_lens.evaluation import examinees, inspect_provider, inspect_registry  # noqa: E402
from caa_lens.evaluation.questions import load_easy_questions, named_first  # noqa: E402

KEY = ("demo", "None", "None", "None")  # name, dtype, device, backend
MULTIPLIERS = (None, -2, -1, 0, 1, 2)
QUESTIONS = [one.in_words for one in load_easy_questions()[:2]]


@pytest.fixture(scope="module")
def file(demo_model, tmp_path_factory):
    vectors = cl.extract(demo_model, cl.ContrastSet.load("sentiment").sample(8), layers=[13, 14], progress=False)
    return vectors.save(tmp_path_factory.mktemp("vectors") / "v.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_model(demo_model):
    """Inspect's providers share the model that the tests have already, which they would load by its name."""
    kept = inspect_provider._loaded[KEY] = inspect_provider._Loaded(demo_model)
    yield
    assert inspect_provider._loaded[KEY] is kept


@pytest.fixture(autouse=True)
def quiet():
    """Inspect sets the root logger up and keeps files open; warnings of its own libraries are not ours."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def args_of(file, multiplier, **more):
    return {} if multiplier is None else {"vectors": str(file), "layer": 14, "multiplier": multiplier} | more


def run(task, tmp_path, **args):
    (log,) = inspect_ai.eval(task, model=get_model("caa-lens/demo", **args), log_dir=str(tmp_path), display="none")
    return log


def task_of(questions, *solvers, **config):
    samples = [Sample(input=one, target="x") for one in questions]
    options = {"max_tokens": 8} | config
    return inspect_ai.Task(
        dataset=MemoryDataset(samples), solver=[*solvers, generate()], config=GenerateConfig(**options)
    )


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_inspects_answers_are_those_of_generate(demo_model, file, tmp_path, multiplier):
    log = run(task_of(QUESTIONS), tmp_path, **args_of(file, multiplier))
    assert log.status == "success", log.error
    vectors = cl.SteeringVectors.load(file)
    steered = [] if multiplier is None else [(vectors[14], multiplier)]
    answers = [sample.output.completion for sample in log.samples]
    assert answers == [cl.generate(demo_model, one, steered, max_new_tokens=8) for one in QUESTIONS]
    if multiplier in (-2, 2):
        lost, off_by_one = [(vectors[14], 1)], [(vectors[14].at_layer(13), multiplier)]
        everywhere = [cl.Intervention(vector=vectors[14], multiplier=multiplier, start=0)]
        for wrong in (lost, off_by_one, everywhere):
            assert answers != cl.generate(demo_model, QUESTIONS, wrong, max_new_tokens=8)


def test_positions_all_is_what_lm_eval_does(demo_model, file, tmp_path):
    log = run(task_of(QUESTIONS), tmp_path, **args_of(file, 2, positions="all"))
    vector = cl.SteeringVectors.load(file)[14]
    everywhere = [cl.Intervention(vector=vector, multiplier=2, start=0)]
    answers = [sample.output.completion for sample in log.samples]
    assert answers == [cl.generate(demo_model, one, everywhere, max_new_tokens=8) for one in QUESTIONS]
    assert answers != [cl.generate(demo_model, one, [(vector, 2)], max_new_tokens=8) for one in QUESTIONS]


def test_the_system_message_the_seed_and_the_stop_sequence_arrive(demo_model, file, tmp_path):
    task = task_of(QUESTIONS[:1], system_message("You are a pirate."), temperature=0.7, seed=5, stop_seqs=[" is"])
    (sample,) = run(task, tmp_path, **args_of(file, 1)).samples
    vector = cl.SteeringVectors.load(file)[14]
    whole = cl.generate(
        demo_model,
        QUESTIONS[0],
        [vector],
        system="You are a pirate.",
        temperature=0.7,
        seed=5,
        max_new_tokens=8,
    )
    assert sample.output.completion == whole.partition(" is")[0]


def test_the_log_says_what_was_done(file, tmp_path):
    (sample,) = run(task_of(QUESTIONS[:1]), tmp_path, **args_of(file, 2)).samples
    assert sample.output.metadata["steering"].startswith("2.0 * ")
    assert "from the end of the instruction on" in sample.output.metadata["steering"]
    assert sample.output.metadata["prompt_format"] == "chat-template"
    assert (sample.output.stop_reason, sample.output.usage.output_tokens) == ("max_tokens", 8)
    prompt = cl.prompts.Prompt.of(get_model("caa-lens/demo").api.examinee.model, QUESTIONS[0])
    assert sample.output.usage.input_tokens == len(prompt)


def test_the_bundled_task_counts_the_choice_that_is_named_first(demo_model, file, tmp_path):
    task = inspect_registry.easy_questions(max_tokens=8)
    task.dataset = task.dataset[:4]
    log = run(task, tmp_path, **args_of(file, -1))
    assert log.status == "success", log.error
    right = [
        named_first(sample.output.completion, one.choices) == one.right
        for sample, one in zip(log.samples, load_easy_questions()[:4], strict=True)
    ]
    assert [sample.scores["first_named"].value == "C" for sample in log.samples] == right
    assert log.results.scores[0].metrics["accuracy"].value == sum(right) / 4


def test_the_letters_are_inspects_own_multiple_choice(tmp_path):
    task = inspect_registry.easy_questions(form="letters", max_tokens=1)
    task.dataset = task.dataset[:1]
    (sample,) = run(task, tmp_path).samples
    assert "A) Berlin\nB) Paris\nC) Madrid\nD) Rome" in sample.messages[0].text
    assert sample.target == "B"


def ask(api, messages=None, tools=(), **config):
    import anyio

    messages = messages or [ChatMessageUser(content="How are you?")]
    options = GenerateConfig(**{"max_tokens": 3} | config)
    return anyio.run(lambda: api.generate(messages, list(tools), "none", options))


@pytest.mark.parametrize(
    "config",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"logprobs": True},
        {"num_choices": 2},
        {"frequency_penalty": 0.5},
        {"logit_bias": {5: 1.0}},
        {"response_schema": {"name": "x", "json_schema": {"type": "object"}}},
        {"extra_body": {"x": 1}},
    ],
    ids=str,
)
def test_an_option_that_would_be_passed_over_is_refused(config):
    with pytest.raises(ValueError, match=f"do not take {next(iter(config))}: leave it out"):
        ask(get_model("caa-lens/demo").api, **config)


def test_options_that_change_nothing_are_taken():
    api = get_model("caa-lens/demo").api
    plain = ask(api).completion
    assert ask(api, top_p=1.0, num_choices=1, logprobs=False, timeout=60, max_connections=9).completion == plain


def test_tools_pictures_and_other_orders_of_messages_are_refused():
    api = get_model("caa-lens/demo").api
    with pytest.raises(ValueError, match=r"got tools \(add, \.\.\.\)"):
        ask(api, tools=[ToolInfo(name="add", description="adds")])
    with pytest.raises(ValueError, match="a message of the user holds image"):
        ask(api, [ChatMessageUser(content=[ContentText(text="?"), ContentImage(image="x.png")])])
    with pytest.raises(ValueError, match="found messages of user, assistant: the assistant's last"):
        ask(api, [ChatMessageUser(content="a"), ChatMessageAssistant(content="b")])
    asked = [ChatMessageSystem(content="s"), ChatMessageUser(content=[ContentText(text="a"), ContentText(text="b")])]
    model = api.examinee.model
    assert ask(api, asked).completion == cl.generate(model, "a\nb", system="s", max_new_tokens=3)


def test_arguments_that_are_unknown_or_that_inspect_could_not_tell_apart_are_refused(file):
    with pytest.raises(ValueError, match="unknown model argument coefficient: expected -M with one of vectors, layer"):
        get_model("caa-lens/demo", coefficient=2)
    with pytest.raises(TypeError, match="expected the path of a file of vectors, got a SteeringVectors"):
        get_model("caa-lens/demo", vectors=cl.SteeringVectors.load(file), layer=14, memoize=False)
    with pytest.raises(ValueError, match="holds vectors of layers 13, 14, which would all act at once"):
        get_model("caa-lens/demo", vectors=str(file))


def test_a_file_that_changed_since_it_was_read_is_told(demo_model, file, tmp_path):
    vectors = cl.SteeringVectors.load(file)
    path = vectors.at([14]).save(tmp_path / "v.safetensors")
    api = get_model("caa-lens/demo", vectors=str(path)).api
    ask(api)
    (vectors.at([13])).save(path)
    assert get_model("caa-lens/demo", vectors=str(path)).api is api  # Inspect keeps it
    with pytest.raises(ValueError, match=r"has changed since it was read, .* memoize=False"):
        ask(api)
    path.unlink()
    ask(api)


def test_models_of_one_name_are_one_model_and_answer_one_at_a_time(file):
    one, two = (get_model("caa-lens/demo", **args_of(file, multiplier)).api for multiplier in (1, 2))
    assert one.examinee.model is two.examinee.model
    assert one._shared.lock is two._shared.lock
    assert one.max_connections() == 1


def test_messages_are_counted_by_the_models_own_tokenizer(demo_model):
    import anyio

    text = "Antidisestablishmentarianism"
    counted = anyio.run(lambda: get_model("caa-lens/demo").api.count_text_tokens(text))
    assert counted == len(demo_model.tokenizer(text)["input_ids"])


def test_inspect_finds_the_provider_and_the_task_by_the_entry_point(tmp_path):
    (entry,) = [one for one in entry_points(group="inspect_ai") if one.name == "caa_lens"]
    assert entry.value == "caa_lens.evaluation.inspect_registry"
    command = [sys.executable, "-m", "inspect_ai", "eval", "caa_lens/easy_questions", "--model", "caa-lens/demo"]
    vectors = cl.SteeringVectors.from_vectors([cl.SteeringVector.from_direction(torch.ones(576), 14)])
    steered = ["-M", f"vectors={vectors.save(tmp_path / 'v.safetensors')}", "-M", "layer=14", "-M", "multiplier=0.5"]
    options = ["--limit", "1", "--max-tokens", "2", "--log-dir", str(tmp_path), "--log-format", "json"]
    command += [*steered, *options, "--display", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # not in the checkout, see above
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert log["status"] == "success"
    assert log["eval"]["model_args"] == {"vectors": str(tmp_path / "v.safetensors"), "layer": 14, "multiplier": 0.5}
    assert "0.5 * " in log["samples"][0]["output"]["metadata"]["steering"]


def test_the_page_of_evaluations_runs_with_its_blocks_for_inspect(stand_ins, tmp_path, monkeypatch, capsys):  # noqa: F811
    page = ROOT / "docs" / "evaluation.md"
    assert any(block.interop and "inspect-ai" in block.reason for block in blocks(page))
    answers = examinees.generate_tokens
    few = lambda *prompts, max_new_tokens, **options: answers(*prompts, max_new_tokens=3, **options)  # noqa: E731
    monkeypatch.setattr(examinees, "generate_tokens", few)
    monkeypatch.setattr(inspect_model, "cached_model", lambda key: None)  # of earlier tests, by the same name
    monkeypatch.setattr(test_docs, "INTEROP", True)
    if "demo" in stand_ins:
        kept = inspect_provider._Loaded(stand_ins["demo"])  # the table alone does not keep it
        monkeypatch.setitem(inspect_provider._loaded, KEY, kept)
    test_docs.test_the_code_of_a_page_runs_in_order(page, stand_ins, tmp_path, monkeypatch, capsys)
    assert len(list((tmp_path / "logs").iterdir())) == 6
