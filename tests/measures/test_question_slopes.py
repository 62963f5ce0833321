"""Slopes of single questions: those of a line that scipy fits, and questions that were made to move the wrong way."""

import numpy as np
import pandas as pd
import pytest
from helpers.models import random_vectors
from scipy.stats import binomtest, linregress

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.question_slopes import Steerability, slopes_of, steerability
from caa_lens.measures.sweeps import Sweep, sweep
from caa_lens.provenance import Provenance

MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def made_up(slopes, *, layer=7, multipliers=MULTIPLIERS, noise=0.05, seed=0, metric="p_matching"):
    """A sweep whose questions move by `slopes`, times two at the layer above."""
    rng = np.random.default_rng(seed)
    rows = []
    for factor, at in ((1, layer), (2, layer + 1)):
        for question, slope in enumerate(slopes):
            for m in rng.permutation(multipliers):
                score = 0.5 + factor * slope * m + noise * rng.standard_normal()
                logp = {"logp_positive": 3 * score, "logp_negative": -score}
                rows.append(
                    {"behavior": "b", "layer": at, "multiplier": m, "question": question, metric: score, **logp}
                )
    return Sweep(frame=pd.DataFrame(rows), metric=metric, provenance={"vectors": Provenance(behavior="b")})


def test_slopes_and_their_intervals_are_those_of_a_line_that_scipy_fits():
    given = made_up([0.2, -0.1, 0.0, 0.05])
    found = steerability(given).frame
    assert list(found.columns) == ["behavior", "layer", "question", "slope", "low", "high"]
    assert len(found) == 8
    for row in found.itertuples():
        own = given.frame[(given.frame["layer"] == row.layer) & (given.frame["question"] == row.question)]
        line = linregress(own["multiplier"], own["p_matching"])
        half = 3.182446305 * line.stderr  # Student's t of three degrees of freedom at 0.975
        np.testing.assert_allclose([row.slope, row.low, row.high], [line.slope, line.slope - half, line.slope + half])


def test_the_questions_that_move_the_wrong_way_are_counted_and_named():
    slopes = [0.2, -0.3, 0.1, 0.15, -0.1, 0.3, 0.2, 0.1, 0.25, 0.2]
    found = steerability(made_up(slopes, noise=0.01))
    assert found.wrong_way(7)["question"].tolist() == [1, 4]
    row = found.summary().set_index("layer").loc[7]
    assert (row["n_wrong"], row["n_questions"], row["wrong"]) == (2, 10, 0.2)
    share = binomtest(2, 10).proportion_ci(method="wilson")
    np.testing.assert_allclose([row["wrong_low"], row["wrong_high"]], [share.low, share.high])
    assert row["mean"] == pytest.approx(np.mean(slopes), abs=0.005)
    assert row["low"] < row["mean"] < row["high"]


def test_a_question_that_hardly_moves_the_wrong_way_is_counted_too():
    found = steerability(made_up([0.2, -0.02, -0.03, -0.01, 0.1], noise=0.05), layers=[7])
    unsure = found.frame[(found.frame["slope"] < 0) & (found.frame["high"] > 0)]
    assert len(unsure) > 0
    assert found.summary()["n_wrong"][0] == (found.frame["slope"] < 0).sum()


def test_the_mean_slopes_interval_holds_the_true_mean_nineteen_times_in_twenty():
    held = 0
    for seed in range(100):
        slopes = 0.1 + 0.2 * np.random.default_rng(seed).standard_normal(40)
        row = steerability(made_up(slopes, noise=0.0, seed=seed), layers=[7]).summary(n_resamples=400).iloc[0]
        held += row["low"] <= 0.1 <= row["high"]
    assert 88 <= held <= 100


def test_the_interval_of_a_question_says_how_far_it_is_from_a_line():
    on_a_line = np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]]) * 0.1
    saturated = np.array([[-0.2, -0.2, 0.0, 0.2, 0.2]])
    (_, low, high), (_, low_2, high_2) = (slopes_of(rows, np.array(MULTIPLIERS)) for rows in (on_a_line, saturated))
    assert high[0] - low[0] < 1e-12
    assert high_2[0] - low_2[0] > 0.05


def test_two_multipliers_have_a_slope_without_an_interval():
    found = steerability(made_up([0.2, -0.1], multipliers=(0.0, 2.0), noise=0.0))
    np.testing.assert_allclose(found.frame["slope"], [0.2, -0.1, 0.4, -0.2])
    assert found.frame[["low", "high"]].isna().all(axis=None)
    assert "1 of 2 questions move the wrong way" in found.plot(7).layout.meta["title"]


def test_log_odds_are_the_difference_of_the_log_probabilities():
    given = made_up([0.2, -0.1], noise=0.02)
    np.testing.assert_allclose(
        steerability(given, score="log_odds").frame["slope"], 4 * steerability(given).frame["slope"]
    )
    assert steerability(given, score="log_odds").score == "log_odds"


def test_a_question_whose_scores_are_nan_has_no_slope_and_is_not_counted():
    given = made_up([0.2, -0.1, 0.3], noise=0.0)
    frame = given.frame.copy()
    frame.loc[(frame["question"] == 1) & (frame["multiplier"] == 2), "p_matching"] = np.nan
    found = steerability(Sweep(frame=frame, metric="p_matching", provenance=given.provenance))
    assert found.frame["slope"].isna().sum() == 2
    row = found.summary().iloc[0]
    assert (row["n_wrong"], row["n_questions"]) == (0, 2)
    assert found.wrong_way(7).empty


def test_the_plot_sorts_slopes_and_takes_the_steepest_layer_unless_one_is_named():
    found = steerability(made_up([0.2, -0.1, 0.3], noise=0.0))
    assert found.steepest_layer == 8
    figure = found.plot()
    assert list(figure.data[0].x) == ["1", "0", "2"]
    assert "at layer 8: 1 of 3 questions move the wrong way" in figure.layout.meta["title"]


def test_the_result_is_saved_and_says_its_summary(tmp_path):
    found = steerability(made_up([0.2, -0.1, 0.3]), layers=[8])
    loaded = Steerability.load(found.save(tmp_path / "s.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    assert loaded.score == "p_matching"
    assert loaded.settings["multipliers"] == "-2, -1, 0, 1, 2"
    assert "slopes of p_matching" in repr(found)


def test_a_sweep_of_a_model_is_taken_and_stays_as_it_is(tiny_chat):
    pairs = ContrastSet.from_pairs([(f"Is {n} good?", "Yes, very.", "No.") for n in range(4)], name="numbers")
    swept = sweep(tiny_chat, pairs, random_vectors(tiny_chat, layers=(1, 4)), multipliers=[1, 0, -1], progress=False)
    before = swept.frame.copy()
    found = steerability(swept)
    pd.testing.assert_frame_equal(swept.frame, before)
    table = before[before["layer"] == 4].pivot(index="question", columns="multiplier", values="margin")
    own = found.frame[found.frame["layer"] == 4]
    np.testing.assert_allclose(own["slope"], (table[1] - table[-1]) / 2, atol=1e-6)
    assert found.score == "margin"


def test_mistakes_are_told_of():
    given = made_up([0.2, -0.1])
    with pytest.raises(ValueError, match=r"not swept: layers 3, expected some of 7-8"):
        steerability(given, layers=[3])
    with pytest.raises(ValueError, match="unknown score 'logit': expected 'metric' or 'log_odds'"):
        steerability(given, score="logit")
    with pytest.raises(ValueError, match=r"a slope needs two multipliers or more, got \[1.0\]"):
        steerability(made_up([0.2], multipliers=(1.0,)))
    with pytest.raises(ValueError, match="layer 3 has no slopes: expected one of 7-8"):
        steerability(given).plot(3)
