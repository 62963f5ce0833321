"""`python -m experiments`: what it plans, and that a mistake is one line of our own and leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import random_llama

from caa_lens.paper.numbers import DATASET_SIZES
from caa_lens.paper.sources import NAMES
from experiments.__main__ import main
from experiments.catalogue import EXPERIMENTS
from experiments.running.beforehand import n_layers
from experiments.running.behavior_sets import behavior_sets, missing_sets
from experiments.running.context import Context
from experiments.running.costs import Cost
from experiments.running.plan import memory_bytes, planned_rates
from experiments.running.rates import GPUS, gpu_rates, smallest_gpu, stated_rates
from experiments.running.run_folder import RunFolder
from experiments.running.runner import skip_reasons
from experiments.running.settings import PAPER, SIZES, RunConfig

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
LLAMA = "meta-llama/Llama-2-7b-chat-hf"


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "experiments", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A user's cache in which nothing has been fetched."""
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path / "cache"))
    behavior_sets.cache_clear()
    yield str(tmp_path / "cache")
    behavior_sets.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random Llama of few layers; without a tokenizer, as nothing here gets so far."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_llama(folder)
    return str(folder)


# ---- defaults and plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_for_llama_2_chat_nothing_need_be_said_to_do_as_the_paper_did(size):
    config = RunConfig.of(f"meta-llama/Llama-2-{size}-chat-hf")
    assert config == RunConfig.of(
        config.model, "paper", base_model=f"meta-llama/Llama-2-{size}-hf", data="paper", behaviors=PAPER
    )
    assert (config.n_test, config.layer_step, config.max_new_tokens) == (50, 1, 100)
    assert (config.n_generate, config.n_prompts, config.n_questions) == (None, None, None)
    assert RunConfig.of(config.model, "small", n_test=9).n_generate == SIZES["small"]["n_generate"]
    assert RunConfig.of(config.model, base_model="none").base_model is None


def test_all_other_models_start_small_and_without_a_base_model():
    for name in ("demo", "someone/else-chat-hf", "meta-llama/Llama-2-7b-hf"):
        config = RunConfig.of(name)
        assert (config.n_test, config.base_model) == (SIZES["small"]["n_test"], None)


def test_a_folder_of_llama_takes_the_base_model_beside_it(tmp_path):
    chat = tmp_path / "Llama-2-7b-chat-hf"
    assert RunConfig.of(str(chat)).base_model == "meta-llama/Llama-2-7b-hf"
    (tmp_path / "Llama-2-7b-hf").mkdir()
    assert RunConfig.of(str(chat)).base_model == str(tmp_path / "Llama-2-7b-hf")


def test_the_paper_can_be_planned_before_its_data_are_fetched(no_data, tmp_path):
    words = ("all", "--dry-run", "--model", LLAMA, "--out", str(tmp_path / "run"))
    done = command(*words, "--flops", "1.5e14", "--bandwidth", "2e12", "--judge", "j", "--judge-url", "http://h/v1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert set(BY_NAME) <= set(lines)  # none is skipped, Figures 9 and 10 included
    assert " is skipped" not in done.stdout
    n_pairs = sum(sizes["generate"] for sizes in DATASET_SIZES.values())
    assert re.search(rf"\b{2 * n_pairs / 1000:.1f} k\b", lines["vectors"])
    assert "blank questions stand in for coordinate-other-ais" in done.stdout
    assert "`caa-lens data fetch` gets all of them" in done.stdout
    requests = re.search(r"^(\d\.\d) k requests to the judge j;", done.stdout, re.MULTILINE)
    assert float(requests[1]) >= 2.4  # 7 behaviors, 7 multipliers and 50 prompts, at least
    assert "about 32.6 GB a process, for finetuning (27.0 GB are its weights)" in done.stdout
    assert "On the disk: 27.0 GB for the weights of meta-llama/Llama-2-7b-chat-hf and of the base model" in done.stdout
    assert "2.0 TB/s (stated)" in done.stdout
    assert "Nothing was written." in done.stdout
    assert not (tmp_path / "run").exists()
    assert "…" not in done.stdout


def test_stand_ins_are_as_many_as_the_paper_says_and_no_setting_of_the_run(no_data):
    config = RunConfig.of(LLAMA)
    assert set(missing_sets(config)) == set(NAMES)
    planned = config.model_copy(update={"stand_ins": missing_sets(config)})
    for behavior in PAPER:
        sets = behavior_sets(planned, behavior)
        assert len(sets.generate) == DATASET_SIZES[behavior]["generate"]
        assert (len(sets.test), len(sets.open_ended)) == (50, 50)
        assert sets.generate.kind == "ab"
    assert "stand_ins" not in planned.model_dump()
    assert {name.removeprefix("finetuned_") for name in skip_reasons(EXPERIMENTS, planned)} == {"judged"}
    assert missing_sets(RunConfig.of("demo")) == ()


def test_a_run_without_the_papers_data_names_the_one_command_and_leaves_nothing(no_data, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.__main__.n_layers", lambda model, fetch: 32)
    with pytest.raises(
        FileNotFoundError, match=r"no coordinate-other-ais, .*refusal\. `caa-lens data fetch` gets every"
    ):
        main(["vectors"], model=LLAMA, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_the_neediest_experiment():
    n = 1_000_000
    config = RunConfig.of("demo")
    plain, finetuning = BY_NAME["vectors"], BY_NAME["finetuning"]
    assert memory_bytes(config, n, [plain]) == pytest.approx(1.1 * 4 * n)
    assert memory_bytes(config, n, [plain, finetuning, plain]) == pytest.approx(
        1.1 * 1.1 * 4 * n
    )  # weights, and a lesson's activations
    adapters = config.model_copy(update={"finetune": "lora", "dtype": "float16"})
    assert memory_bytes(adapters, n, [plain]) == pytest.approx(1.1 * 2 * n)
    assert memory_bytes(adapters, n, [plain, finetuning]) == pytest.approx(1.1 * 1.1 * 4 * n)  # in float32


def test_rates_are_stated_together_or_not_at_all():
    assert stated_rates(None, None) is None
    rates = stated_rates(1e14, 2e12)
    assert (rates.flops, rates.bandwidth) == (1e14, 2e12)
    for flops, bandwidth in ((1e14, None), (None, 2e12), (1e14, 0.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match=r"expected two positive numbers.*--flops 1\.5e14 --bandwidth 2e12"):
            stated_rates(flops, bandwidth)


def test_a_cards_rates_are_of_the_runs_number_format_and_say_that_they_are_planned():
    single, half = gpu_rates("a100-80", "float32"), gpu_rates("a100-80", "bfloat16")
    assert (single.flops, half.flops) == (19.5e12, 312e12)  # TF32 is off in PyTorch
    assert single.bandwidth == half.bandwidth == pytest.approx(0.6 * 2039e9)
    assert single.source.startswith("planned for one A100 80 GB in float32 without TF32 by its data sheet")
    assert single.source.endswith("not measured")
    with pytest.raises(ValueError, match=r"got --gpu t4 and bfloat16, .*: give --dtype float16"):
        gpu_rates("t4", "bfloat16")
    memories = [card.memory for card in GPUS.values()]
    assert smallest_gpu(33e9, "float32") == "a100-40"
    assert smallest_gpu(15e9, "bfloat16") == "4090"  # a T4 would hold it
    assert smallest_gpu(999e9, "float32") == "h200"
    assert max(memories) == GPUS["h200"].memory


def test_a_model_that_would_not_run_here_is_planned_for_a_card_that_holds_it(monkeypatch):
    config, some = RunConfig.of(LLAMA), [BY_NAME["vectors"]]
    monkeypatch.setattr("caa_lens.models.loading.device_memory.free_memory", lambda device: 16e9)
    monkeypatch.setattr("experiments.running.plan.measure_rates", lambda dtype, device: "measured")
    rates = planned_rates(config, some, None, None, "cpu")
    assert rates.flops == GPUS["v100"].single * 1e12  # 29.6 GB
    assert rates.source.startswith("it would not run here, as cpu has 16.0 GB free; planned for one V100 32 GB")
    assert planned_rates(config, some, "h100", None, "cpu") == gpu_rates("h100", "float32")
    assert planned_rates(config, some, None, stated_rates(1.0, 2.0), "cpu").source == "stated"
    with pytest.raises(ValueError, match="got --gpu and --flops, expected one of them"):
        planned_rates(config, some, "h100", stated_rates(1.0, 2.0), "cpu")
    monkeypatch.setattr("caa_lens.models.loading.device_memory.free_memory", lambda device: 64e9)
    assert planned_rates(config, some, None, None, "cpu") == "measured"
    assert planned_rates(RunConfig.of("some/one"), some, None, None, "cpu") == "measured"  # of unknown size


def test_a_plan_says_for_what_card_and_whether_it_holds_the_model(no_data, tmp_path, capsys):
    main(["finetuning"], model=LLAMA, out=tmp_path / "run", dry_run=True, gpu="4090", finetune="lora")
    said = capsys.readouterr().out
    assert "(planned for one RTX 4090 in float32 without TF32 by its data sheet" in said
    assert "That is more than the 24 GB of this card" in said
    assert "and 27.0 GB in the run folder for a moment, for merged adapters." in said


def test_costs_add_up_requests_too():
    both = Cost(tokens=1, requests=2) + Cost(forwards=3, requests=5, steps=1)
    assert (both.forwards, both.tokens, both.steps, both.requests) == (3, 1, 1, 7)


@pytest.mark.parametrize(("name", "depth"), [("meta-llama/Llama-2-13b-chat-hf", 40), ("demo", 30), ("some/one", 32)])
def test_a_plan_sweeps_as_many_layers_as_the_model_has(name, depth, tmp_path):
    config = RunConfig.of(name, data="bundled", behaviors=("refusal",), layer_step=1, n_test=16)
    one = BY_NAME["layer_sweep"]
    (unit,) = one.units(config)
    assert one.cost(unit, Context(config, RunFolder(tmp_path))).forwards == 16 * (2 * depth + 1)


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("layer", 99, r"layer is 99, but tiny has layers 0 to 2: give another with --layer"),
        ("layer", -1, r"layer is -1, expected at least 0: give another with --layer"),
        ("dtype", "int8", r"dtype is 'int8', expected 'float32', 'bfloat16' or 'float16': give another with --dtype"),
        ("data", "x", r"data is 'x', expected 'bundled' or 'paper': give another with --data"),
        ("n_test", 1, r"n_test is 1, expected at least 2: give another with --n-test"),
        ("behaviors", "a,a", r"behaviors must differ, got a, a: name each once with --behaviors"),
        ("device", "tpu", r"device is 'tpu', but this machine has 1 cpu.*: give another with --device"),
        ("device", "cpu:1", r"device is 'cpu:1', but this machine has"),
        ("workers", 0, r"workers is 0, expected at least 1: give another with --workers"),
        ("flops", 1e12, r"got --flops 1000000000000\.0 and --bandwidth None, expected two"),
        ("gpu", "gtx", r"got --gpu gtx, expected one of t4, .*h100.*; of another card, give --flops and --bandwidth"),
        ("size", "huge", r"unknown size 'huge': expected one of small, paper"),
        ("finetune", "some", r"finetune is 'some', expected 'full' or 'lora'"),
    ],
)
def test_a_setting_that_does_not_fit_is_told_in_a_line_and_leaves_nothing(model, tmp_path, option, value, said):
    with pytest.raises(ValueError, match=said) as caught:
        main(["vectors"], **{"model": model, "out": tmp_path / "run", option: value})
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    assert "http" not in text
    assert list(tmp_path.iterdir()) == []


def test_several_misfits_are_told_at_once():
    with pytest.raises(ValueError, match=r"dtype is 'x', .*; n_test is 0, expected at least 2"):
        RunConfig.of("demo", dtype="x", n_test=0)
    with pytest.raises(ValueError, match="unknown setting 'colour': expected some of model, "):
        RunConfig.of("demo", colour="blue")


def test_a_file_in_the_place_of_the_run_folder_is_told(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below" / "it"):
        with pytest.raises(ValueError, match=rf"{file} is a file, expected a folder .*--out"):
            main(["vectors"], model=model, out=out)
    assert file.read_text() == "mine"


def test_a_model_that_is_not_there_is_told_before_anything_is_written(tmp_path):
    for name in (str(tmp_path / "none"), "a/b/c", "none.gguf", "nothing"):
        with pytest.raises(FileNotFoundError, match=r"there is no model .* give another with --model"):
            main(["vectors"], model=name, out=tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        main(["vectors"], model=str(tmp_path / "empty"), out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_depth_is_read_from_the_configuration(model):
    assert n_layers(model, fetch=False) == 3
    assert n_layers("demo", fetch=False) == 30
    assert n_layers("meta-llama/Llama-2-13b-chat-hf", fetch=False) == 40
    assert n_layers("someone/else", fetch=False) is None


def test_on_the_command_line_a_mistake_is_one_line_and_no_traceback(model, tmp_path):
    done = command("vectors", "--model", model, "--layer", "99", "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: layer is 99, but tiny has layers 0 to 2: give another with --layer, or none for the one that the layer "
        "sweep finds best"
    ]
    assert not (tmp_path / "run").exists()


def test_help_says_what_is_the_default_for_llama(model):
    done = command("--help", COLUMNS="200")
    assert "paper by default for Llama 2's chat models" in done.stdout
    assert "python -m experiments all --model meta-llama/Llama-2-7b-chat-hf" in re.sub(r"\s+", " ", done.stdout)
    assert "--bandwidth" in done.stdout
