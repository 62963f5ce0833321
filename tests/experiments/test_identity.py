"""What a run is held to and what only some experiments are: settings and data that join, differ or are left out."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import cheap_run as cheap
from helpers.models import random_llama
from safetensors.torch import load_file, save_file

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.training_pairs import TrainingPairsWarning
from caa_lens.models.loading.fingerprint import file_digest, model_fingerprint
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors
from experiments.catalogue import EXPERIMENTS
from experiments.paper import figure_5_judged as judged
from experiments.paper import figure_5_open_ended as open_ended
from experiments.paper import figures_9_10_base_to_chat as base_to_chat
from experiments.paper import tables_4_10_13_finetuning as finetuning
from experiments.paper import tables_5_12_knowledge as knowledge
from experiments.running.behavior_sets import behavior_sets
from experiments.running.context import Context
from experiments.running.identity import hold, own_identity, run_identity, start_notes
from experiments.running.run_folder import FILE_HASH, OtherRunError, RunFolder
from experiments.running.runner import run
from experiments.running.settings import OF_NONE, OF_SOME, RunConfig
from experiments.running.units import Unit

JUDGE = {"judge": "x", "judge_url": "http://name:secret@host:1/v1?key=1"}
NOTES = {"host": "http://host:1/v1"}


def judge_of(config):
    return {"judge": config.judge}


JUDGED = replace(
    cheap.TOTALS, name="judged", own=judge_of, skip=lambda config: None if config.judge else "no judge was given"
)
ALL = [cheap.NUMBERS, JUDGED]


def with_judge(name):
    return cheap.CONFIG.model_copy(update={"judge": name, "judge_url": "http://host:1/v1"})


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.path.glob("*/units/*.parquet"))}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    return folder


def test_a_judge_joins_a_run_that_was_made_without_one(folder):
    outcomes = run(ALL, cheap.CONFIG, folder)
    assert [outcome.skipped for outcome in outcomes] == ["", "no judge was given"]
    before = contents(folder)
    outcomes = run(ALL, with_judge("a"), folder)
    assert not any(outcome.skipped or outcome.failed for outcome in outcomes)
    after = contents(folder)
    assert {file: after[file] for file in before} == before
    assert len(after) == len(before) + 2


def test_another_judge_is_refused_before_anything_is_done_and_what_is_there_stays(folder):
    run(ALL, with_judge("a"), folder)
    unit = cheap.units(cheap.CONFIG)[0]
    folder.unit_file("numbers", unit).unlink()
    before = contents(folder)
    with pytest.raises(
        OtherRunError, match=r"judged\.judge: 'a' there, 'b' now\nthey stay\..*delete their folders \(judged\)"
    ):
        run(ALL, with_judge("b"), folder)
    assert contents(folder) == before
    assert not folder.is_done("numbers", unit)
    # Experiments that do not use a judge are not concerned, nor is a run without one.
    assert not run([cheap.NUMBERS], with_judge("b"), folder)[0].failed
    outcomes = run(ALL, cheap.CONFIG, folder)
    assert outcomes[1].skipped == "no judge was given"
    assert '"skipped": ""' in folder.section_file("judged").read_text()  # what was found is still shown


def test_an_experiment_without_a_finished_unit_takes_other_settings(folder):
    def fails(unit, context):
        raise RuntimeError("the judge is away")

    failing = replace(JUDGED, run=fails)
    assert run([cheap.NUMBERS, failing], with_judge("wrong"), folder)[1].failed
    assert not run(ALL, with_judge("right"), folder)[1].failed
    assert json.loads((folder.path / "judged" / "identity.json").read_text()) == {"judge": "right"}


def test_a_deleted_experiment_is_done_anew_with_other_settings(folder):
    import shutil

    run(ALL, with_judge("a"), folder)
    shutil.rmtree(folder.path / "judged")
    assert not run(ALL, with_judge("b"), folder)[1].failed


def test_what_needs_an_experiment_is_held_to_its_settings_too(folder):
    after = replace(
        cheap.TOTALS, name="after", needs=lambda config: ("judged",), run=lambda unit, context: pd.DataFrame({"x": [1]})
    )
    three = [cheap.NUMBERS, JUDGED, after]
    sections = [replace(one, section=cheap.section) for one in three[:2]]
    after = replace(after, section=JUDGED.section)
    three = [*sections, after]
    assert own_identity(after, three, with_judge("a")) == {"judge": "a"}
    hold(three, with_judge("a"), folder)
    folder.save("after", cheap.units(cheap.CONFIG)[0], pd.DataFrame({"x": [1]}))
    with pytest.raises(OtherRunError, match=r"after\.judge: 'a' there, 'b' now"):
        hold(three, with_judge("b"), folder)


def test_the_last_settings_hold_until_a_unit_is_finished(folder):
    assert folder.hold("judged", {"judge": "a"}) == []
    assert folder.hold("judged", {"judge": "b"}) == []  # nothing is finished yet, so the second one has its way
    folder.save("judged", cheap.units(cheap.CONFIG)[0], pd.DataFrame({"x": [1]}))
    assert folder.hold("judged", {"judge": "a"}) == ["judged.judge: 'b' there, 'a' now"]


# ---- the real experiments --------------------------------------------------------------------------------------


def test_settings_of_some_experiments_are_no_part_of_the_run():
    plain = run_identity(RunConfig.of("demo"))
    more = {"judge_settings": "{}", "judge_concurrency": 2, "judge_rpm": 5.0, "judge_timeout": 9.0}
    assert run_identity(RunConfig.of("demo", base_model="b", finetune="lora", **JUDGE, **more)) == plain
    assert run_identity(RunConfig.of("demo", n_questions=8)) != plain
    assert not {*OF_SOME, *OF_NONE} & set(plain["config"])


@pytest.fixture
def base(tmp_path):
    """A folder that may stand for a base model, as long as nobody loads it."""
    random_llama(tmp_path / "b", num_hidden_layers=1)
    return str(tmp_path / "b")


def test_every_such_setting_is_of_some_experiment(base):
    config = RunConfig.of("demo", base_model=base, **JUDGE)
    able = [one for one in EXPERIMENTS if one.skip(config) is None]
    owned = {name for one in able for name in own_identity(one, EXPERIMENTS, config)}
    assert set(OF_SOME) <= owned
    assert not set(OF_NONE) & owned


def test_who_is_held_to_what(base):
    config = RunConfig.of("demo", base_model=base, judge_settings='{"seed": 1}', **JUDGE)
    of = {one.name: own_identity(one, EXPERIMENTS, config) for one in EXPERIMENTS if one.skip(config) is None}
    held = {"base_model": base, "base_model/sha256": model_fingerprint(base)}
    assert of["base_transfer"] == of["base_cosines"] == held
    assert of["finetuning"]["finetune"] == "full"
    assert (of["judged"]["judge"], of["judged"]["judge_settings"]) == ("x", '{"seed": 1}')
    assert of["judged"]["judge_url"] == NOTES["host"]
    assert "sentiment/open_ended" in of["judged"]
    assert of["layer_sweep"] == of["vectors"] == of["multipliers"] == {}
    assert base_to_chat.VECTORS.own(config) == held
    assert finetuning.EXPERIMENT.own(config)["finetune"] == "full"


def edit(folder):
    """One weight of a model on disk, in a file of the same size."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_run_is_held_to_its_models_contents_and_not_to_a_name(base, folder):
    config = RunConfig.of(base)
    folder = RunFolder(folder.path.with_name("held"))
    assert not folder.claim(run_identity(config), {})
    assert folder.claim(run_identity(config), {})
    edit(base)
    with pytest.raises(OtherRunError, match=r"\n  model\.sha256: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now\n"):
        folder.claim(run_identity(config), {})
    with pytest.raises(OtherRunError, match=r"have changed since the run began: .*put them back, or begin another run"):
        Context(config, folder).load(base)  # also while it goes on


def test_a_run_from_before_contents_were_recorded_is_refused(base, folder):
    config = RunConfig.of(base)
    folder = RunFolder(folder.path.with_name("old"))
    old = {kind: about for kind, about in run_identity(config).items() if kind != "model"}
    folder.claim(old, {})
    with pytest.raises(OtherRunError, match=r"model\.sha256: not recorded there, '[0-9a-f]{64}' now"):
        folder.claim(run_identity(config), {})


def test_another_base_model_under_the_same_name_is_refused(base, folder):
    config = RunConfig.of("demo", base_model=base)
    hold([base_to_chat.VECTORS], config, folder)
    unit = Unit.of(behavior="sentiment")
    folder.save("base_vectors", unit, pd.DataFrame({"x": [1]}))
    edit(base)
    with pytest.raises(OtherRunError, match=r"base_vectors\.base_model/sha256: '\w{64}' there, '\w{64}' now"):
        hold([base_to_chat.VECTORS], config, folder)


def test_a_base_model_that_cannot_be_had_is_told_with_what_to_do():
    with pytest.raises(FileNotFoundError, match=r"the base model: there is no model 'b' here.*or do without: --base-m"):
        base_to_chat.VECTORS.own(RunConfig.of("demo", base_model="b"))


def test_held_out_pairs_that_vectors_are_extracted_from_are_told(monkeypatch):
    pairs = ContrastSet.from_pairs([(f"Is {n} good?", "Yes, very.", "No, not at all.") for n in range(8)])
    monkeypatch.setattr("caa_lens.paper.questions.load_paper_set", lambda name: (pairs[:6], pairs[4:], ["Why?"]))
    config = RunConfig.of("demo", data="paper", behaviors=("refusal",), n_generate=6, n_test=4, layer=3, seed=123)
    with pytest.warns(TrainingPairsWarning, match="refusal: 2 of the 4 held-out pairs are among those"):
        behavior_sets(config, "refusal")
    behavior_sets.cache_clear()


def test_another_validation_pair_is_another_run(monkeypatch):
    config = RunConfig.of("demo", behaviors=("sentiment",))
    monkeypatch.setattr("caa_lens.models.loading.fingerprint.model_fingerprint", lambda name: "")
    before, sets = run_identity(config), behavior_sets(config, "sentiment")
    changed = replace(sets.validation[0], positive="Quite another answer.")
    other = replace(sets.validation, pairs=(changed, *sets.validation.pairs[1:]))
    monkeypatch.setattr("experiments.running.identity.behavior_sets", lambda *_: replace(sets, validation=other))
    assert run_identity(config)["data"] != before["data"]


def test_vectors_of_another_run_in_the_place_of_ours_are_refused(folder):
    mine, other = (SteeringVectors.from_vectors([SteeringVector(direction=torch.ones(4) * n, layer=0)]) for n in (1, 2))
    file = mine.save(folder.vectors_file("sentiment"))
    frame = pd.DataFrame({"layer": [0]})
    frame.attrs[FILE_HASH] = file_digest(file)
    folder.save("vectors", Unit.of(behavior="sentiment"), frame)
    context = Context(RunConfig.of("demo"), folder)
    assert context.raw_vectors("sentiment")[0].norm == 2
    other.save(folder.vectors_file("sentiment"))
    with pytest.raises(OtherRunError, match=r"is not what vectors has written: .*delete .*sentiment\.parquet to have"):
        context.raw_vectors("sentiment")


def test_other_open_ended_prompts_are_other_data(monkeypatch):
    config = RunConfig.of("demo", behaviors=("sentiment",))
    before = open_ended.EXPERIMENT.own(config)
    behavior_sets.cache_clear()
    monkeypatch.setattr("caa_lens.contrast.sets.load_open_ended", lambda behavior: ["Another?", "And one more?"])
    after = open_ended.EXPERIMENT.own(config)
    behavior_sets.cache_clear()
    assert set(before) == set(after) == {"sentiment/open_ended"}
    assert before != after


def test_other_questions_of_mmlu_are_refused(monkeypatch, folder):
    def fetched(*answers):
        pairs = ContrastSet.from_pairs([("1 + 1?\n\nChoices:\n (A) 2\n (B) 3", *answers)], name="mmlu")
        monkeypatch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: (pairs, ("sums",)))

    config = RunConfig.of("demo", behaviors=("sentiment", "sycophancy"))
    for experiment, name in ((knowledge.MMLU, "mmlu"), (knowledge.TRUTHFUL_QA, "truthful_qa")):
        fetched("(A)", "(B)")
        hold([experiment], config, folder)
        folder.save(name, experiment.units(config)[0], pd.DataFrame({"x": [1]}))
        hold([experiment], config, folder)
        fetched("(B)", "(A)")
        with pytest.raises(OtherRunError, match=rf"{name}\.\w+/questions: "):
            hold([experiment], config, folder)


def test_rubrics_are_part_of_what_was_judged(monkeypatch):
    from caa_lens.measures.open_ended.rubrics import RUBRICS, Rubric

    config = RunConfig.of("demo", behaviors=("sentiment",), **JUDGE)
    before = judged.EXPERIMENT.own(config)
    monkeypatch.setitem(RUBRICS, "sentiment", Rubric(behavior="sentiment", text="0: sad. 10: glad."))
    assert judged.EXPERIMENT.own(config) != before
    monkeypatch.undo()
    monkeypatch.setitem(RUBRICS, "refusal", Rubric(behavior="refusal", text="0: no. 10: yes."))
    assert judged.EXPERIMENT.own(config) == before  # not of this run


def test_every_start_is_noted(folder):
    for config in (cheap.CONFIG, with_judge("a")):
        folder.record_start(start_notes(config, ["numbers"]))
    first, second = json.loads((folder.path / "starts.json").read_text())
    assert first["settings"]["judge"] is None
    assert second["settings"]["judge"] == "a"
    for start in (first, second):
        assert {"torch", "caa-lens", "python"} <= set(start["versions"])
        assert {"commit", "began"} <= set(start)
        assert start["experiments"] == ["numbers"]


def test_a_start_notes_its_device_and_its_command_without_passwords():
    command = "python -m experiments judged --judge-url 'https://me:secret@judge.example:8080/v1?key=1' --judge x"
    notes = start_notes(cheap.CONFIG, [], device="cpu", command=command)
    assert notes["device"] == f"cpu ({platform.machine()})"
    assert notes["command"] == "python -m experiments judged --judge-url 'https://judge.example:8080/v1' --judge x"


def test_no_password_is_written_into_a_run():
    config = RunConfig.of("demo", behaviors=("sentiment",), **JUDGE)
    written = json.dumps(
        [start_notes(config, []), own_identity(judged.EXPERIMENT, EXPERIMENTS, config), run_identity(config)]
    )
    assert NOTES["host"] in written
    assert "secret" not in written
    assert "key=1" not in written
