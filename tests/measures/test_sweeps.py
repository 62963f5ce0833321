"""Sweeps: the frame, its intervals and what is read off it."""

import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.methods import PAIRS as OTHERS
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.measures.honest_choice import choose_honestly
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.sweeps import RepeatedQuestionsWarning, Sweep, sweep
from caa_lens.measures.training_pairs import TrainingPairsWarning, count_training_pairs
from caa_lens.methods import instruction
from caa_lens.provenance import Provenance
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.extraction import extract

PAIRS = ContrastSet.from_pairs(
    [
        (f"Is number {n} good?\n\nChoices:\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
        for n in range(6)
    ],
    name="numbers",
)

OTHERS_AB = [
    (f"Is number {n} odd?\n\nChoices:\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
    for n in range(9)
]


def made_up(effect_at: dict[int, float], n_questions: int = 30, noise: float = 0.01) -> Sweep:
    """A sweep whose score rises by `effect` a multiplier at each layer."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "behavior": "b",
            "layer": layer,
            "multiplier": m,
            "question": q,
            "margin": base + effect * m + noise * rng.standard_normal(),
        }
        for q, base in enumerate(rng.standard_normal(n_questions))
        for layer, effect in effect_at.items()
        for m in (-2.0, -1.0, 0.0, 1.0, 2.0)
    ]
    return Sweep(frame=pd.DataFrame(rows), metric="margin", provenance={"vectors": Provenance(behavior="b")})


def test_every_cell_of_the_frame_is_the_score_of_its_layer_multiplier_and_question(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 2, 4))  # ids that are not list positions
    result = sweep(tiny_chat, PAIRS, vectors, multipliers=[2, 0, -1], layers=[4, 1], progress=False)
    assert list(result.frame.columns) == [
        "behavior",
        "layer",
        "multiplier",
        "question",
        "p_matching",
        "logp_positive",
        "logp_negative",
        "positions",
    ]
    assert len(result.frame) == 2 * 3 * 6
    for layer in (1, 4):
        for m in (2.0, 0.0, -1.0):
            step = Intervention(vector=vectors[layer], multiplier=m)
            expected = score_answers(tiny_chat, PAIRS, [(step,)], progress=False).values[:, 0]
            cell = result.frame.query("layer == @layer and multiplier == @m").sort_values("question")
            np.testing.assert_allclose(cell["p_matching"], expected.numpy(), atol=2e-5)
            np.testing.assert_allclose(np.exp(cell["logp_positive"]), cell["p_matching"], rtol=1e-5)


def test_the_unsteered_level_is_the_same_at_every_layer(tiny_chat):
    result = sweep(tiny_chat, PAIRS, random_vectors(tiny_chat), multipliers=[0, 1], progress=False)
    unsteered = result.frame[result.frame["multiplier"] == 0].pivot(
        index="question", columns="layer", values="p_matching"
    )
    assert (unsteered.nunique(axis=1) == 1).all()
    assert result.unsteered == pytest.approx(unsteered.iloc[:, 0].mean())


def test_the_best_layer_is_the_one_with_the_largest_paired_effect():
    result = made_up({3: 0.1, 7: 0.5, 20: -0.9})
    assert result.best_layer == 7
    effect = result.effect().set_index(["layer", "multiplier"])
    assert effect.loc[(7, 1.0), "effect"] == pytest.approx(1.0, abs=0.02)
    assert effect.loc[(7, 2.0), "effect"] == pytest.approx(2.0, abs=0.02)
    assert effect.loc[(20, 1.0), "high"] < 0 < effect.loc[(3, 1.0), "low"]


def test_the_best_layer_says_on_what_it_was_chosen_and_is_a_number_in_all_else():
    result = made_up({3: 0.1, 7: 0.5})
    best = result.best_layer
    assert repr(best) == "7 (chosen on the 30 questions that this sweep reports)"
    assert f"{best} {best!s}" == "7 7"
    assert json.dumps({"layer": best}) == '{"layer": 7}'
    assert repr(pickle.loads(pickle.dumps(best))) == repr(best)
    assert best == 7
    assert hash(best) == hash(7)
    assert "best layer 7 (chosen on the 30 questions that this sweep reports)" in repr(result)
    assert made_up({7: 0.5}).best_layer.chosen_on == "nothing: it is the only layer that was swept"


def test_the_best_layers_effect_is_of_questions_that_did_not_choose_it():
    layers = range(3, 15)
    result = made_up(dict.fromkeys(layers, 0.0), noise=1.0, n_questions=12)
    best = result.best
    table = result.frame.pivot(index="question", columns=["layer", "multiplier"], values="margin")
    effects = np.stack([table[layer, 1.0] - table[layer, -1.0] for layer in layers], axis=1)
    honest = choose_honestly(effects)
    assert (best.effect, best.low, best.high) == (honest.effect, honest.low, honest.high)
    assert best.agreeing == honest.agreeing
    assert best.layer == layers[honest.cell] == result.best_layer
    assert best.effect < result.effect().query("layer == @best.layer and multiplier == 1")["effect"].item()
    assert "12 questions in folds" in str(best)
    with pytest.raises(
        ValueError, match="got 7 questions and 2 cells: of fewer than 8 questions nothing can be chosen"
    ):
        _ = made_up({3: 0.0, 7: 0.0}, noise=1.0, n_questions=7).best


def test_a_question_in_both_letter_orders_counts_once_in_the_best_and_is_told_of(tiny_chat):
    asked = ContrastSet.from_pairs(OTHERS_AB, name="odd")
    both = replace(asked, pairs=(*asked.pairs, *(pair.swapped() for pair in asked)))
    vectors = random_vectors(tiny_chat, layers=(1, 2, 4))
    with pytest.warns(RepeatedQuestionsWarning, match="9 of the 18 questions of 'odd' stand twice"):
        found = sweep(tiny_chat, both, vectors, progress=False)
    assert found.same_question == (*range(9), *range(9))
    table = found.frame.pivot(index="question", columns=["layer", "multiplier"], values="p_matching")
    effects = np.stack([table[layer, 1.0] - table[layer, -1.0] for layer in (1, 2, 4)], axis=1)
    honest = choose_honestly((effects[:9] + effects[9:]) / 2)
    assert (found.best.effect, found.best.low) == pytest.approx((honest.effect, honest.low), abs=1e-12)
    alone = sweep(tiny_chat, asked, vectors, progress=False)  # warnings are errors here
    assert alone.same_question == ()


def test_validation_questions_choose_and_are_not_reported(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 2, 4))
    validation = ContrastSet.from_pairs(OTHERS_AB, name="odd")
    plain = sweep(tiny_chat, PAIRS, vectors, multipliers=[-2, -1, 1, 2], progress=False)
    chosen = sweep(tiny_chat, PAIRS, vectors, multipliers=[-2, -1, 1, 2], validation=validation, progress=False)
    pd.testing.assert_frame_equal(chosen.frame, plain.frame)
    alone = sweep(tiny_chat, validation, vectors, multipliers=[-1, 1], progress=False)
    effects = alone.effect(n_resamples=0)
    np.testing.assert_allclose(chosen.validation.effects, effects["effect"], atol=2e-6)
    assert chosen.best_layer == effects.loc[effects["effect"].idxmax(), "layer"]
    assert chosen.best_layer != plain.best_layer, "the seeds make validation choose another layer"
    assert chosen.best_layer.chosen_on == "9 validation questions"
    own = plain.effect().query("layer == @chosen.best_layer and multiplier == 1")
    best = chosen.best
    assert [best.effect, best.low, best.high] == pytest.approx(own[["effect", "low", "high"]].to_numpy()[0], abs=1e-12)
    assert best.reported_on == "6 questions that did not choose it"


def test_a_sweep_with_its_choice_is_saved_and_one_from_before_has_none(tiny_chat, tmp_path):
    validation = ContrastSet.from_pairs(OTHERS_AB, name="odd")
    vectors = random_vectors(tiny_chat, layers=(1, 2))
    found = sweep(tiny_chat, PAIRS, vectors, validation=validation, progress=False)
    found.save(tmp_path / "sweep.parquet")
    assert Sweep.load(tmp_path / "sweep.parquet").validation == found.validation
    replace(found, validation=None).save(tmp_path / "plain.parquet")
    about = json.loads((tmp_path / "plain.json").read_text())
    del about["special"]["validation"], about["checksum"]
    about["checksum"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (tmp_path / "plain.json").write_text(json.dumps(about))
    assert Sweep.load(tmp_path / "plain.parquet").validation is None


def test_validation_pairs_that_cannot_choose_are_refused(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 2))
    with pytest.raises(ValueError, match="6 of the 6 validation pairs are test pairs, which would flatter"):
        sweep(tiny_chat, PAIRS, vectors, validation=PAIRS, progress=False)
    with pytest.raises(ValueError, match="validation has pairs of kind 'completions', test 'ab'"):
        sweep(tiny_chat, PAIRS, vectors, validation=OTHERS, progress=False)
    validation = ContrastSet.from_pairs(OTHERS_AB, name="odd")
    with pytest.raises(ValueError, match=r"got the multipliers \[0.0, 1.0\]: sweep e.g. -1 and 1, or leave validation"):
        sweep(tiny_chat, PAIRS, vectors, multipliers=[0, 1], validation=validation, progress=False)


def test_the_paired_effect_is_far_surer_than_the_means_are():
    result = made_up({7: 0.5})
    summary = result.summary().set_index("multiplier")
    effect = result.effect().set_index("multiplier")
    assert effect.loc[1.0, "high"] - effect.loc[1.0, "low"] < 0.1 * (summary.loc[1.0, "high"] - summary.loc[1.0, "low"])


def test_summaries_are_the_same_each_time():
    result = made_up({7: 0.5})
    pd.testing.assert_frame_equal(result.summary(), result.summary())


def test_the_bootstrap_interval_covers_the_normal_theory_interval():
    values = np.random.default_rng(1).standard_normal((400, 3)) + np.array([0.0, 1.0, 5.0])
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(axis=0) / np.sqrt(len(values))
    np.testing.assert_allclose(low, values.mean(0) - half, atol=0.012)
    np.testing.assert_allclose(high, values.mean(0) + half, atol=0.012)


def test_one_question_has_no_interval():
    low, high = bootstrap_interval(np.ones((1, 2)))
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_no_effect_without_a_multiplier_and_its_negative(tiny_chat):
    result = sweep(tiny_chat, PAIRS, random_vectors(tiny_chat, layers=[2]), multipliers=[0, 1], progress=False)
    with pytest.raises(ValueError, match="no multiplier was swept with its negative"):
        result.effect()
    assert "best layer" not in repr(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": []}, "no multipliers given"),
        ({"multipliers": [1, 1]}, "multipliers must differ"),
        ({"layers": [5]}, "layer 5 is out of range: tiny-random-llama has layers 0 to 4"),
        ({"layers": [-1]}, "the last is 4, not -1"),
        ({"multipliers": [float("nan")]}, "multiplier must be finite"),
    ],
)
def test_bad_requests_are_refused_with_the_remedy(tiny_chat, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(tiny_chat, PAIRS, random_vectors(tiny_chat), progress=False, **options)


def test_a_layer_without_a_vector_is_refused(tiny_chat):
    with pytest.raises(IndexError, match=r"no vector for layer 3: this set has layers 1, 4"):
        sweep(tiny_chat, PAIRS, random_vectors(tiny_chat, layers=[1, 4]), layers=[3], progress=False)


def test_prompt_format_and_system_prompt_reach_the_scores_and_are_told(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 3), behavior="joy")
    how = {"prompt_format": "llama2-base", "system": "Be brief."}
    result = sweep(tiny_chat, PAIRS, vectors, multipliers=[-1, 1], **how, progress=False)
    expected = score_answers(
        tiny_chat, PAIRS, [(Intervention(vector=vectors[3], multiplier=-1),)], **how, progress=False
    )
    cell = result.frame.query("layer == 3 and multiplier == -1")
    np.testing.assert_allclose(cell["p_matching"], expected.values[:, 0], atol=2e-5)
    np.testing.assert_allclose(cell["logp_negative"], expected.negative[:, 0], atol=2e-5)
    assert result.settings == {**expected.settings, "operator": "add", "positions": "caa"}
    assert (result.metric, result.provenance) == ("p_matching", {"vectors": vectors.provenance})
    assert set(result.frame["behavior"]) == {"joy"}
    assert cell["question"].tolist() == list(range(len(PAIRS)))
    assert np.isnan(result.unsteered)


def test_effects_and_summaries_are_of_each_cell_with_its_interval():
    result = made_up({4: 0.5, 1: -0.2})
    table = result.frame.pivot(index="question", columns=["layer", "multiplier"], values="margin")
    effect = result.effect()
    assert list(effect) == ["layer", "multiplier", "effect", "low", "high"]
    assert effect[["layer", "multiplier"]].to_numpy().tolist() == [[1, 1], [1, 2], [4, 1], [4, 2]]
    for row in effect.itertuples():
        difference = (table[row.layer, row.multiplier] - table[row.layer, -row.multiplier]).to_numpy()
        (low,), (high,) = bootstrap_interval(difference[:, None])
        assert [row.effect, row.low, row.high] == pytest.approx([difference.mean(), low, high])
    summary = result.summary()
    assert list(summary) == ["layer", "multiplier", "mean", "low", "high"]
    row = summary.query("layer == 1 and multiplier == 2").iloc[0]
    (low,), (high,) = bootstrap_interval(table[1, 2.0].to_numpy()[:, None])
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([table[1, 2.0].mean(), low, high])
    assert not np.allclose(result.summary(n_resamples=10, seed=1)["low"], summary["low"])
    assert not np.allclose(result.effect(n_resamples=10, seed=1)["low"], effect["low"])


def test_the_best_layer_is_judged_at_the_smallest_multiplier_from_one_on():
    frame = made_up({1: 0.1, 3: 0.5, 4: 0.2}).frame
    turned = frame["multiplier"].abs() == 2  # at 2 layer 4 is the best
    frame.loc[turned & (frame["layer"] == 4), "margin"] += 9 * frame["multiplier"]
    sweep_of = {"metric": "margin", "provenance": {"vectors": Provenance(behavior="b")}}
    assert Sweep(frame=frame, **sweep_of).best_layer == 3
    small = frame.assign(multiplier=frame["multiplier"] / 4)  # 0.25 and 0.5: then the largest
    assert Sweep(frame=small, **sweep_of).best_layer == 4
    assert Sweep(frame=frame, **sweep_of).paired_multipliers == [1.0, 2.0]


def test_the_budget_and_the_default_multipliers_are_those_of_the_signature(tiny_chat, monkeypatch):
    from caa_lens.measures import sweeps

    budgets = []

    def recorded(*given, max_tokens, **how):
        budgets.append(max_tokens)
        return score_answers(*given, max_tokens=max_tokens, **how)

    monkeypatch.setattr(sweeps, "score_answers", recorded)
    result = sweep(tiny_chat, PAIRS, random_vectors(tiny_chat, layers=[2]), max_tokens=17, progress=False)
    assert budgets == [17]
    assert result.frame["multiplier"].unique().tolist() == [-1, 0, 1]


def test_figures_show_the_numbers_of_the_frame():
    result = made_up({3: 0.1, 7: 0.5})
    heat = result.plot().data[0]
    mean = result.frame.query("layer == 7 and multiplier == 2")["margin"].mean()
    assert heat.z[1][4] == pytest.approx(mean)
    assert list(heat.y) == ["3", "7"]
    assert list(heat.x) == ["-2", "-1", "0", "1", "2"]
    curve = result.plot_layer().data[1]
    assert list(curve.x) == [-2, -1, 0, 1, 2]
    assert curve.y[4] == pytest.approx(mean)
    with pytest.raises(ValueError, match="layer 9 was not swept"):
        result.plot_layer(9)


def test_sentiment_steers_the_real_model_in_a_dose_dependent_way(demo_model):
    """What the demo shows: the margin rises with the multiplier, and +1 against -1 cannot be chance."""
    from caa_lens.vectors.extraction import extract

    train, test = ContrastSet.load("sentiment").split(test=40, seed=0)
    vectors = extract(demo_model, train.sample(40, seed=0), layers=[15, 18], progress=False)
    result = sweep(demo_model, test.sample(12, seed=0), vectors, multipliers=[-2, -1, 0, 1, 2], progress=False)
    mean = result.summary().query("layer == @result.best_layer")["mean"].to_numpy()
    assert (np.diff(mean) > 0).all(), mean
    assert result.effect().query("layer == @result.best_layer and multiplier == 1")["low"].item() > 0


def test_white_is_the_unsteered_level_and_without_it_nothing_is_above_or_below():
    with_zero = made_up({3: 0.1, 7: 0.5})
    (cells,) = with_zero.plot().data
    assert (cells.zmin + cells.zmax) / 2 == pytest.approx(with_zero.unsteered)
    without = replace(with_zero, frame=with_zero.frame[with_zero.frame["multiplier"] > 0])
    (cells,) = without.plot().data
    assert (cells.zmin, cells.zmax) == (None, None)
    assert "nan" not in without.plot().layout.title.text
    elsewhere = replace(with_zero, settings={"test": "other pairs"})
    assert elsewhere.plot().layout.meta["title"].startswith("b, tested on other pairs: ")


def test_of_one_layer_the_best_is_known_whatever_was_swept():
    one = made_up({7: 0.5})
    alone = replace(one, frame=one.frame[one.frame["multiplier"] > 0])
    assert alone.best_layer == 7
    assert alone.plot_layer().data
    two = made_up({7: 0.5, 9: 0.5})
    undecided = replace(two, frame=two.frame[two.frame["multiplier"] > 0])
    with pytest.raises(ValueError, match="or name a layer"):
        _ = undecided.best_layer


def test_pairs_of_the_extraction_among_those_scored_are_counted(tiny_chat):
    words = [(f"Is {n} good?", "Yes, very.", "No, not at all.") for n in range(8)]
    pairs = ContrastSet.from_pairs(words)
    vectors = extract(tiny_chat, pairs[:5], progress=False)
    with pytest.warns(TrainingPairsWarning, match="2 of the 5 pairs scored are among those that the vectors were"):
        sweep(tiny_chat, pairs[3:], 2 * vectors, multipliers=[1], layers=[1], progress=False)
    sweep(tiny_chat, pairs[5:], vectors, multipliers=[1], layers=[1], progress=False)  # warnings are errors here
    bare = replace(
        vectors, provenance=replace(vectors.provenance, details={})
    )  # of a file from before they were listed
    assert [count_training_pairs(some, bare) for some in (pairs[:5], pairs[3:])] == [5, 0]


def test_a_sweep_in_which_no_layer_stands_out_has_no_best_one():
    nothing = made_up({3: 0.0, 7: 0.0, 9: 0.0}, noise=0.0)
    with pytest.raises(ValueError, match="no layer is the best: the effect at multiplier 1 is 0 at every layer"):
        _ = nothing.best_layer
    assert "no best layer" in repr(nothing)
    broken = made_up({3: 0.1, 7: 0.5})
    frame = broken.frame.copy()
    frame.loc[(frame["layer"] == 7) & (frame["multiplier"] == 1) & (frame["question"] == 4), "margin"] = np.nan
    with pytest.raises(ValueError, match="the effect at multiplier 1 is NaN at layer 7: sweep smaller multipliers"):
        _ = replace(broken, frame=frame).best_layer
    with pytest.raises(ValueError, match="the sweep has no rows"):
        _ = replace(broken, frame=frame[:0]).best_layer


def test_cells_without_the_same_questions_have_no_mean():
    result = made_up({3: 0.1, 7: 0.5})
    with pytest.raises(ValueError, match="have 29 to 30 rows for 30 questions, expected every question once in each"):
        replace(result, frame=result.frame.drop(index=5)).summary()
    with pytest.raises(ValueError, match="the frame has no rows"):
        replace(result, frame=result.frame[:0]).summary()


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
def test_operators_positions_and_fitted_methods_are_swept_each_layer_alone(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 3))
    result = sweep(
        tiny_chat, PAIRS, vectors, multipliers=[1, 2], operator="add_keep_norm", positions="all", progress=False
    )
    assert set(result.frame["positions"]) == {"all"}
    assert (result.settings["operator"], result.settings["positions"]) == ("add_keep_norm", "all")
    fitted = instruction.fit(tiny_chat, OTHERS, layers=[1, 3], progress=False)
    of_method = sweep(tiny_chat, PAIRS, fitted, multipliers=[1, 0.5], positions="original", progress=False)
    assert set(of_method.frame["positions"]) == {"original"}
    assert of_method.settings["operator"] == "instruction steering"
    for found, order in (
        (
            result,
            lambda layer, m: Intervention(
                vector=vectors[layer], multiplier=m, operator="add_keep_norm", positions="all"
            ),
        ),
        (of_method, lambda layer, m: fitted.at([layer]).interventions(m, positions="all")[0]),
    ):
        for (layer, m), some in found.frame.groupby(["layer", "multiplier"]):
            expected = score_answers(tiny_chat, PAIRS, [(order(layer, m),)], progress=False).values[:, 0]
            np.testing.assert_allclose(some.sort_values("question")["p_matching"], expected.numpy(), atol=2e-5)
    with pytest.warns(TrainingPairsWarning, match="4 of the 4 pairs scored are among those"):
        sweep(tiny_chat, OTHERS, fitted, multipliers=[1], progress=False)
    with pytest.raises(ValueError, match="a fitted method knows what it does: leave operator out"):
        sweep(tiny_chat, PAIRS, fitted, operator="set", progress=False)
