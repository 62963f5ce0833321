"""`--dry-run`: what a run will take, measured on a part of it where the model is, and planned from rates elsewhere."""

import json
import re
import shutil
import tempfile
from dataclasses import replace

import pandas as pd
import pytest
from helpers.experiments_command import command
from rich.console import Console

from caa_lens.contrast.files import PAPER_SETS
from caa_lens.contrast.sets import ContrastSet
from caa_lens.paper.numbers import DATASET_SIZES
from caa_lens.paper.sources import NAMES
from experiments.__main__ import main
from experiments.catalogue import EXPERIMENTS
from experiments.running import first_units
from experiments.running.beforehand import n_layers, n_parameters, place_of
from experiments.running.behavior_sets import behavior_sets, missing_sets
from experiments.running.context import Context
from experiments.running.costs import Cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.plan import memory_bytes, rates_elsewhere, unit_costs
from experiments.running.rates import GPUS, Rates, gpu_rates, smallest_gpu, stated_rates
from experiments.running.run_folder import RunFolder
from experiments.running.runner import skip_reasons
from experiments.running.settings import RunConfig
from experiments.running.terminal import show_duration, show_number
from experiments.running.units import Unit

BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
LLAMA = "meta-llama/Llama-2-7b-chat-hf"
QUESTIONS = ContrastSet.from_pairs(
    [(f"Is {n} even?\n\nChoices:\n (A) Yes\n (B) No", *("(A)", "(B)")[:: 1 - 2 * (n % 2)]) for n in range(9)]
)


# ---- planned from rates ----------------------------------------------------------------------------------------


def test_the_paper_can_be_planned_before_its_data_are_fetched(no_data, tmp_path):
    words = ("all", "--dry-run", "--model", LLAMA, "--out", str(tmp_path / "run"))
    done = command(*words, "--flops", "1.5e14", "--bandwidth", "2e12", "--judge", "j", "--judge-url", "http://h/v1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert {one.name for one in EXPERIMENTS if not one.apart} <= set(lines)  # Figures 9 and 10 included
    assert re.findall(r"(\w+) is skipped", done.stdout) == ["layer_choice"]  # the paper names the layer
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
    for behavior in PAPER_SETS:
        sets = behavior_sets(planned, behavior)
        assert len(sets.generate) == DATASET_SIZES[behavior]["generate"]
        assert (len(sets.test), len(sets.open_ended)) == (50, 50)
        assert sets.generate.kind == "ab"
    assert "stand_ins" not in planned.model_dump()
    assert {name.removeprefix("finetuned_") for name in skip_reasons(EXPERIMENTS, planned)} == {
        "judged",
        "layer_choice",
    }
    assert missing_sets(RunConfig.of("demo")) == ()


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


def test_a_model_that_is_not_here_or_would_not_run_is_planned_for_a_card_that_holds_it(monkeypatch, models):
    config, some = RunConfig.of(LLAMA), [BY_NAME["vectors"]]
    rates = rates_elsewhere(config, some, None, None, "cpu")
    assert rates.flops == GPUS["v100"].single * 1e12  # 29.6 GB
    assert rates.source.startswith(f"{LLAMA} is not on this machine; planned for one V100 32 GB")
    assert rates_elsewhere(config, some, "h100", None, "cpu") == gpu_rates("h100", "float32")
    assert rates_elsewhere(config, some, None, stated_rates(1.0, 2.0), "cpu").source == "stated"
    with pytest.raises(ValueError, match="got --gpu and --flops, expected one of them"):
        rates_elsewhere(config, some, "h100", stated_rates(1.0, 2.0), "cpu")
    assert rates_elsewhere(RunConfig.of("some/one"), some, None, None, "cpu") is None  # of unknown size
    here = RunConfig.of(str(models / "chat"))
    assert rates_elsewhere(here, some, None, None, "cpu") is None  # to be measured
    monkeypatch.setattr("caa_lens.models.loading.device_memory.free_memory", lambda device: 1e3)
    assert rates_elsewhere(here, some, None, None, "cpu").source.startswith(
        "it would not run here, as cpu has 0.0 GB free; planned for one T4"
    )


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


def test_estimates_are_operations_at_a_rate_or_weights_read_once_a_step():
    rates = Rates(flops=1e9, bandwidth=1e9, source="stated")
    assert rates.seconds(Cost(tokens=100), 1e6, "float32") == pytest.approx(2 * 1e6 * 100 / 0.5e9)
    assert rates.seconds(Cost(tokens=1, steps=100), 1e6, "float16") == pytest.approx(100 * 2e6 / 1e9)
    one, five = (scoring_cost(QUESTIONS, n) for n in (1, 5))
    assert five.forwards == 45
    assert five.tokens - one.tokens == pytest.approx(4 * (one.tokens - scoring_cost(QUESTIONS, 0).tokens))
    assert (show_number(1234), show_number(134_515_008), show_number(12.4)) == ("1.2 k", "135 M", "12")
    assert (show_duration(89), show_duration(600), show_duration(7200)) == ("89 s", "10 min", "2.0 h")


# ---- measured here ---------------------------------------------------------------------------------------------


class Clock:
    """Stands still but where a made-up unit works."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(first_units, "time", clock)
    return clock


def made_up(clock, name="made_up", rate=0.01, copying=0.0, loading=0.0, fails_below=0, **more):
    """An experiment of which a unit takes `rate` seconds a token, as many tokens as it has pairs times its `part`."""

    def run(unit, context):
        if context.config.n_generate < fails_below:
            raise ValueError("too few pairs")
        clock.now += rate * cost(unit, context).work + copying + loading
        context.loaded.copying += copying
        context.loaded.seconds += loading  # of a model that stays for other units
        return pd.DataFrame({"x": [1]})

    def cost(unit, context):
        return Cost(tokens=context.config.n_generate * unit["part"])

    def units(config):
        return [Unit.of(behavior=b, part=part) for b in config.behaviors for part in (1, 5)]

    plain = {"title": "", "source": "", "section": None, "units": units, "run": run, "cost": cost}
    return Experiment(name=name, **(plain | more))


@pytest.fixture
def small(models):
    return RunConfig.of(str(models / "chat"), behaviors=("sentiment", "refusal"), n_generate=100, n_test=40)


def estimate_of(experiments, config, tmp_path, monkeypatch):
    monkeypatch.setattr("caa_lens.models.loading.load.load_model", lambda *_, **__: "the model")
    costs = unit_costs(experiments, Context(config, RunFolder(tmp_path / "run")))
    return costs, first_units.measured(experiments, costs, config, device="cpu", console=Console(quiet=True))


def test_units_take_as_many_times_the_measured_seconds_as_they_are_more_work(clock, small, tmp_path, monkeypatch):
    one, other = made_up(clock), made_up(clock, "copying", rate=0.02, copying=0.25, loading=0.5)
    costs, estimate = estimate_of([one, other], small, tmp_path, monkeypatch)
    assert len(costs) == 8
    for (name, unit), cost in costs.items():
        assert cost.tokens == 100 * unit["part"]
        expected = 0.01 * cost.tokens if name == "made_up" else 0.25 + 0.02 * cost.tokens
        assert estimate.seconds[name, unit] == pytest.approx(expected)
    assert estimate.how == {"made_up": "measured", "copying": "measured"}


def test_a_part_is_doubled_until_it_is_long_enough_or_the_whole_and_the_first_part_is_not_taken_alone(
    clock, small, tmp_path, monkeypatch
):
    sizes, before = [], []

    def warming_up(unit, context):
        sizes.append(context.config.n_generate)
        clock.now += (0.9 if not before else 0.0) + 0.01 * context.config.n_generate
        before.append(1)
        return pd.DataFrame({"x": [1]})

    one = made_up(clock, run=warming_up, units=lambda config: [Unit.of(behavior="sentiment", part=1)])
    _, estimate = estimate_of([one], small, tmp_path, monkeypatch)
    assert sizes == [4, 8, 16, 32, 64]  # of 0.64 s; the first took 0.94 s
    assert list(estimate.seconds.values()) == [pytest.approx(1.0)]
    sizes.clear()
    estimate_of([one], small.model_copy(update={"n_generate": 20}), tmp_path, monkeypatch)
    assert sizes == [4, 8, 16, 20]


def test_what_cannot_be_measured_is_as_fast_as_the_others(clock, small, tmp_path, monkeypatch):
    asked = []

    def never(unit, context):
        asked.append(unit)

    broken = made_up(clock, "broken", fails_below=10**6)
    picky = made_up(clock, "picky", fails_below=8, rate=0.03)
    judged = made_up(clock, "judged", run=never, cost=lambda unit, context: Cost(requests=3))
    costs, estimate = estimate_of([made_up(clock), broken, picky, judged], small, tmp_path, monkeypatch)
    assert estimate.how == {"made_up": "measured", "broken": "as the others", "picky": "measured"}
    assert not asked  # a judge
    for (name, unit), seconds in estimate.seconds.items():
        if name == "broken":
            assert 0.01 < seconds / costs[name, unit].work < 0.03  # between the two that were measured
        elif name == "judged":
            assert seconds == 0


def test_adapters_are_not_merged_for_a_plan(clock, small, tmp_path, monkeypatch):
    finetuning = made_up(clock, "finetuning")
    for finetune, how in (("full", "measured"), ("lora", "as the others")):
        config = small.model_copy(update={"finetune": finetune})
        _, estimate = estimate_of([made_up(clock), finetuning], config, tmp_path, monkeypatch)
        assert estimate.how["finetuning"] == how


def test_measuring_ends_with_the_patience(clock, small, tmp_path, monkeypatch):
    monkeypatch.setattr(first_units, "PATIENCE", 0.07)  # the first part of all takes 0.08 s
    slow = [made_up(clock, name, rate=0.02) for name in ("first", "second", "third")]
    _, estimate = estimate_of(slow, small, tmp_path, monkeypatch)
    assert estimate.how == {"first": "measured in part", "second": "as the others", "third": "as the others"}


def test_what_a_unit_needs_is_done_before_it_and_not_timed(clock, small, tmp_path, monkeypatch):
    def uses(unit, context):
        done = context.folder.frames("made_up", [Unit.of(behavior=unit["behavior"], part=1)])
        assert len(done) == 1
        assert not context.folder.is_done("made_up", Unit.of(behavior=unit["behavior"], part=5))
        clock.now += 0.6
        return pd.DataFrame({"x": [1]})

    user = made_up(clock, "user", run=uses, needs=lambda config: ("made_up",))
    user = replace(user, units=lambda config: [Unit.of(behavior=b, part=1) for b in config.behaviors])
    _, estimate = estimate_of([user, made_up(clock)], small, tmp_path, monkeypatch)
    seconds = [seconds for (name, _), seconds in estimate.seconds.items() if name == "user"]
    assert seconds == [pytest.approx(0.6 * 100 / 8)] * 2


def test_units_of_one_kind_differ_in_the_behavior_or_are_as_much_work(tmp_path):
    config = RunConfig.of("demo", behaviors=("sentiment", "refusal", "sycophancy"))
    able = [BY_NAME[name] for name in ("contrast_pca", "system_prompts", "vector_words", "data_tables")]
    firsts = first_units.kinds(unit_costs(able, Context(config, RunFolder(tmp_path / "run"))))
    of = {name: {key[1].name for key in firsts.values() if key[0] == name} for name in BY_NAME}
    assert of["contrast_pca"] == {"behavior=refusal,what=pca", "behavior=refusal,what=separability"}
    assert of["system_prompts"] == {"behavior=sentiment,system=positive"}
    assert of["vector_words"] == {"behavior=sentiment,reading=normed", "behavior=sentiment,reading=in_context"}
    assert of["data_tables"] == {"table=sizes"}


def test_a_part_has_no_more_than_the_run_and_a_layer(models):
    config = RunConfig.of(str(models / "chat"), n_test=3, base_model="some/base")
    part = first_units.part_of(config, "refusal", 2)
    assert (part.n_test, part.n_generate, part.n_prompts, part.behaviors) == (3, 8, 2, ("refusal",))
    assert (part.layer, part.base_model) == (n_layers(config.model, fetch=False) // 2, None)  # the base is not here
    assert first_units.part_of(config.model_copy(update={"layer": 0}), "refusal", 1).layer == 0


def test_a_plan_of_a_model_that_is_here_is_measured_and_leaves_nothing(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(first_units, "LONG_ENOUGH", 0.0)
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(models / "chat"), "behaviors": "refusal", "max_new_tokens": 4, "n_generate": 8}
    names = ["multipliers", "open_ended", "finetuned_text", "base_transfer"]
    base = str(models / "base")
    main(names, dry_run=True, base_model=base, n_test=4, n_prompts=1, out=tmp_path / "run", **settings)
    said = capsys.readouterr().out
    assert re.search(
        r"Time about \d+ s: \d\.\d s of it for loading the model, and the rest as measured here \(cpu", said
    )
    assert "how measured" in said  # of all: none could not be
    assert "Nothing was written." in said
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def test_a_model_lies_here_if_all_its_files_do(models, tmp_path, monkeypatch):
    chat = models / "chat"
    assert place_of(str(chat)) == chat
    assert place_of("some/model") is None
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(chat, snapshot)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    found = place_of("some/model")
    assert found == snapshot
    assert (n_layers("some/model", fetch=False), n_parameters("some/model")) == (
        n_layers(str(chat), fetch=False),
        n_parameters(str(chat)),
    )
    weights = snapshot / "model.safetensors"
    shards = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(shards))
    weights.rename(snapshot / "model-1-of-2.safetensors")
    assert place_of("some/model") is None  # a download that broke off
    (snapshot / "model-2-of-2.safetensors").touch()
    assert place_of("some/model") == snapshot
    (snapshot / "config.json").unlink()
    assert place_of(str(snapshot)) is None


def test_the_demo_model_lies_here_once_it_was_fetched(no_data):
    assert place_of("demo") is None
