"""Grids of vectors by test sets: every cell is what a plain score of that vector on that set says."""

import numpy as np
import pytest
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.training_pairs import TrainingPairsWarning
from caa_lens.steering.interventions import Intervention
from caa_lens.transfers import across_behaviors
from caa_lens.transfers.across_behaviors import PromptSetting, transfer_behaviors, transfer_prompts
from caa_lens.vectors.extraction import extract

LETTERS = ContrastSet.from_pairs(
    [
        (f"Is number {n} good?\n\nChoices:\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
        for n in range(6)
    ],
    name="numbers",
)
TEXTS = ContrastSet.from_pairs(
    [(f"How was day {n}?", "It was lovely.", "It was awful.") for n in range(4)], name="days"
)
TESTS = {"numbers": LETTERS, "days": TEXTS}


def sets_for(model):
    return {"numbers": random_vectors(model, seed=1), "days": random_vectors(model, seed=2)}


def test_every_cell_is_the_change_of_the_margin_under_that_vector(tiny_chat):
    vectors = sets_for(tiny_chat)
    result = transfer_behaviors(tiny_chat, TESTS, vectors, layer=3, multiplier=-2, progress=False)
    assert result.table().shape == (2, 2)
    for source, each in vectors.items():
        for target, test in TESTS.items():
            conditions = [(), (Intervention(vector=each[3], multiplier=-2),)]
            one = score_answers(tiny_chat, test, conditions, progress=False)
            margins = (one.positive - one.negative).numpy()
            frame = result.frame
            cell = frame[(frame["source"] == source) & (frame["target"] == target)].sort_values("question")
            np.testing.assert_allclose(cell["margin"], margins[:, 1], atol=2e-5)
            np.testing.assert_allclose(cell["effect"], (margins[:, 1] - margins[:, 0]) / -2, atol=2e-5)
            assert result.unsteered[target] == pytest.approx(margins[:, 0].mean(), abs=2e-5)


def test_the_cosines_stand_beside_the_effects(tiny_chat):
    vectors = sets_for(tiny_chat)
    cells = (
        transfer_behaviors(tiny_chat, TESTS, vectors, layer=1, progress=False).summary().set_index(["source", "target"])
    )
    assert cells.loc[("numbers", "days"), "cosine"] == pytest.approx(vectors["numbers"][1].cosine(vectors["days"][1]))
    assert cells.loc[("days", "days"), "cosine"] == pytest.approx(1)
    assert (cells["low"] <= cells["mean"]).all()
    assert (cells["mean"] <= cells["high"]).all()


def test_a_test_set_without_a_vector_of_its_name_has_no_cosine(tiny_chat):
    only = {"days": random_vectors(tiny_chat)}
    result = transfer_behaviors(tiny_chat, TESTS, only, layer=1, progress=False)
    cells = result.summary().set_index("target")
    assert np.isnan(cells.loc["numbers", "cosine"])
    assert len(result.plot().layout.shapes) == 1


def test_multiplier_0_gives_zero_and_the_order_of_questions_changes_nothing(tiny_chat):
    vectors = sets_for(tiny_chat)
    assert (
        transfer_behaviors(tiny_chat, TESTS, vectors, layer=2, multiplier=0, progress=False).frame["effect"] == 0
    ).all()
    there = transfer_behaviors(tiny_chat, TESTS, vectors, layer=2, progress=False).table()
    turned = {name: test[::-1] for name, test in TESTS.items()}
    back = transfer_behaviors(tiny_chat, turned, vectors, layer=2, max_tokens=40, progress=False).table()
    np.testing.assert_allclose(back, there, atol=2e-5)


def test_vectors_cross_between_prompt_formats_and_system_prompts(tiny_chat):
    settings = {
        "chat": PromptSetting(),
        "llama": PromptSetting(prompt_format="llama2-base"),
        "gloomy": PromptSetting(system="You are gloomy."),
    }
    result = transfer_prompts(tiny_chat, LETTERS, TEXTS, settings, layer=2, progress=False)
    assert list(result.table().index) == list(result.table().columns) == list(settings)
    of_gloomy = extract(tiny_chat, LETTERS, layers=[2], system="You are gloomy.", progress=False)
    assert of_gloomy.provenance.details["system"] == "You are gloomy."
    one = score_answers(
        tiny_chat,
        TEXTS,
        [(), (Intervention(vector=of_gloomy[2]),)],
        prompt_format="llama2-base",
        progress=False,
    )
    cell = result.frame.query("source == 'gloomy' and target == 'llama'").sort_values("question")["effect"]
    np.testing.assert_allclose(cell, (one.values[:, 1] - one.values[:, 0]).numpy(), atol=2e-5)
    assert result.tests["gloomy"]["system"] == "You are gloomy."


def test_figures_show_numbers_levels_and_intervals(tiny_chat):
    result = transfer_behaviors(tiny_chat, TESTS, sets_for(tiny_chat), layer=2, progress=False)
    figure = result.plot()
    np.testing.assert_allclose(figure.data[0].z, result.table())
    assert figure.data[0].texttemplate == "%{z:.2f}"
    assert f"days {result.unsteered['days']:.2f}" in figure.layout.title.text
    cell = result.summary().query("source == 'numbers' and target == 'days'").iloc[0]
    assert figure.data[0].customdata[0][1] == f"[{cell['low']:.4f}, {cell['high']:.4f}]"
    assert len(result.plot_cosine().data[0].x) == 2
    assert "days" in repr(result)


def test_training_pairs_among_those_scored_are_counted_for_each_test_set_whoevers_they_are(tiny_chat):
    vectors = {
        name: extract(tiny_chat, train, layers=[1], progress=False)
        for name, train in {"numbers": LETTERS[:2], "days": TEXTS[:2]}.items()
    }
    swapped = {"numbers": TEXTS[1:], "days": LETTERS[2:]}  # of another name, and yet trained on
    with pytest.warns(TrainingPairsWarning, match="1 of the 3 pairs scored in 'numbers' are among") as said:
        transfer_behaviors(tiny_chat, swapped, vectors, layer=1, progress=False)
    assert len(said) == 1
    apart = {"numbers": LETTERS[2:], "days": TEXTS[2:]}
    transfer_behaviors(tiny_chat, apart, vectors, layer=1, progress=False)  # warnings are errors here
    settings = {"chat": PromptSetting(), "llama": PromptSetting(prompt_format="llama2-base")}
    with pytest.warns(TrainingPairsWarning, match="2 of the 4 pairs scored are among") as said:
        transfer_prompts(tiny_chat, LETTERS[:4], LETTERS[2:], settings, layer=1, progress=False)
    assert len(said) == 1


def test_bad_requests_are_refused(tiny_chat):
    vectors = sets_for(tiny_chat)
    with pytest.raises(ValueError, match="no test sets given"):
        transfer_behaviors(tiny_chat, {}, vectors, layer=1)
    with pytest.raises(ValueError, match="has no vector for layer 9"):
        transfer_behaviors(tiny_chat, TESTS, vectors, layer=9)


def test_a_setting_reaches_every_score_and_stands_beside_it(tiny_chat):
    vectors = sets_for(tiny_chat)
    how = PromptSetting(prompt_format="llama2-base", system="Be brief.")
    result = transfer_behaviors(tiny_chat, TESTS, vectors, layer=2, multiplier=0.5, setting=how, progress=False)
    for target, test in TESTS.items():
        conditions = [(), (Intervention(vector=vectors["days"][2], multiplier=0.5),)]
        one = score_answers(
            tiny_chat, test, conditions, prompt_format="llama2-base", system="Be brief.", progress=False
        )
        margins = (one.positive - one.negative).numpy()
        cell = result.frame.query("source == 'days' and target == @target").sort_values("question")
        np.testing.assert_allclose(cell["margin"], margins[:, 1], atol=2e-5)
        assert {**result.settings, **result.tests[target]} == {**one.settings, "multiplier": "0.5"}
        assert not result.settings.keys() & result.tests[target].keys()
        assert result.unsteered[target] == pytest.approx(margins[:, 0].mean(), abs=2e-5)
    assert result.provenance == {name: each.provenance for name, each in vectors.items()}
    assert result.layer == 2
    assert list(result.frame) == ["source", "target", "question", "margin", "effect", "cosine"]


def test_the_summary_has_the_interval_of_each_cell_in_the_given_order(tiny_chat):
    vectors = sets_for(tiny_chat)
    result = transfer_behaviors(tiny_chat, TESTS, vectors, layer=2, progress=False)
    summary = result.summary()
    assert list(summary) == ["source", "target", "mean", "low", "high", "cosine"]
    assert list(dict.fromkeys(summary["target"])) == list(TESTS)
    cell = result.frame.query("source == 'days' and target == 'numbers'").sort_values("question")["effect"].to_numpy()
    row = summary.query("source == 'days' and target == 'numbers'").iloc[0]
    (low,), (high,) = bootstrap_interval(cell[:, None])
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([cell.mean(), low, high], abs=1e-7)
    assert not np.allclose(result.summary(n_resamples=10, seed=1)["low"], summary["low"])
    matrix = result.table()
    assert (list(matrix.index), list(matrix.columns)) == (list(vectors), list(TESTS))
    assert matrix.loc["days", "numbers"] == pytest.approx(cell.mean(), abs=1e-7)


def test_the_budget_and_one_multiplier_are_those_of_the_signature(tiny_chat, monkeypatch):
    budgets = []

    def recorded(*given, max_tokens, **how):
        budgets.append(max_tokens)
        return score_answers(*given, max_tokens=max_tokens, **how)

    monkeypatch.setattr(across_behaviors, "score_answers", recorded)
    vectors, how = sets_for(tiny_chat), {"layer": 2, "max_tokens": 17, "progress": False}
    assert transfer_behaviors(tiny_chat, {"days": TEXTS}, vectors, **how).settings["multiplier"] == "1"
    settings = {"plain": PromptSetting()}
    assert transfer_prompts(tiny_chat, TEXTS, LETTERS, settings, **how).settings["multiplier"] == "1"
    assert transfer_prompts(tiny_chat, TEXTS, LETTERS, settings, multiplier=2, **how).settings["multiplier"] == "2"
    assert budgets == [17, 17, 17]
