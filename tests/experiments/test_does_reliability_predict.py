"""Rank correlations beside scipy's, planted verdicts that foretell and that do not, and a cheap run."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from caa_lens.engine.pair_reading import pair_activations
from caa_lens.measures.agreement.reliabilities import reliability
from caa_lens.measures.sweeps import sweep
from caa_lens.models.loading.load import load_model
from caa_lens.vectors.extraction import extract
from experiments.own import does_reliability_predict as predict
from experiments.running import many_behaviors
from experiments.running.costs import reading_cost, scoring_cost
from experiments.running.many_behaviors import COMPLETIONS, LETTERS, parts
from experiments.running.rank_correlations import rank_correlations, spearman
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

QUICK = {"n_draws": 400}


# ---- correlations ---------------------------------------------------------------------------------------------


def rows_of(n=30, *, strength=1.0, forms=(COMPLETIONS,), seed=0):
    """Behaviors with a number that foretells, one that does not, and one with many ties."""
    rng = np.random.default_rng(seed)
    rows = []
    for behavior in range(n):
        shared = rng.standard_normal()
        for form in forms:
            number = shared + 0.3 * rng.standard_normal()
            effect = strength * number + rng.standard_normal()
            rows.append((f"b{behavior}", form, number, rng.standard_normal(), np.round(number), effect))
    return pd.DataFrame(rows, columns=["behavior", "form", "good", "nothing", "ties", "effect"])


def test_the_correlation_is_scipys_with_ties_too():
    rows = rows_of()
    found = rank_correlations(rows, ["good", "nothing", "ties"], "effect", **QUICK).set_index("number")
    for name in found.index:
        expected = scipy.stats.spearmanr(rows[name], rows["effect"]).statistic
        assert found.loc[name, "rho"] == pytest.approx(expected, abs=1e-12)
        assert spearman(rows[name].to_numpy(), rows["effect"].to_numpy()) == pytest.approx(expected, abs=1e-12)


def test_interval_and_p_are_scipys_where_every_behavior_has_one_row():
    rows = rows_of(25, strength=0.5, seed=3)
    x, y = rows["good"].to_numpy(), rows["effect"].to_numpy()
    found = rank_correlations(rows, ["good"], "effect", n_draws=4000).iloc[0]
    theirs = scipy.stats.bootstrap(
        (x, y),
        spearman,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    np.testing.assert_allclose([found["low"], found["high"]], [theirs.low, theirs.high], atol=0.03)
    p = scipy.stats.permutation_test(
        (x,),
        lambda x: spearman(x, y),
        permutation_type="pairings",
        vectorized=False,
        n_resamples=4000,
        rng=np.random.default_rng(2),
    ).pvalue
    assert 0.001 < p < 0.5
    assert found["p"] == pytest.approx(p, abs=0.015)


def test_two_rows_of_a_behavior_are_no_more_than_one_where_they_say_the_same():
    once = rows_of(20, strength=0.5)
    twice = pd.concat([once, once.assign(form=LETTERS)], ignore_index=True)
    one, two = (rank_correlations(rows, ["good"], "effect", n_draws=3000).iloc[0] for rows in (once, twice))
    assert (two["n"], two["behaviors"], one["behaviors"]) == (40, 20, 20)
    assert two["rho"] == pytest.approx(one["rho"], abs=1e-12)
    assert two["p"] == pytest.approx(one["p"], abs=0.015)
    np.testing.assert_allclose([two["low"], two["high"]], [one["low"], one["high"]], atol=0.04)


def test_a_difference_between_the_forms_alone_is_not_taken_for_prediction():
    """Completions have larger numbers and larger effects, but within a form the number says nothing."""
    ps = []
    for seed in range(40):
        rows = rows_of(16, strength=0.0, forms=(COMPLETIONS, LETTERS), seed=seed)
        rows[["nothing", "effect"]] += np.where(rows["form"] == COMPLETIONS, 5, 0)[:, None]
        ps.append(rank_correlations(rows, ["nothing"], "effect", n_draws=200, seed=seed)["p"][0])
    assert np.mean(np.array(ps) < 0.05) <= 0.15


def test_of_nothing_one_p_in_twenty_is_small():
    rng = np.random.default_rng(0)
    ps = [
        rank_correlations(rows_of(20, seed=int(s)), ["nothing"], "effect", n_draws=200)["p"][0]
        for s in rng.integers(10**6, size=60)
    ]
    assert np.mean(np.array(ps) < 0.05) <= 0.13


def test_a_number_that_does_not_vary_has_no_correlation_and_missing_rows_are_left_out():
    rows = rows_of(12).assign(same=1.0)
    found = rank_correlations(rows, ["same", "good"], "effect", **QUICK).set_index("number")
    assert found.loc["same", ["rho", "low", "high", "p"]].isna().all()
    rows.loc[3, "effect"] = np.nan
    less = rank_correlations(rows, ["good"], "effect", **QUICK).iloc[0]
    assert (less["n"], less["rho"]) == (11, spearman(*rows.drop(index=3)[["good", "effect"]].to_numpy().T))
    assert np.isnan(rank_correlations(rows[:2], ["good"], "effect", **QUICK)["rho"][0])


# ---- what is said of planted frames -----------------------------------------------------------------------------


def frame_of(behavior, form, *, split_half, effect, verdict, norm=1.0, best=2, spread=2.0):
    """A unit's frame: layers 1 to 3, middle 2; at the middle the effect is as given, at `best` a half more."""
    questions = np.arange(6)
    noise = np.array([1.0, -1, 0.5, -0.5, 2, -2])
    unsteered = spread * noise / noise.std(ddof=1)
    rows = []

    def add(part, kind, layer, multiplier, scores):
        rows.extend(
            {"part": part, "kind": kind, "layer": layer, "multiplier": multiplier, "question": int(q), "score": score}
            for q, score in zip(questions, scores, strict=True)
        )

    for part in ("validation", "test"):
        add(part, "unsteered", predict.UNSTEERED, 0.0, unsteered)
        for layer in (1, 2, 3):
            size = {2: effect}.get(layer, 0.0) + (0.5 if layer == best else 0) * (part == "validation") * 99
            size = size if part == "validation" else effect * (1.5 if layer != 2 else 1)
            for sign in (-1.0, 1.0):
                add(part, "vector", layer, sign, unsteered + sign * spread * (size + 0.1 * noise) / 2)
    for kind, size in (("same norm", effect / 2), ("random", -0.25)):
        for sign in (-1.0, 1.0):
            add("test", kind, 2, sign, unsteered + sign * spread * size / 2)
    said = pd.DataFrame(
        {
            "layer": (1, 2, 3),
            "verdict": ["weak", verdict, "weak"],
            "split_half": [0.1, split_half, 0.2],
            "low": split_half - 0.1,
            "high": split_half + 0.1,
            "agreement": split_half / 2,
            "against": 1 - split_half,
            "p": 1 - split_half,
            "d_prime": split_half,
            "shared": split_half,
            "cone": 90 * (1 - split_half),
            "letter": 0.0,
            "norm": norm,
            "norm_of_stream": norm / 9,
        }
    )
    frame = pd.DataFrame(rows).merge(said, on="layer", how="left")
    return frame.assign(behavior=behavior, form=form, place="written", middle=2, metric="margin")


def planted_frames(foretells, n=12, seed=0):
    rng = np.random.default_rng(seed)
    frames = {}
    for number in range(n):
        split_half = number / n
        effect = split_half if foretells else rng.uniform()
        verdict = predict.VERDICTS[min(2, 3 * number // n)]
        for form in (COMPLETIONS, LETTERS)[: 1 + number % 2]:
            unit = Unit.of(behavior=f"b{number}", form=form)
            frames[unit] = frame_of(
                f"b{number}", form, split_half=split_half, effect=effect, verdict=verdict, norm=rng.uniform(1, 2)
            )
    return frames


def test_a_behaviors_row_has_the_effects_that_were_planted():
    frame = frame_of("b", COMPLETIONS, split_half=0.5, effect=0.8, verdict="consistent", best=3)
    (row,) = predict.behaviors_of({Unit.of(behavior="b", form=COMPLETIONS): frame}).to_dict("records")
    noise = 0.1 * np.array([1.0, -1, 0.5, -0.5, 2, -2])
    assert row["effect"] == pytest.approx(0.8)
    assert row["raw"] == pytest.approx(1.6)  # the unsteered scores' standard deviation is 2
    assert row["layer_chosen"] == 3  # by validation; at test questions layer 1 does as much
    assert row["effect_chosen"] == pytest.approx(1.2)
    assert (row["split_half"], row["split_half_chosen"]) == (0.5, 0.2)
    assert (row["verdict"], row["verdict_rank"], row["verdict_rank_chosen"]) == ("consistent", 2, 1)
    assert row["effect_same_norm"] == pytest.approx(0.4)
    assert row["effect_random"] == pytest.approx(0.25)
    assert (row["right_way"], row["n_test"]) == (1.0, 6)
    expected = scipy.stats.bootstrap((0.8 + noise,), np.mean, method="percentile", n_resamples=9000).confidence_interval
    np.testing.assert_allclose([row["effect_low"], row["effect_high"]], expected, atol=0.01)


def test_the_layer_is_chosen_by_validation_questions_alone():
    frame = frame_of("b", COMPLETIONS, split_half=0.5, effect=0.8, verdict="weak", best=1)
    worse = frame.copy()
    worse.loc[(worse["part"] == "test") & (worse["layer"] == 1), "score"] *= -1
    for one in (frame, worse):
        assert predict.behaviors_of({Unit.of(behavior="b", form=COMPLETIONS): one})["layer_chosen"].tolist() == [1]


def test_a_verdict_that_foretells_is_said_to():
    frames = planted_frames(foretells=True)
    table = predict.correlations(predict.behaviors_of(frames), **QUICK)
    found = table[table["of"] == "effect"].set_index(["group", "number"])
    assert (found["rho"].drop(index=["norm", "norm_of_stream"], level="number") > 0.9).all()
    for number in ("split_half", "against", "p", "cone"):  # also those of which less is better
        assert found.loc[("all", number), "rho"] == pytest.approx(1)
        assert found.loc[("all", number), "p"] < 0.01
    assert abs(found.loc[("all", "norm"), "rho"]) < 0.7
    said = predict.section(frames, RunConfig.of("demo")).found
    assert said[0].startswith("12 behaviors (12 written) in 18 rows, 6 of them A/B; middle layer 2. No evaluations")
    assert said[1].startswith(
        "Rank correlation of split-half cosine with the effect at the middle layer: all +1.00 [+1.00, +1.00], p < 0.001"
    )
    assert "consistent: 6 rows, median effect" in said[-3]


def test_a_verdict_that_does_not_foretell_is_not_said_to():
    smallest = []
    for seed in range(6):
        table = predict.correlations(predict.behaviors_of(planted_frames(False, n=20, seed=seed)), n_draws=200)
        row = table[(table["of"] == "effect") & (table["number"] == "split_half") & (table["group"] == "all")].iloc[0]
        assert abs(row["rho"]) < 0.75
        smallest.append(row["low"] <= 0 <= row["high"])
    assert np.mean(smallest) >= 0.6


def test_the_section_shows_every_behavior_and_every_correlation():
    section = predict.section(planted_frames(True), RunConfig.of("demo"))
    tables = dict(section.captioned_tables())
    every = tables["Every behavior, the largest effect at the middle layer first"]
    assert len(every) == 18
    assert every["effect"].str.split(" ").str[0].astype(float).is_monotonic_decreasing
    correlations = tables["Rank correlation with the effect at the middle layer"]
    assert list(correlations["number"]) == [predict.NAMES[name] for name in (*predict.NUMBERS, *predict.CONTROLS)]
    assert list(correlations.columns) == ["number", "all", "all: p", "completions", "completions: p", "A/B", "A/B: p"]
    middle, chosen = section.figures
    assert sum(len(trace.x) for trace in middle.data) == 18
    assert "middle layer" in middle.layout.title.text
    assert {trace.name for trace in middle.data} >= {"consistent, completions", "consistent, A/B"}
    assert chosen.layout.title.text != middle.layout.title.text


def test_an_effect_far_beyond_the_others_is_named_at_the_edge_of_the_figure():
    frames = planted_frames(True)
    far = Unit.of(behavior="far", form=COMPLETIONS)
    frames[far] = frame_of("far", COMPLETIONS, split_half=0.99, effect=40.0, verdict="consistent")
    middle, _ = predict.section(frames, RunConfig.of("demo")).figures
    assert sum(len(trace.x) for trace in middle.data) == 18
    (annotation,) = middle.layout.annotations
    assert annotation.text.startswith("far 40.0")


def test_where_one_behavior_alone_differs_there_is_no_interval():
    rows = rows_of(12).assign(one=[*[0] * 11, 1])
    found = rank_correlations(rows, ["one", "good"], "effect", **QUICK).set_index("number")
    assert np.isfinite(found.loc["one", "rho"])
    assert found.loc["one", ["low", "high"]].isna().all()
    assert found.loc["good", ["low", "high"]].notna().all()


# ---- a cheap run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """The experiment on a random model, with four behaviors."""
    config = RunConfig.of(str(models / "chat"), behaviors=("sentiment", "refusal"), seed=2)
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("CAA_LENS_EVALS", str(tmp_path_factory.mktemp("none")))
        written = tmp_path_factory.mktemp("written")
        for name in ("cooking", "correct"):
            (written / f"{name}.jsonl").write_bytes((many_behaviors.WRITTEN / f"{name}.jsonl").read_bytes())
        patch.setattr(many_behaviors, "WRITTEN", written)
        for name, n in {"N_TRAIN": 16, "N_VALIDATION": 4, "N_TEST": 6}.items():
            patch.setattr(many_behaviors, name, n)
        many_behaviors.parts.cache_clear()
        folder.claim({"config": config.model_dump(mode="json"), "versions": {}}, {})
        outcomes = run([predict.EXPERIMENT], config, folder)
        yield config, folder, outcomes
    many_behaviors.parts.cache_clear()


def test_a_run_asks_every_behavior_in_its_forms_and_shows_them(finished):
    config, folder, outcomes = finished
    assert not any(outcome.failed or outcome.skipped for outcome in outcomes), outcomes
    frames = folder.frames(predict.EXPERIMENT.name, predict.units(config))
    assert [unit.arguments for unit in frames] == [
        (("behavior", "sentiment"), ("form", COMPLETIONS)),
        (("behavior", "refusal"), ("form", LETTERS)),
        (("behavior", "refusal"), ("form", COMPLETIONS)),
        (("behavior", "cooking"), ("form", COMPLETIONS)),
        (("behavior", "correct"), ("form", COMPLETIONS)),
    ]
    assert set(predict.own(config)) == {f"{unit.name}/sets" for unit in frames}
    behaviors = predict.behaviors_of(frames, config.seed)
    assert len(behaviors) == 5
    assert np.isfinite(behaviors[["effect", "effect_chosen", "effect_same_norm", "split_half", "norm"]]).all(axis=None)


def test_what_a_unit_takes_is_counted(finished):
    config, _, _ = finished
    unit = Unit.of(behavior="refusal", form=LETTERS)
    made = parts(predict.by_unit(config)[unit], LETTERS, config.seed)
    found = predict.cost(unit, SimpleNamespace(config=config))
    read = reading_cost(made.train)
    scored = scoring_cost(made.validation, 11, depth=0.5) + scoring_cost(made.test, 9, depth=0.5)
    assert found == read + read + scored


@pytest.mark.parametrize("form", [LETTERS, COMPLETIONS])
def test_effects_are_those_of_a_sweep_and_numbers_those_of_reliability(finished, form):
    config, folder, _ = finished
    unit = Unit.of(behavior="refusal", form=form)
    frame = folder.frames(predict.EXPERIMENT.name, predict.units(config))[unit]
    made = parts(predict.by_unit(config)[unit], form, config.seed)
    model = load_model(config.model)
    layers, middle = predict.layers_of(model.cfg.n_layers)
    vectors = extract(model, made.train, layers=layers, progress=False)
    activations = pair_activations(model, made.train, layers=layers, progress=False)
    said = reliability(activations, seed=config.seed, progress=False).frame.set_index("layer")
    with torch.no_grad():
        slow = {
            name: sweep(model, part, vectors, multipliers=(-1, 0, 1), progress=False)
            for name, part in (("validation", made.validation), ("test", made.test))
        }
    row = predict.behaviors_of({unit: frame}, config.seed).iloc[0]
    effects = slow["validation"].effect(n_resamples=0)
    assert row["layer_chosen"] == effects.loc[effects["effect"].idxmax(), "layer"]
    spread = slow["test"].frame.query("multiplier == 0 and layer == @middle")[slow["test"].metric].std()
    effect = slow["test"].effect(n_resamples=0).set_index("layer")["effect"]
    assert row["effect"] == pytest.approx(effect[middle] / spread, rel=1e-3, abs=1e-5)
    assert row["effect_chosen"] == pytest.approx(effect[row["layer_chosen"]] / spread, rel=1e-3, abs=1e-5)
    assert row["split_half"] == pytest.approx(said.loc[middle, "split_half"], abs=1e-6)
    assert row["verdict"] == said.loc[middle, "verdict"]
    assert row["norm"] == pytest.approx(vectors[middle].norm, rel=1e-4)


def test_the_controls_have_the_norms_that_are_said(finished):
    config, _, _ = finished
    unit = Unit.of(behavior="cooking", form=COMPLETIONS)
    asked = []
    model = load_model(config.model)

    def scored(model, part, cells):
        asked.extend(cells)
        values = np.random.default_rng(0).standard_normal((len(cells), len(part)))
        return pd.concat(
            [
                pd.DataFrame({**labels, "question": range(len(part)), "metric": "margin", "score": values[i]})
                for i, (labels, _) in enumerate(cells)
            ]
        )

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(predict, "scored", scored)
        predict.run(unit, SimpleNamespace(config=config, model=model))
    layers, middle = predict.layers_of(model.cfg.n_layers)
    made = parts(predict.by_unit(config)[unit], COMPLETIONS, config.seed)
    activations = pair_activations(model, made.train, layers=layers, progress=False)
    stream = float(activations.norms[:, :, layers.index(middle)].mean())
    steps = {
        (labels["kind"], labels["layer"], labels["multiplier"]): step
        for labels, condition in asked
        for step in condition
    }
    vector = steps["vector", middle, 1.0].vector
    same, random = steps["same norm", middle, 1.0], steps["random", middle, 1.0]
    assert same.vector.norm * same.multiplier == pytest.approx(0.1 * stream, rel=1e-4)
    assert vector.cosine(same.vector) == pytest.approx(1)
    assert random.vector.norm == pytest.approx(vector.norm, rel=1e-5)
    assert abs(vector.cosine(random.vector)) < 0.8
    assert [steps[kind, middle, -1.0].multiplier for kind in ("vector", "random")] == [-1, -1]
    assert steps["same norm", middle, -1.0].multiplier == -same.multiplier
