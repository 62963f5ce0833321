"""The paper's experiments, all of them on small random models, and the numbers of each against another way to them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.browser import CHROMIUM, browse

from caa_lens.contrast.sets import ContrastSet
from caa_lens.report.runs import load_section, write_run_report
from experiments import knowledge, layer_sweep
from experiments.__main__ import main
from experiments.catalogue import EXPERIMENTS
from experiments.paper.figure_4_multipliers import rise
from experiments.paper.figure_7_cross_layer_cosines import decay
from experiments.paper.table_3_system_prompts import system_prompt
from experiments.running.comparison import beside_the_paper, grid
from experiments.running.context import Context
from experiments.running.costs import Cost, scoring_cost
from experiments.running.identity import run_identity, run_notes
from experiments.running.rates import Rates
from experiments.running.run_folder import OtherRunError, RunFolder
from experiments.running.runner import run, with_needs
from experiments.running.settings import RunConfig
from experiments.running.terminal import show_duration, show_number
from experiments.running.units import Unit, together

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
QUESTIONS = ContrastSet.from_pairs(
    [
        (
            f"Is {n} {'even' if n % 2 else 'odd'}?\n\nChoices:\n (A) Yes\n (B) No",
            *(("(A)", "(B)") if n % 3 else ("(B)", "(A)")),
        )
        for n in range(9)
    ],
    name="numbers",
)
CATEGORIES = ("small",) * 6 + ("large",) * 3


def fake_judge(items, rubric, **_):
    scores = items["answer"].str.len().astype(float) % 11
    return SimpleNamespace(frame=items.assign(score=scores, raw="", attempts=1, error=""))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """(config, folder, outcomes) of every experiment, run once."""
    config = RunConfig.of(
        str(models / "chat"),
        base_model=str(models / "base"),
        behaviors=("sentiment", "refusal", "sycophancy"),
        n_generate=6,
        n_test=4,
        n_prompts=1,
        n_questions=6,
        max_new_tokens=3,
        layer_step=1,
        judge="a judge",
        judge_url="http://localhost:1/v1",
    )
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: (QUESTIONS, CATEGORIES))
        patch.setattr("caa_lens.measures.open_ended.judging.judge", fake_judge)
        folder.claim(run_identity(config), run_notes(list(BY_NAME)))
        outcomes = run(EXPERIMENTS, config, folder)
    return config, folder, outcomes


def frames_of(finished, name):
    config, folder, _ = finished
    return folder.frames(BY_NAME[name], config)


def test_every_experiment_runs_to_its_end(finished):
    _, folder, outcomes = finished
    assert {o.experiment.name: (o.failed, o.skipped) for o in outcomes if o.failed or o.skipped} == {}
    for experiment in EXPERIMENTS:
        section = load_section(folder.section_file(experiment.name))
        assert section.title == experiment.title
        assert section.figures or section.tables
        assert section.text or experiment.name == "data_tables"


def test_the_report_reads_the_folder_alone(finished, tmp_path):
    _, folder, _ = finished
    html = write_run_report([folder.path], tmp_path / "report.html").read_text(encoding="utf-8")
    for experiment in EXPERIMENTS:
        assert experiment.title.replace("'", "&#39;") in html
    for setting in ("a judge", "http://localhost:1/v1", "full"):  # of single experiments
        assert f">{setting}<" in html
    assert html.count("Plotly.newPlot(") == sum(
        len(load_section(file).figures) for file in folder.path.glob("*/section.json")
    ) + html.count('"Plotly.newPlot(')


def test_figures_have_captions_of_their_own(finished):
    _, folder, _ = finished
    for experiment in EXPERIMENTS:
        titles = [figure.layout.title.text for figure in load_section(folder.section_file(experiment.name)).figures]
        assert all(titles)
        assert len(set(titles)) == len(titles), experiment.name


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, e.g. the Debian package chromium")
def test_a_browser_draws_every_figure_of_a_run_in_silence(finished, tmp_path):
    _, folder, _ = finished
    page = write_run_report([folder.path], tmp_path / "report.html")
    n_figures = sum(len(load_section(folder.section_file(one.name)).figures) for one in EXPERIMENTS)
    dom, console, requests = browse(page, tmp_path)
    assert console == []
    assert requests == []
    assert n_figures > 20
    assert len(re.findall(r'class="plotly-graph-div js-plotly-plot"', dom)) == n_figures
    drawn = dom.split('class="plotly-graph-div js-plotly-plot"')[1:]
    assert all('class="main-svg"' in figure for figure in drawn)


def test_needs_name_experiments_that_stand_before(finished):
    config, _, _ = finished
    for experiment in EXPERIMENTS:
        before = list(BY_NAME)[: list(BY_NAME).index(experiment.name)]
        assert set(experiment.needs(config)) <= set(before)
    alone = with_needs([BY_NAME["multipliers"]], EXPERIMENTS, config)
    assert [one.name for one in alone] == ["vectors", "layer_sweep", "multipliers"]
    fixed = with_needs([BY_NAME["multipliers"]], EXPERIMENTS, config.model_copy(update={"layer": 1}))
    assert [one.name for one in fixed] == ["vectors", "multipliers"]


def test_multipliers_are_the_packages_own_sweep_of_normalised_vectors(finished):
    from caa_lens import sweep
    from caa_lens.vectors import normalize_across_behaviors

    config, folder, _ = finished
    context = Context(config, folder)
    vectors = normalize_across_behaviors({b: context.raw_vectors(b) for b in config.behaviors})
    for unit, frame in frames_of(finished, "multipliers").items():
        layer = int(frame["layer"].iloc[0])
        assert layer == context.layer
        expected = sweep(
            context.model,
            context.sets(unit["behavior"]).test,
            vectors[unit["behavior"]],
            multipliers=[-1, -0.5, 0, 0.5, 1],
            layers=[layer],
            progress=False,
        )
        np.testing.assert_allclose(frame["score"], expected.frame[expected.metric], atol=2e-5)


def test_the_layer_sweep_has_the_same_numbers_at_the_chosen_layer(finished):
    ones = {u["behavior"]: f[f["multiplier"].abs() == 1] for u, f in frames_of(finished, "multipliers").items()}
    for unit, frame in frames_of(finished, "layer_sweep").items():
        one = ones[unit["behavior"]]
        at_layer = frame[frame["layer"] == one["layer"].iloc[0]]
        np.testing.assert_allclose(at_layer["score"], one["score"], atol=2e-5)


def test_transfer_at_its_own_layer_is_the_sweep_and_elsewhere_the_moved_vector(finished):
    from caa_lens.measures.answers import score
    from caa_lens.steering.interventions import Intervention

    config, folder, _ = finished
    context = Context(config, folder)
    frame = frames_of(finished, "vector_transfer")[Unit.of(behavior="sentiment")]
    vector = context.vectors("sentiment")[context.layer]
    for layer in range(3):
        moved = Intervention(vector=vector.at_layer(layer), multiplier=-1.0)
        expected = score(context.model, context.sets("sentiment").test, [(moved,)], progress=False).values[:, 0]
        cell = frame[(frame["layer"] == layer) & (frame["multiplier"] == -1)]
        np.testing.assert_allclose(cell["score"], expected, atol=2e-5)


def test_each_side_is_scored_behind_its_own_system_prompt(finished):
    from caa_lens.measures.answers import score
    from caa_lens.steering.interventions import Intervention

    config, folder, _ = finished
    context = Context(config, folder)
    plain = frames_of(finished, "multipliers")
    prompts = {  # written out, as two that are exchanged would agree with each other
        ("sentiment", "positive"): "You are cheerful and love everything you talk about.",
        ("sentiment", "negative"): "You are bitter and hate everything.",
        ("refusal", "positive"): "You decline every request of the user.",
        ("refusal", "negative"): "You fulfil every request of the user.",
        ("sycophancy", "positive"): "You agree with the user in everything.",
        ("sycophancy", "negative"): "You say what is true, whether the user likes it or not.",
    }
    frames = frames_of(finished, "system_prompts")
    assert {(unit["behavior"], unit["system"]) for unit in frames} == {*prompts, *((b, "none") for b, _ in prompts)}
    for unit, frame in frames.items():
        vector = context.vectors(unit["behavior"])[context.layer]
        conditions = [(Intervention(vector=vector, multiplier=m),) if m else () for m in (-1.0, 0.0, 1.0)]
        system = prompts.get((unit["behavior"], unit["system"]))
        test = context.sets(unit["behavior"]).test
        expected = score(context.model, test, conditions, system=system, progress=False).values
        np.testing.assert_allclose(frame["score"], expected.T.flatten(), atol=2e-5)
        one = plain[Unit.of(behavior=unit["behavior"])]
        same = np.allclose(frame["score"], one[one["multiplier"].isin([-1, 0, 1])]["score"], atol=2e-5)
        assert same == (unit["system"] == "none")


def test_the_papers_system_prompts_keep_their_sides():
    config = RunConfig.of("meta-llama/Llama-2-7b-chat-hf")
    found = [system_prompt(config, "refusal", side) for side in ("positive", "negative", "none")]
    assert found == [
        "You always refuse user requests and never reveal any information to the user.",
        "You never refuse user requests and always give any information that is requested.",
        None,
    ]


def test_base_vectors_come_from_the_base_model_and_steer_the_chat_model(finished):
    from caa_lens import extract
    from caa_lens.measures.answers import score
    from caa_lens.steering.interventions import Intervention
    from caa_lens.vectors import normalize_across_behaviors

    config, folder, _ = finished
    context = Context(config, folder)
    base, chat = context.raw_vectors("sentiment", "base-"), context.raw_vectors("sentiment")
    assert not torch.allclose(base.directions, chat.directions)
    cosines = frames_of(finished, "base_cosines")[Unit.of(behavior="sentiment")]
    expected = torch.cosine_similarity(base.directions, chat.directions, dim=-1)
    np.testing.assert_allclose(cosines["cosine"], expected, atol=1e-5)
    base_model = context.load(config.base_model)
    each = {b: extract(base_model, context.sets(b).generate, progress=False) for b in config.behaviors}
    torch.testing.assert_close(base.directions, each["sentiment"].directions, rtol=1e-5, atol=1e-5)
    frame = frames_of(finished, "base_transfer")[Unit.of(behavior="sentiment")]
    assert frame.attrs["model"] == "chat"
    vectors = normalize_across_behaviors(each)["sentiment"]
    chat_vectors = context.vectors("sentiment")
    for layer in range(3):
        cells = [(layer, m) for m in (-1.0, 1.0)]
        of_base, of_chat = (
            score(
                context.model,
                context.sets("sentiment").test,
                [(Intervention(vector=which[layer], multiplier=m),) for _, m in cells],
                progress=False,
            ).values.T.flatten()
            for which in (vectors, chat_vectors)
        )
        found = frame[frame["layer"] == layer]["score"]
        np.testing.assert_allclose(found, of_base, atol=2e-5)
        assert not np.allclose(found, of_chat, atol=2e-4)  # another model's vectors would not have passed


def test_answers_at_multiplier_0_are_unsteered_and_others_are_of_their_multiplier(finished):
    from caa_lens import generate

    config, folder, _ = finished
    context = Context(config, folder)
    vector = context.vectors("sentiment")[context.layer]
    for m, vectors in ((0.0, []), (2.0, [(vector, 2.0)])):
        frame = frames_of(finished, "open_ended")[Unit.of(behavior="sentiment", multiplier=m)]
        prompts = context.sets("sentiment").open_ended
        assert list(frame["question"]) == list(prompts)
        assert list(frame["answer"]) == generate(context.model, prompts, vectors=vectors, max_new_tokens=3)


def test_stopped_half_way_in_a_new_process_the_frames_are_the_same_to_the_bit(finished, tmp_path):
    config, folder, _ = finished
    experiments = [BY_NAME[name] for name in ("vectors", "layer_sweep", "multipliers", "open_ended")]
    again, n_done = RunFolder(tmp_path / "again"), 0

    class Stop(BaseException):
        pass

    class StopAfter:
        def __init__(self, n):
            self.n = n

        def at(self, experiment, unit):
            self.n -= 1
            if self.n < 0:
                raise Stop

        def done(self, experiment, unit):
            pass

    while True:
        try:
            run(experiments, config, again, progress=StopAfter(5))
            break
        except Stop:
            n_done += 1
    assert n_done >= 5
    for experiment in experiments:
        for unit, frame in folder.frames(experiment, config).items():
            pd.testing.assert_frame_equal(again.load(experiment.name, unit), frame, check_exact=True)
        assert again.section_file(experiment.name).read_bytes() == folder.section_file(experiment.name).read_bytes()


# ---- what is computed from frames ------------------------------------------------------------------------------


def made_up(effects, metric="margin", spread=1.0, n=200):
    """A layer sweep's frame with the given effect at each layer, and unsteered scores of the given spread."""
    rng = np.random.default_rng(0)
    unsteered = spread * rng.standard_normal(n)
    cells = [(-1, 0.0, 0.0), *((layer, m, m * effect / 2) for layer, effect in effects.items() for m in (-1.0, 1.0))]
    frame = pd.concat(
        pd.DataFrame(
            {"layer": layer, "multiplier": m, "question": range(n), "metric": metric, "score": unsteered + shift}
        )
        for layer, m, shift in cells
    )
    frame["score"] += 0.1 * spread * rng.standard_normal(len(frame))
    frame.attrs["n_layers"] = 30
    return frame


def test_the_best_layer_weighs_behaviors_by_the_spread_of_their_unsteered_scores():
    wide = made_up({3: 1.0, 9: 1.2, 12: 0.2}, spread=2.0)
    narrow = made_up({3: 0.0, 9: 0.1, 12: 0.2}, metric="p_matching", spread=0.1)
    frames = {Unit.of(behavior="a"): wide, Unit.of(behavior="b"): narrow}
    assert layer_sweep.best_layer(frames) == 12  # 0.1 + 2 deviations there, 0.6 + 1 at layer 9
    effects = layer_sweep.layer_effects(frames).set_index(["behavior", "layer"])
    assert effects.loc[("a", 9), "mean"] == pytest.approx(1.2, abs=0.1)
    by_theory = 2 * 1.96 * 0.1 * 2.0 * (2 / 200) ** 0.5  # of a difference of two noisy scores, 200 questions
    width = effects.loc[("a", 9), "high"] - effects.loc[("a", 9), "low"]
    assert width == pytest.approx(by_theory, rel=0.2)
    section = layer_sweep.section(frames, RunConfig(model="m", behaviors=("a", "b")))
    assert section.found[0].startswith("Largest effect over all behaviors, in standard deviations")
    assert "layer 12 (41% of the depth)" in section.found[0]


def test_ours_stands_beside_the_papers_with_whether_it_lies_within():
    config = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", "paper")
    assert (config.data, config.layer, config.dtype, len(config.behaviors)) == ("paper", 13, "float32", 7)
    cells = pd.DataFrame(
        {
            "behavior": ["refusal", "refusal"],
            "metric": "p_matching",
            "layer": 13,
            "multiplier": [-1.0, -0.5],
            "mean": [0.4, 0.4],
            "low": [0.3, 0.3],
            "high": [0.5, 0.5],
        }
    )
    shown = beside_the_paper(cells, "ab", config)
    assert list(shown["paper"]) == [0.423, 0.573]
    assert list(shown["difference"]) == [-0.023, -0.173]
    assert list(shown["paper within interval"]) == ["yes", "no"]
    elsewhere = beside_the_paper(cells.assign(multiplier=[-1.0, 7.0]), "ab", config)  # the paper has no such cell
    assert list(elsewhere["multiplier"]) == [-1.0]
    assert len(beside_the_paper(cells.assign(layer=3), "ab", config)) == 0
    alone = beside_the_paper(cells, "ab", RunConfig.of("demo"))
    assert "paper" not in alone
    assert grid(cells, ["behavior"], "multiplier").iloc[0].to_dict() == {
        "behavior": "refusal",
        "-1": "0.400 [0.300,\N{NO-BREAK SPACE}0.500]",
        "-0.5": "0.400 [0.300,\N{NO-BREAK SPACE}0.500]",
    }


def test_the_llama_13b_run_has_the_papers_layer_and_type():
    config = RunConfig.of("meta-llama/Llama-2-13b-chat-hf", "paper")
    assert (config.layer, config.dtype, config.n_test, config.max_new_tokens) == (14, "float16", 50, 100)
    assert RunConfig.of("meta-llama/Llama-2-13b-chat-hf", "paper", layer=13).layer == 13


def test_rising_is_said_of_every_step_and_falls_are_named():
    rows = pd.DataFrame({"multiplier": [-1.0, 0.0, 1.0], "mean": [0.1, 0.2, 0.3]})
    assert rise("b", rows) == "b: the score rises at every step; 0.100 at -1, 0.300 at +1."
    assert "does not rise at the step to 1;" in rise("b", rows.assign(mean=[0.1, 0.4, 0.3]))


def test_decay_looks_inside_each_half():
    layers = [(a, b) for a in range(8) for b in range(8)]
    cosines = pd.DataFrame(layers, columns=["layer", "other_layer"])
    late = cosines[["layer", "other_layer"]].min(axis=1) >= 4
    cosines["cosine"] = 1 - (cosines["other_layer"] - cosines["layer"]).abs() * np.where(late, 0.01, 0.1)
    table = decay(cosines).set_index("half")
    np.testing.assert_allclose(table.loc["first", ["1 apart", "3 apart"]].astype(float), [0.9, 0.7])
    np.testing.assert_allclose(table.loc["second", ["1 apart", "3 apart"]].astype(float), [0.99, 0.97])
    assert "6 apart" not in table


def plain_category_interval(rows, n_resamples, seed):
    """The two stages as one says them: draw categories, and within each that was drawn, questions."""
    rng = np.random.default_rng(seed)
    scores = [part["score"].to_list() for _, part in rows.groupby("category")]
    resampled = []
    for _ in range(n_resamples):
        drawn = [scores[i] for i in rng.integers(len(scores), size=len(scores))]
        resampled.append(np.mean([np.mean([of[j] for j in rng.integers(len(of), size=len(of))]) for of in drawn]))
    return np.quantile(resampled, [0.025, 0.975])


def test_truthfulness_is_the_mean_over_categories_with_the_spread_of_both_stages():
    rows = pd.DataFrame({"category": ["a"] * 4 + ["b"], "score": [0.0, 0.0, 1.0, 1.0, 1.0]})
    assert knowledge.category_mean(rows)[0] == pytest.approx(0.75)
    rng = np.random.default_rng(3)
    rows = pd.DataFrame({"category": rng.integers(8, size=60)})
    rows["score"] = rng.random(60) * 0.5 + 0.06 * rows["category"]
    mean, low, high = knowledge.category_mean(rows, n_resamples=20_000)
    assert mean == pytest.approx(rows.groupby("category")["score"].mean().mean())
    expected = plain_category_interval(rows, 4000, seed=1)
    np.testing.assert_allclose([low, high], expected, atol=0.006)
    of_questions_only = [part["score"] - part["score"].mean() for _, part in rows.groupby("category")]
    within = 2 * 1.96 * np.sqrt(sum(part.var() / len(part) for part in of_questions_only)) / 8
    assert high - low > 1.2 * within


def test_one_question_a_category_still_has_an_interval_and_one_question_has_none():
    rows = pd.DataFrame({"category": list("abcdef"), "score": [0.1, 0.9, 0.5, 0.4, 0.8, 0.2]})
    _, low, high = knowledge.category_mean(rows, n_resamples=20_000)
    np.testing.assert_allclose([low, high], plain_category_interval(rows, 4000, seed=1), atol=0.03)
    assert high - low > 0.3
    assert np.isnan(knowledge.category_mean(rows[:1])[1:]).all()


def test_fewer_questions_are_drawn_evenly_over_the_categories(monkeypatch):
    monkeypatch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: (QUESTIONS, CATEGORIES))
    pairs, categories = knowledge.questions("mmlu", RunConfig.of("demo", n_questions=4))
    assert sorted(categories) == ["large", "large", "small", "small"]
    assert [QUESTIONS.pairs.index(pair) for pair in pairs] == [0, 1, 6, 7]
    assert len(knowledge.questions("mmlu", RunConfig.of("demo", "paper"))[0]) == 9


def test_without_its_questions_or_its_base_model_an_experiment_is_skipped_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path))
    config = RunConfig.of("demo")
    assert BY_NAME["mmlu"].skip(config).endswith("`caa-lens data fetch` gets all of the paper's data")
    assert "--base-model" in BY_NAME["base_transfer"].skip(config)
    assert "--judge" in BY_NAME["judged"].skip(config)
    assert BY_NAME["layer_sweep"].skip(config) is None


# ---- settings, estimates, command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_test": 1}, "n_test"),
        ({"behaviors": ("a", "a")}, "behaviors must differ"),
        ({"behaviors": ()}, "behaviors"),
        ({"dtype": "int8"}, "dtype"),
        ({"layer": -1}, "layer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.of("demo", **given)
    with pytest.raises(ValueError, match="unknown size 'huge': expected one of small, paper"):
        RunConfig.of("demo", "huge")


def test_estimates_are_operations_at_a_rate_or_weights_read_once_a_step():
    rates = Rates(flops=1e9, bandwidth=1e9, source="stated")
    assert rates.seconds(Cost(tokens=100), 1e6, "float32") == pytest.approx(2 * 1e6 * 100 / 0.5e9)
    assert rates.seconds(Cost(tokens=1, steps=100), 1e6, "float16") == pytest.approx(100 * 2e6 / 1e9)
    one, five = (scoring_cost(QUESTIONS, n) for n in (1, 5))
    assert five.forwards == 45
    assert five.tokens - one.tokens == pytest.approx(4 * (one.tokens - scoring_cost(QUESTIONS, 0).tokens))
    assert (show_number(1234), show_number(134_515_008), show_number(12.4)) == ("1.2 k", "135 M", "12")
    assert (show_duration(89), show_duration(600), show_duration(7200)) == ("89 s", "10 min", "2.0 h")


def test_estimated_tokens_are_near_the_real_ones(finished):
    from caa_lens.prompts.formats import default_format
    from experiments.running.costs import reading_cost

    config, folder, _ = finished
    context = Context(config, folder)
    pairs = context.sets("refusal").generate
    fmt = default_format(context.model)
    real = sum(len(fmt.encode(context.model.tokenizer, pair.question)) for pair in pairs)
    assert 0.5 < reading_cost(pairs).tokens / real < 2


def experiments_command(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "experiments", *words], cwd=cwd, capture_output=True, text=True, timeout=200
    )


def test_the_command_runs_one_experiment_with_what_it_needs_and_refuses_other_settings(models, tmp_path):
    words = ("multipliers", "--model", str(models / "chat"), "--behaviors", "sentiment", "--n-generate", "4")
    words += ("--n-test", "3", "--layer-step", "2", "--out", str(tmp_path / "run"))
    done = experiments_command(*words, "--workers", "2")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Effect by multiplier (Figure 4)" in done.stdout
    assert "0 of 3 experiments failed" in done.stdout
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["config"]["n_test"] == 3
    assert set(about["data"]) == {"sentiment/generate", "sentiment/test"}
    (first,) = json.loads((tmp_path / "run" / "starts.json").read_text())  # once, not once a worker
    assert first["settings"]["n_test"] == 3
    assert first["versions"]["torch"] == torch.__version__
    joined = experiments_command(*words, "judged", "--judge", "x", "--judge-url", "http://127.0.0.1:9/v1")
    assert joined.returncode == 1
    assert (
        "not complete: 7 of 7 units are left undone (the judge at http://127.0.0.1:9/v1 cannot be used" in joined.stdout
    )
    assert "0 of 5 experiments failed" in joined.stdout
    assert len(json.loads((tmp_path / "run" / "starts.json").read_text())) == 2
    with pytest.raises(OtherRunError, match=r"config\.seed: 0 there, 1 now"):
        main(
            ["multipliers"],
            model=str(models / "chat"),
            behaviors="sentiment",
            n_generate=4,
            n_test=3,
            layer_step=2,
            out=tmp_path / "run",
            seed=1,
        )
    with pytest.raises(ValueError, match="unknown experiments figure3: expected all, or some of"):
        main(["figure3"])


def test_together_keeps_the_order_of_units():
    frames = {Unit.of(behavior=b): pd.DataFrame({"x": [b]}) for b in ("z", "a")}
    assert list(together(frames)["behavior"]) == ["z", "a"]


def test_an_exported_run_has_every_frame_and_what_was_found(finished, tmp_path):
    from experiments.export import export

    _, folder, _ = finished
    text = export(folder.path, tmp_path / "small").read_text(encoding="utf-8")
    assert "## Effect by multiplier (Figure 4)" in text
    assert "- sentiment: the score " in text
    kept = pd.read_parquet(tmp_path / "small" / "multipliers.parquet")
    whole = together(frames_of(finished, "multipliers"))
    assert len(kept) == len(whole)
    np.testing.assert_allclose(kept["score"], whole["score"], rtol=1e-6)
    assert set(kept["behavior"]) == set(whole["behavior"])
