"""Calibration of a small model: each candidate scored alone gives the same, and the choice sees no reporting pair."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers.methods import PAIRS as OTHERS
from helpers.models import random_vectors

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures import Calibration, score_answers, steerability, sweep
from caa_lens.measures.answers import _encode
from caa_lens.measures.calibrating.affordable import LADDER, lengths_for, sizes_of
from caa_lens.measures.calibrating.neutral_cost import over_prompts
from caa_lens.measures.divergence import answered, token_kl
from caa_lens.measures.open_ended.text_measures import distinct
from caa_lens.measures.training_pairs import TrainingPairsWarning
from caa_lens.methods import instruction
from caa_lens.prompts.prompt_formats import Prompt, default_format
from caa_lens.steering.interventions import Intervention

NEUTRAL = ("How does a bicycle stay upright?", "Why is the sky blue?"), ("How are pencils made?", "What is a noun?")
BUDGET = 0.12


def letters(n, name="letters"):
    sides = ("(A)", "(B)"), ("(B)", "(A)")
    return ContrastSet.from_pairs(
        [(f"Is {name} {i} good?\n\nChoices:\n (A) Yes\n (B) No", *sides[i % 2]) for i in range(n)], name=name
    )


def words(n, name="words"):
    return ContrastSet.from_pairs([(f"Say {name} {i}.", f"Yes, {i} it is.", f"No, {i}.") for i in range(n)], name=name)


def exchanged(pairs):
    return replace(pairs, pairs=tuple(replace(p, positive=p.negative, negative=p.positive) for p in pairs))


@pytest.fixture(scope="module")
def vectors(tiny_chat):
    return random_vectors(tiny_chat, layers=(1, 2, 4), scale=0.5)  # ids that are not list positions


def calibrated(model, vectors, pairs, budget=BUDGET, **more):
    given = {"multipliers": [-2, -1, 1, 2], "neutral": NEUTRAL, "progress": False} | more
    return cl.calibrate(model, vectors, pairs, budget, **given)


@pytest.fixture(scope="module")
def found(tiny_chat, vectors):
    return calibrated(tiny_chat, vectors, letters(8), test=letters(9, "others"))


def kl_alone(model, vector, m, prompts):
    tokens = [token_kl(model, [one], [(Intervention(vector=vector, multiplier=m),)], progress=False) for one in prompts]
    return torch.cat([one[0][0] for one in tokens]).double().numpy()


def cut(model, texts, n_tokens):
    """The unsteered answers to some texts, asked one by one."""
    fmt = default_format(model)
    asked = [fmt.encode(model.tokenizer, text) for text in texts]
    return [answered(model, [one], max_new_tokens=n_tokens, progress=False)[0] for one in asked]


@pytest.mark.parametrize("make", [letters, words])
def test_every_row_is_its_candidate_scored_and_measured_alone(tiny_chat, vectors, make):
    choosing, test = make(8), make(9, "others")
    found = calibrated(tiny_chat, vectors, choosing, test=test)
    assert len(found.frame) >= 3 * 2
    few, full = LADDER[-1].few, LADDER[-1].full  # a small model's sweep affords the least
    prompts = {
        few[1]: cut(tiny_chat, NEUTRAL[0][: few[0]], few[1]),
        2 * full[1]: cut(tiny_chat, NEUTRAL[0], full[1]),
    }
    assert set(found.frame["kl_tokens"]) == set(prompts)
    for row in found.frame.itertuples():
        steps = [(Intervention(vector=vectors[row.layer], multiplier=s * row.multiplier),) for s in (1, -1)]
        on = {
            which: score_answers(tiny_chat, pairs, steps, progress=False).values.double().numpy()
            for which, pairs in (("validation", choosing), ("effect", test))
        }
        effects = {which: values[:, 0] - values[:, 1] for which, values in on.items()}
        # Between swept multipliers `validation` is interpolated.
        near = 1e-5 if row.swept else 0.1 * abs(effects["validation"]).max()
        assert row.validation == pytest.approx(effects["validation"].mean(), abs=near)
        if row.swept or row.chosen:
            assert row.effect == pytest.approx(effects["effect"].mean(), abs=1e-5)
            assert row.low <= row.effect <= row.high
        else:
            assert np.isnan(row.effect)
        signs = [kl_alone(tiny_chat, vectors[row.layer], s * row.multiplier, prompts[row.kl_tokens]) for s in (1, -1)]
        worse = max(signs, key=np.mean)
        assert row.kl_mean == pytest.approx(worse.mean(), rel=1e-3)
        assert row.kl_p95 == pytest.approx(np.quantile(worse, 0.95), rel=1e-3)
        assert row.within == (row.kl_mean <= BUDGET)


def test_the_choice_is_the_best_of_those_measured_on_most_tokens(found):
    most = found.frame[found.frame["kl_tokens"] == found.frame["kl_tokens"].max()]
    within = most[most["within"]]
    row = within.loc[within["validation"].idxmax()]
    assert (found.layer, found.multiplier) == (row["layer"], row["multiplier"])
    assert (found.effect, found.low, found.high) == (row["effect"], row["low"], row["high"])
    assert found.frame["chosen"].sum() == 1
    assert len(found.question_effects) == 9
    assert float(found.question_effects.double().mean()) == pytest.approx(found.effect, abs=1e-6)


def test_the_ends_of_the_range_are_within_the_budget_and_little_more_is_not(tiny_chat, vectors, found):
    prompts = cut(tiny_chat, NEUTRAL[0], LADDER[-1].full[1])
    for end in found.range:
        kl = [kl_alone(tiny_chat, vectors[found.layer], factor * end, prompts).mean() for factor in (1, 1.06)]
        assert kl[0] <= BUDGET * (1 + 1e-3)
        assert kl[1] > BUDGET or abs(end) == 2
    assert found.range[0] < 0 < found.range[1]
    assert found.multiplier <= min(-found.range[0], found.range[1])


@pytest.mark.parametrize("make", [letters, words])
def test_the_choice_never_sees_the_pairs_that_report(tiny_chat, vectors, make):
    choosing, test = make(8), make(9, "others")
    one, other = (calibrated(tiny_chat, vectors, choosing, test=some) for some in (test, exchanged(test)))
    for name in ("layer", "multiplier", "range", "budget", "costs"):
        assert getattr(one, name) == getattr(other, name)
    same = ["layer", "multiplier", "validation", "kl_mean", "kl_p95", "within", "chosen"]
    pd.testing.assert_frame_equal(one.frame[same], other.frame[same], rtol=0, atol=1e-6)
    assert one.effect == pytest.approx(-other.effect, abs=1e-5)
    turned = calibrated(tiny_chat, vectors, exchanged(choosing), test=test)
    np.testing.assert_allclose(
        turned.frame.loc[turned.frame["swept"], "validation"],
        -one.frame.loc[one.frame["swept"], "validation"],
        atol=1e-5,
    )
    assert turned.layer != one.layer or turned.frame["validation"].max() < 0


def test_a_share_of_the_pairs_reports_and_the_split_is_that_of_the_set(tiny_chat, vectors):
    pairs = letters(32)
    found = calibrated(tiny_chat, vectors, pairs, layers=[2], multipliers=[-1, 1])
    choosing, test = pairs.split(test=0.5, seed=0)
    assert not found.cross_fitted
    assert found.settings["test_hash"] == test.content_hash
    assert found.settings["choosing_hash"] == choosing.content_hash
    alone = sweep(tiny_chat, test, vectors, layers=[2], multipliers=[-1, 0, 1], progress=False)
    pd.testing.assert_frame_equal(found.sweep.frame, alone.frame, rtol=0, atol=1e-5)


def test_its_sweep_is_that_of_the_test_questions_with_the_unsteered_model(tiny_chat, vectors, found):
    alone = sweep(tiny_chat, letters(9, "others"), vectors, multipliers=[-2, -1, 0, 1, 2], progress=False)
    pd.testing.assert_frame_equal(found.sweep.frame, alone.frame, rtol=0, atol=1e-5)
    assert found.sweep.unsteered == pytest.approx(alone.unsteered, abs=1e-6)
    assert len(steerability(found.sweep).frame) == 3 * 9
    assert found.sweep.plot().data


def test_few_pairs_all_choose_and_all_report(tiny_chat, vectors):
    pairs = letters(12)
    found = calibrated(tiny_chat, vectors, pairs)
    assert found.cross_fitted
    assert "12 pairs in folds, which report too" in repr(found)
    own = found.frame[found.frame["chosen"]]
    assert own["effect"].tolist() == [found.effect]
    assert found.frame.loc[~found.frame["chosen"], "effect"].isna().all()
    assert 0 <= found.chosen.agreeing <= 1
    assert found.sweep.frame["question"].nunique() == 12
    assert found.low < found.effect < found.high
    assert found.plot().data


def test_a_budget_that_nothing_meets_is_said_and_no_number_is_given(tiny_chat, vectors, tmp_path):
    found = calibrated(tiny_chat, vectors, letters(8), 1e-9, test=letters(8, "others"))
    assert (found.layer, found.multiplier, found.range, found.effect, found.low, found.high) == (None,) * 6
    assert found.verdict == "none within the budget"
    assert "Nothing is within the budget of 1e-09 nats a token" in repr(found)
    assert not found.frame["within"].any()
    assert found.summary().empty
    assert [one.multiplier for one in found.costs] == [0.0]
    assert found.plot().data
    again = Calibration.load(found.save(tmp_path / "found.parquet"))
    assert repr(again) == repr(found)


def test_a_budget_that_everything_meets_ends_with_what_was_swept(tiny_chat, vectors):
    found = calibrated(tiny_chat, vectors, letters(8), 1e9, test=letters(8, "others"))
    assert found.range == (-2.0, 2.0)
    assert found.frame["within"].all()
    assert found.frame["swept"].all()
    assert "from -2 to 2 (nothing larger was tried)" in found.text


@pytest.mark.parametrize(
    ("ends", "verdict", "words"),
    [
        ((0.1, 0.3), "steers", "moves answers by +0.200 [+0.100, +0.300] on the 9 questions that did not choose it"),
        ((-0.1, 0.3), "no effect found", "No effect was found"),
        ((-0.3, -0.1), "steers the wrong way", "It steers the wrong way"),
    ],
)
def test_the_sentence_says_what_the_interval_says(found, ends, verdict, words):
    chosen = replace(found.chosen, effect=sum(ends) / 2, low=ends[0], high=ends[1])
    planted = replace(found, chosen=chosen)
    assert planted.verdict == verdict
    assert words in planted.text
    assert verdict in repr(planted)


def test_a_cost_over_the_budget_on_other_prompts_is_said(found):
    assert "which is over it" not in replace(found, budget=1e3).text
    assert "which is over it" in replace(found, budget=1e-3).text


def test_costs_are_those_of_the_steered_model_on_other_prompts(tiny_chat, vectors, found):
    n_tokens = LADDER[-1].report[1]
    prompts = cut(tiny_chat, NEUTRAL[1], n_tokens)
    wanted = {0.0, *found.range, found.multiplier, -found.multiplier}
    assert {one.multiplier for one in found.costs} == wanted
    for cost in found.costs:
        steered = [] if cost.multiplier == 0 else [vectors[found.layer] * cost.multiplier]
        logp, loops = [], []
        for text in NEUTRAL[1]:
            prompt = default_format(tiny_chat).encode(tiny_chat.tokenizer, text)
            steps = [Intervention(vector=one) for one in steered]
            own = answered(tiny_chat, [prompt], tuple(steps), max_new_tokens=n_tokens, progress=False)[0].tokens
            tokens = torch.tensor([own])
            with torch.no_grad():
                plain = tiny_chat(tokens, attention_mask=torch.ones_like(tokens))[0].double().log_softmax(-1)
            logp += [float(plain[i - 1, own[i]]) for i in range(len(prompt), len(own))]
            text = tiny_chat.tokenizer.decode(own[len(prompt) :], skip_special_tokens=True)
            loops.append(1 - distinct(text, 4))
        assert cost.perplexity.value == pytest.approx(np.exp(-np.mean(logp)), rel=1e-3)
        assert cost.repetition.value == pytest.approx(np.nanmean(loops), abs=1e-9)
        if cost.multiplier:
            kl = kl_alone(tiny_chat, vectors[found.layer], cost.multiplier, prompts)
            assert cost.kl_mean.value == pytest.approx(kl.mean(), rel=1e-3)
            assert cost.kl_p95.value == pytest.approx(np.quantile(kl, 0.95), rel=1e-3)
    frame = found.costs_frame()
    assert list(frame["multiplier"]) == [one.multiplier for one in found.costs]


def test_intervals_over_prompts_are_scipys():
    by_prompt = list(np.random.default_rng(0).exponential(size=(20, 16)))
    own = over_prompts(by_prompt, np.mean, 0, n=4000)
    theirs = scipy.stats.bootstrap(
        (np.array(by_prompt).mean(1),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert own.value == pytest.approx(np.mean(by_prompt))
    np.testing.assert_allclose([own.low, own.high], [theirs.low, theirs.high], atol=0.015)
    assert over_prompts([np.zeros(0)], np.mean, 0).value is None


def test_what_was_saved_is_read_back_to_the_bit(found, tmp_path):
    again = Calibration.load(found.save(tmp_path / "found.parquet"))
    pd.testing.assert_frame_equal(again.frame, found.frame, check_exact=True)
    for name in ("logp_positive", "logp_negative", "question_effects"):
        torch.testing.assert_close(getattr(again, name), getattr(found, name), rtol=0, atol=0)
    for name in ("chosen", "costs", "budget", "layers", "multipliers", "settings", "provenance", "n_choosing"):
        assert getattr(again, name) == getattr(found, name)
    pd.testing.assert_frame_equal(again.sweep.frame, found.sweep.frame, check_exact=True)
    assert repr(again) == repr(found)


def test_the_same_again_is_the_same(tiny_chat, vectors, found):
    again = calibrated(tiny_chat, vectors, letters(8), test=letters(9, "others"))
    pd.testing.assert_frame_equal(again.frame, found.frame, check_exact=True)
    assert again.costs == found.costs


def test_a_fitted_method_is_calibrated_by_its_strengths(tiny_chat):
    method = instruction.fit(tiny_chat, OTHERS, layers=[1, 3], progress=False)
    found = calibrated(tiny_chat, method, letters(8), 1e3, test=letters(8, "others"), multipliers=[-1, 1])
    steps = [method.at([found.layer]).interventions(s) for s in (1.0, -1.0)]
    values = score_answers(tiny_chat, letters(8, "others"), steps, progress=False).values
    assert found.effect == pytest.approx(float((values[:, 0] - values[:, 1]).mean()), abs=1e-5)


def test_pairs_that_the_vectors_came_from_are_told_of_once(tiny_chat):
    pairs = letters(8)
    own = cl.extract(tiny_chat, pairs, layers=[2], progress=False)
    with pytest.warns(TrainingPairsWarning, match="8 of the 16 pairs scored") as caught:
        calibrated(tiny_chat, own, pairs, test=letters(8, "others"))
    assert sum(issubclass(one.category, TrainingPairsWarning) for one in caught) == 1


def test_work_is_counted_from_the_tokens_that_are_run(tiny_chat):
    for pairs in (letters(5), words(5)):
        fmt = default_format(tiny_chat)
        items = _encode(tiny_chat, pairs, fmt, None)
        neutral = [Prompt.of(tiny_chat, text) for text in NEUTRAL[0]]
        sizes = sizes_of(tiny_chat, pairs, neutral, fmt, None, 0.5)
        assert sizes.prefix == sum(item.branches[0].steer_start for item in items)
        assert sizes.suffix == sum(len(one) - one.steer_start for item in items for one in item.branches)
        for one, other in pairwise(LADDER):
            assert sizes.calibration(one, [1, 2], 4) > sizes.calibration(other, [1, 2], 4)
        assert lengths_for(sizes, [1, 2], 4, 1e9) == LADDER[0]
        assert lengths_for(sizes, [1, 2], 4, 1e-9) == LADDER[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget must be above 0, got 0"),
        ({"budget": -0.1}, "budget must be above 0, got -0.1"),
        ({"price": 0}, "price must be above 0"),
        ({"layers": []}, "no layers given"),
        ({"multipliers": [1, 2, -1]}, "must come with its negative, got .* without -2"),
        ({"multipliers": [0]}, "must come with its negative"),
        ({"pairs": letters(7)}, "got 7 pairs: of fewer than 8 nothing can be chosen honestly"),
        ({"pairs": letters(12), "test": 5}, "7 pairs would choose, expected at least 8"),
        ({"test": letters(5, "others")}, "5 pairs would report, expected at least 8"),
        ({"test": letters(8)}, "8 pairs are there twice"),
        ({"test": words(8)}, "got ab to choose on and completions to report"),
        (
            {"pairs": words(8), "test": words(8, "o"), "neutral": (["Say words 3."], ["Why?"])},
            "neutral questions are questions of the pairs",
        ),
    ],
)
def test_bad_input_is_told_with_what_to_give(tiny_chat, vectors, change, message):
    given = {"pairs": letters(8), "budget": BUDGET, "test": letters(8, "others")} | change
    if change.get("pairs") == letters(7):
        given["test"] = 0.5
    pairs, budget = given.pop("pairs"), given.pop("budget")
    with pytest.raises(ValueError, match=message):
        calibrated(tiny_chat, vectors, pairs, budget, **given)


def test_the_figure_shows_all_candidates_the_budget_and_the_choice(found):
    figure = found.plot()
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) == found.frame["swept"].sum() + (
        0 if found.multiplier in (1.0, 2.0) else 1
    )
    star = next(trace for trace in figure.data if trace.name.startswith("chosen"))
    assert (star.y[0], star.x[0]) == (found.effect, found.frame.loc[found.frame["chosen"], "kl_mean"].item())
    assert figure.layout.shapes[0].x0 == BUDGET
