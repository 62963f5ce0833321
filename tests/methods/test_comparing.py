"""Comparing methods: the rules of a fair comparison, its numbers against slow twins, its arithmetic on made-up data."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.measures.divergence import answered, token_kl
from caa_lens.measures.elsewhere.neutral_text import OF_TEXT
from caa_lens.methods.candidates import Candidate, named_candidates
from caa_lens.methods.compared import Choice, Comparison, matched
from caa_lens.methods.comparing import compare
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.interventions import Intervention

pytestmark = pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
WORDS = ("Be cheerful about it.", "Be gloomy about it all.")
NEUTRAL = (["Why?", "Name a bird."], ["How are pencils made?", "What is a noun?"])


def pairs_of(n, first=0):
    return ContrastSet.from_pairs(
        [(f"How was day {i}?", f"Lovely, and warm {i}.", f"Bad, and so long {i}.") for i in range(first, first + n)],
        name="days",
    )


def n_letters(text):
    return float(sum(map(str.isalpha, text)))


TRAIN, TEST = pairs_of(8), pairs_of(5, 20)
QUICK = {"words": WORDS, "neutral": NEUTRAL, "n_tokens": 4, "progress": False}


@pytest.fixture(scope="module")
def every(tiny_chat):
    names = ["CAA", "ActAdd", "Linear-AcT", "instruction", "instruction, original", "BiPO", "SADI", "SADI, original"]
    options = {"epochs": 1, "learning_rate": 0.05, "progress": False}
    names += ["InferAligner", "BiPO, original"]
    return compare(tiny_chat, TRAIN, TEST, names, layers=[1, 3], bipo_options=options, check=n_letters, **QUICK)


def test_every_method_and_every_control_is_in_the_frame_once_a_question(every):
    counts = every.frame.groupby(["method", "strength"])["question"].nunique()
    assert (counts == len(TEST)).all()
    assert len(every.frame) == len(TEST) * len(counts)
    assert {"no steering", "in words", "random", "CAA", "SADI, original"} <= set(every.frame["method"])
    per_method = every.frame[every.frame["method"].isin(every.methods)].groupby("method")["strength"].nunique()
    assert set(per_method) == {8}
    nothing = every.frame[every.frame["method"] == "no steering"]
    assert (nothing["effect"] == 0).all()
    assert (nothing["kl_mean"] == 0).all()
    assert set(every.frame[every.frame["method"] == "instruction, original"]["positions"]) == {"all"}
    assert set(every.frame[every.frame["method"] == "SADI, original"]["site"]) == {"attn.hook_z"}


def test_scores_and_divergences_are_those_of_each_condition_by_itself(tiny_chat, every):
    fit_on, _ = TRAIN.split(test=0.25, seed=0)
    rows = every.frame[(every.frame["method"] == "CAA") & (every.frame["strength"] == 2.0)]
    layer = int(rows["setting"].iloc[0])
    vector = cl.extract(tiny_chat, fit_on, layers=[layer], progress=False)[layer]
    condition = (Intervention(vector=vector, multiplier=2.0),)
    scores = score_answers(tiny_chat, TEST, [(), condition], progress=False).values
    assert list(rows["score"]) == pytest.approx(scores[:, 1].tolist(), abs=1e-5)
    assert list(rows["effect"]) == pytest.approx((scores[:, 1] - scores[:, 0]).tolist(), abs=1e-5)
    prompts = [Prompt.of(tiny_chat, question) for question in NEUTRAL[1]]
    texts = answered(tiny_chat, prompts, max_new_tokens=4, progress=False)
    kl = torch.cat(token_kl(tiny_chat, texts, [condition], progress=False), dim=1)
    assert rows["kl_mean"].iloc[0] == pytest.approx(float(kl.mean()), rel=1e-3)
    steered = answered(tiny_chat, prompts, condition, max_new_tokens=4, progress=False)
    kl = torch.cat(token_kl(tiny_chat, steered, [condition], weighed_by="steered", progress=False), dim=1)
    assert rows["kl_steered"].iloc[0] == pytest.approx(float(kl.mean()), rel=1e-3)


def test_the_instruction_in_words_is_scored_as_a_system_prompt(tiny_chat, every):
    rows = every.frame[(every.frame["method"] == "in words") & (every.frame["strength"] == -1.0)]
    told = score_answers(tiny_chat, TEST, [()], system=WORDS[1], progress=False).values[:, 0]
    assert list(rows["score"]) == pytest.approx(told.tolist(), abs=1e-5)
    assert rows["kl_mean"].iloc[0] > 0


def test_the_chosen_layer_is_the_best_of_the_validation_part_and_the_test_part_has_no_say(tiny_chat, every):
    for choice in every.choices:
        assert choice.setting == max(choice.tried, key=lambda one: one[1])[0]
        assert len(choice.tried) == 2
    given = QUICK | {"neutral": (NEUTRAL[0], ["Who was that?"])}  # nor have the questions that are reported
    other = compare(tiny_chat, TRAIN, pairs_of(4, 40), ["CAA"], layers=[1, 3], steered_text="none", **given)
    assert other.choices[0] == every.choices[0]


def test_the_random_direction_has_caas_norm_and_another_seed_another_direction(tiny_chat):
    known = named_candidates(WORDS, n_settings=1)
    norms, directions = [], []
    for name, seed in (("CAA", 0), ("random", 0), ("random", 0), ("random", 1)):
        vector = known[name].fit(tiny_chat, TRAIN, [2], seed)[2]
        norms.append(float(vector.direction.norm()))
        directions.append(vector.direction)
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)
    assert torch.equal(directions[1], directions[2])
    assert not torch.allclose(directions[1], directions[3])


def test_linear_act_has_a_map_for_each_sign_and_the_set_goes_to_the_means_of_each_side(tiny_chat):
    known = named_candidates(WORDS, n_settings=1)
    maps = known["Linear-AcT"].fit(tiny_chat, TRAIN, [2], 0)[2]
    up, down = (known["Linear-AcT"].at(maps, s)[0] for s in (0.5, -0.5))
    assert (up.multiplier, down.multiplier) == (0.5, 0.5)
    assert not torch.allclose(up.parameters["shift"], down.parameters["shift"])
    fitted = known["instruction"].fit(tiny_chat, TRAIN, [2], 0)[2]
    above, below = float(fitted.with_it[0]), float(fitted.without_it[0])
    goals = [float(known["instruction"].at(fitted, s)[0].parameters["target"]) for s in (1.0, -1.0, 2.0, -2.0)]
    assert goals == pytest.approx([above, below, 2 * above - below, 2 * below - above], rel=1e-4)


def test_what_is_said_of_steered_text_is_of_the_answers_to_neutral_questions(tiny_chat, every):
    prompts = [Prompt.of(tiny_chat, question) for question in NEUTRAL[1]]
    texts = {"no steering": answered(tiny_chat, prompts, max_new_tokens=4, progress=False)}
    told = [Prompt.of(tiny_chat, question, system=WORDS[0]) for question in NEUTRAL[1]]
    texts["in words"] = answered(tiny_chat, told, max_new_tokens=4, progress=False)
    for name, some in texts.items():
        row = every.frame[(every.frame["method"] == name) & (every.frame["strength"] >= 0)].iloc[0]
        answers = [tiny_chat.tokenizer.decode(one.tokens[one.answer_start :]) for one in some]
        assert row["checked"] == pytest.approx(np.mean([n_letters(one) for one in answers]))
    # Slowly: log p of the same tokens behind both prompts, from whole forwards.
    row = every.frame[(every.frame["method"] == "in words") & (every.frame["strength"] == 1)].iloc[0]
    kl, logp = [], []
    for plain, one in zip(prompts, texts["in words"], strict=True):
        answer = one.tokens[one.answer_start :]
        p, q = (
            tiny_chat(torch.tensor([[*prompt.tokens[: prompt.answer_start], *answer]]))[0]
            .log_softmax(-1)[prompt.answer_start - 1 : -1]
            .double()
            for prompt in (one, plain)
        )
        kl.append((p.exp() * (p - q)).sum(-1).detach())
        logp.append(q.gather(-1, torch.tensor(answer)[:, None])[:, 0].detach())
    assert row["kl_steered"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert row["perplexity"] == pytest.approx(float((-torch.cat(logp).mean()).exp()), rel=1e-3)
    nothing = every.frame[every.frame["method"] == "no steering"].iloc[0]
    assert (nothing["kl_steered"], nothing["checked_low"] <= nothing["checked"] <= nothing["checked_high"]) == (0, True)


def test_text_of_the_chosen_strengths_is_the_same_as_if_all_were_asked_for(tiny_chat, every):
    some = compare(tiny_chat, TRAIN, TEST, ["CAA"], layers=[1, 3], steered_text="chosen", **QUICK)
    chosen = {(one.method, s) for one in some.choices for s in (one.up, one.down)}
    rows = some.curves(n_resamples=0).set_index(["method", "strength"])
    for key, row in rows.iterrows():
        asked_for = key in chosen or key[0] in ("no steering", "in words")
        assert math.isnan(row["kl_steered"]) != asked_for
    full = every.curves(n_resamples=0).set_index(["method", "strength"])
    for key in chosen & set(full.index):
        assert rows.loc[key, "kl_steered"] == pytest.approx(full.loc[key, "kl_steered"], rel=1e-3)


def test_methods_are_fitted_in_the_prompt_format_that_is_scored(tiny_chat):
    """A format of its own gives other vectors than the model's."""
    given = {"layers": [1], "prompt_format": "llama2-base", "steered_text": "none", **QUICK}
    found = compare(tiny_chat, TRAIN, TEST, ["CAA"], **given).frame
    rows = found[(found["method"] == "CAA") & (found["strength"] == 2.0)]
    fit_on, _ = TRAIN.split(test=0.25, seed=0)
    vector = cl.extract(tiny_chat, fit_on, layers=[1], prompt_format="llama2-base", progress=False)[1]
    condition = (Intervention(vector=vector, multiplier=2.0),)
    scores = score_answers(tiny_chat, TEST, [condition], prompt_format="llama2-base", progress=False).values
    assert list(rows["score"]) == pytest.approx(scores[:, 0].tolist(), abs=1e-5)


def test_inferaligner_is_compared_with_its_gate_open_and_the_original_instruction_with_words(tiny_chat):
    known = named_candidates(WORDS, n_settings=1)
    fitted = known["InferAligner"].fit(tiny_chat, TRAIN, [2], 0)[2]
    (one,) = known["InferAligner"].at(fitted, 2.0)
    assert one.gate is None
    questions = [pair.question for pair in TRAIN]
    resid = [
        torch.stack([last_stream(tiny_chat, f"{question} {words}") for question in questions]).mean(0)
        for words in WORDS
    ]
    torch.testing.assert_close(one.parameters["direction"], resid[0] - resid[1], atol=1e-4, rtol=1e-4)
    both = known["instruction, original"].fit(tiny_chat, TRAIN, [2], 0)[2]
    up, down = (known["instruction, original"].at(both, s)[0] for s in (1.0, -1.0))
    assert up.where == down.where == "all"
    plain = torch.stack([last_stream(tiny_chat, question) for question in questions]).mean(0)
    for told, found in zip(resid, (up, down), strict=True):
        unit = (told - plain) / (told - plain).norm()
        torch.testing.assert_close(found.parameters["direction"], unit, atol=1e-3, rtol=1e-3)
        assert float(found.parameters["target"]) == pytest.approx(float(told @ unit), rel=1e-3)


def last_stream(model, text):
    prompt = Prompt.of(model, text)
    _, cache = model.run_with_cache(torch.tensor([prompt.tokens]), names_filter="blocks.2.hook_resid_post")
    return cache["blocks.2.hook_resid_post"][0, -1]


def test_a_comparison_comes_back_from_its_file_and_draws_and_sums_up(every, tmp_path):
    again = Comparison.load(every.save(tmp_path / "compared.parquet"))
    pd.testing.assert_frame_equal(again.frame, every.frame)
    assert again.choices == every.choices
    assert again.costs == every.costs
    assert len(every.plot().data) == 2 + 2 * len(every.methods)
    assert list(every.summary()["method"].unique()) == list(every.methods)
    assert "\n" not in repr(every)


def test_costs_say_what_is_kept_and_changed(every, tiny_chat):
    costs = {one.method: one for one in every.costs}
    assert costs["CAA"].numbers == 32
    assert costs["Linear-AcT"].numbers == 64
    assert costs["instruction"].numbers == 33
    assert costs["CAA"].forward == 2 * 6
    assert costs["BiPO"].backward == 2 * 6
    assert costs["CAA"].shares_prefix
    assert not costs["instruction, original"].shares_prefix
    assert not costs["SADI, original"].shares_prefix
    assert costs["instruction, original"].tokens == 1.0
    assert 0 < costs["CAA"].tokens < 1
    assert 0 < costs["SADI, original"].coordinates < 1


# ---- at the same divergence, on made-up numbers ----------------------------------------------------------------------


def made_up(curves, n=40, noise=0.1):
    """`curves`: method to (strengths, kl, effect); questions differ by noise that all methods share."""
    draw, rows = np.random.default_rng(0), []
    shared = noise * draw.standard_normal(n)
    for name, (strengths, kl, effects) in curves.items():
        for s, k, e in zip(strengths, kl, effects, strict=True):
            rows.append(
                pd.DataFrame(
                    {
                        "method": name,
                        "setting": 3,
                        "positions": "caa",
                        "site": "hook_resid_post",
                        "strength": s,
                        "question": np.arange(n),
                        "score": e + shared,
                        "effect": e + shared,
                        "kl_mean": k,
                        "kl_p95": 2 * k,
                        "behavior": "made up",
                        "layers": "3",
                        **dict.fromkeys(OF_TEXT, math.nan),
                    }
                )
            )
    choice = Choice(method="CAA", setting=3, unit="layer", value=0.0, tried=((3, 0.0),), up=1.0, down=-1.0)
    return Comparison(frame=pd.concat(rows, ignore_index=True), choices=(choice,), costs=(), metric="margin")


CURVES = {
    "CAA": ([-2.0, -1.0, 1.0, 2.0], [0.16, 0.04, 0.04, 0.16], [-0.8, -0.4, 0.4, 0.8]),
    "set": ([-2.0, -1.0, 1.0, 2.0], [0.16, 0.04, 0.01, 0.64], [-0.8, -0.4, 0.5, 1.1]),
}


def test_effects_at_a_budget_are_linear_in_the_logarithm_of_the_divergence():
    table = made_up(CURVES, noise=0).at_kl([0.08]).set_index(["method", "sign"])
    share = math.log(0.08 / 0.04) / math.log(0.16 / 0.04)
    assert table.loc[("CAA", 1), "effect"] == pytest.approx(0.4 + share * 0.4)
    assert table.loc[("CAA", -1), "effect"] == pytest.approx(-0.4 - share * 0.4)
    share = math.log(0.08 / 0.01) / math.log(64)
    assert table.loc[("set", 1), "effect"] == pytest.approx(0.5 + share * 0.6)
    assert table.loc[("set", 1), "strength"] == pytest.approx(1 + share)


def test_a_swept_divergence_gives_the_swept_effect():
    table = made_up(CURVES, noise=0).at_kl([0.04, 0.16]).set_index(["kl", "method", "sign"])
    assert table.loc[(0.04, "CAA", 1), "effect"] == pytest.approx(0.4)
    assert table.loc[(0.16, "CAA", 1), "effect"] == pytest.approx(0.8)


def test_below_the_weakest_strength_the_effect_goes_to_nothing_as_the_root_of_the_divergence():
    """Strength 0 is the identity, so that its effect and its divergence are known: 0."""
    table = made_up(CURVES, noise=0).at_kl([0.01]).set_index(["method", "sign"])
    row = table.loc[("CAA", -1)]
    assert row["reached"]
    assert (row["strength"], row["at"]) == (-0.5, 0.01)  # half the strength at a quarter of the divergence
    assert row["effect"] == pytest.approx(-0.2)


def test_nothing_is_extrapolated_beyond_the_end_of_a_methods_range():
    table = made_up(CURVES, noise=0).at_kl([0.3]).set_index(["kl", "method", "sign"])
    beyond = table.loc[(0.3, "CAA", 1)]
    assert not beyond["reached"]
    assert (beyond["strength"], beyond["at"]) == (2.0, 0.16)
    assert beyond["effect"] == pytest.approx(0.8)
    assert math.isnan(table.loc[(0.3, "set", 1), "more"])  # the reference does not get there
    assert table.loc[(0.3, "set", 1), "reached"]
    summary = made_up(CURVES, noise=0).summary().set_index(["method", "sign"])
    assert math.isnan(summary.loc[("CAA", 1), 0.3])
    assert summary.loc[("CAA", 1), "end_kl"] == 0.16
    assert summary.loc[("CAA", 1), "end_effect"] == pytest.approx(0.8)
    printed = made_up(CURVES, noise=0).table(n_resamples=100).set_index(["method", "sign"])
    assert printed.loc[("CAA", "+"), "KL 0.3"] == "+0.80 [+0.80, +0.80] ends at 0.16"
    assert printed.loc[("set", "+"), "KL 0.1"].count("ends") == 0


def test_differences_between_methods_are_paired_by_question():
    """All methods share the questions' noise, so a difference has none of it, however wide each interval is."""
    table = made_up(CURVES, noise=2.0).at_kl([0.08]).set_index(["method", "sign"])
    row = table.loc[("set", 1)]
    assert row["high"] - row["low"] > 0.5
    assert row["more_high"] - row["more_low"] < 1e-9
    assert row["more"] == pytest.approx(0.5 + math.log(8) / math.log(64) * 0.6 - 0.6)


def test_where_a_divergence_falls_again_the_first_crossing_counts():
    found = matched([1.0, 2.0, 3.0, 4.0], [0.1, 0.3, 0.05, 0.4], np.array([[1.0, 2.0, 3.0, 4.0]]), 0.2)
    assert 1 < found.strength < 2
    assert found.reached


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_methods_that_are_tuned_more_often_than_others_are_refused(tiny_chat):
    known = named_candidates(WORDS, n_settings=1)["CAA"]
    more = Candidate(name="more", fit=known.fit, at=known.at, strengths=(-2.0, -1.0, -0.5, 0.5, 1.0))
    with pytest.raises(ValueError, match="'CAA' has 8 strengths and 'more' has 5: a method that is tuned more often"):
        compare(tiny_chat, TRAIN, TEST, ["CAA", more], layers=[1], **QUICK)
    more = Candidate(name="more", fit=known.fit, at=known.at, settings=(1, 2, 3))
    with pytest.raises(ValueError, match="'more' has 3 settings and 'CAA' has 1"):
        compare(tiny_chat, TRAIN, TEST, ["CAA", more], layers=[1], **QUICK)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": ["CAB"]}, ValueError, "unknown method 'CAB': expected some of CAA, random"),
        ({"methods": ["activation scaling"]}, ValueError, "tied to the positions of prompts of one length"),
        ({"methods": ["CAA", "CAA"]}, ValueError, "'CAA' is there twice"),
        ({"methods": "CAA"}, TypeError, "expected a list of methods"),
        ({"test": TRAIN}, ValueError, "of the 8 test pairs are among those that are fitted on"),
        ({"validation": TRAIN}, ValueError, "8 pairs to choose on are among those that are fitted on"),
        ({"words": ("Be cheerful.", "")}, TypeError, "words must be two texts"),
        ({"neutral": ([], ["Why?"])}, ValueError, "no neutral questions to choose on given"),
        ({"neutral": (["Why?", "How?"], ["  why?", "Who?"])}, ValueError, "1 neutral questions are both chosen on and"),
        ({"neutral": (["Why?"], ["How?", "How?"])}, ValueError, "a neutral question to report is there twice"),
        ({"neutral": (["Why?"], ["How was day 3?"])}, ValueError, "'how was day 3.' among them, and methods are fitt"),
        ({"neutral": (["how was day 20?"], ["Why?"])}, ValueError, "1 neutral questions are questions of the pairs"),
        ({"steered_text": "some"}, ValueError, "unknown steered_text='some': expected one of all, chosen, none"),
        ({"budgets": [0.1, 0]}, ValueError, "budgets and choose_at are divergences above 0 nats"),
        ({"choose_at": 0}, ValueError, "budgets and choose_at are divergences above 0 nats"),
        ({"neutral": ("Why?", "How?")}, TypeError, "neutral must be two lists of questions"),
        ({"layers": [9]}, ValueError, "layer 9 is out of range"),
    ],
)
def test_bad_input_is_told_with_what_to_give(tiny_chat, change, error, message):
    given = {"test": TEST, "methods": ["CAA"], "layers": [1], **QUICK} | change
    test, methods = given.pop("test"), given.pop("methods")
    with pytest.raises(error, match=message):
        compare(tiny_chat, TRAIN, test, methods, **given)


def test_strengths_of_a_candidate_ascend_and_have_both_signs():
    for strengths in ((1.0, 2.0), (-1.0, 0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="x: strengths must ascend, differ, leave out 0 and have both signs"):
            Candidate(name="x", fit=lambda *a: {}, at=lambda *a: (), strengths=strengths)


def test_a_reference_that_was_not_compared_and_a_budget_of_nothing_are_refused():
    for given, message in (({"reference": "BiPO"}, "'BiPO' was not compared"), ({"budgets": [0]}, "above 0 nats")):
        with pytest.raises(ValueError, match=message):
            made_up(CURVES).at_kl(**given)
