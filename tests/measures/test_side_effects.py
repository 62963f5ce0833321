"""Side effects: each number beside the slow and obvious way to it, with plain hooks; laws; what is refused.

Values of other types are refused in `tests/test_odd_arguments.py`, since types are checked here.
"""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers.models import random_vectors
from helpers.twins import plain_forward, twin_score
from torch.testing import assert_close

from caa_lens.contrast.files import bundled_names
from caa_lens.contrast.sets import ContrastSet, load_open_ended
from caa_lens.measures.divergence import answered, token_kl
from caa_lens.measures.elsewhere import capability as capability_module
from caa_lens.measures.elsewhere.answer_texts import answered_under
from caa_lens.measures.elsewhere.capability import capability_sets, easy_questions
from caa_lens.measures.elsewhere.changes import paired_share_interval, resampled
from caa_lens.measures.elsewhere.neutral import CHOOSING, REPORTING
from caa_lens.measures.elsewhere.neutral_text import distinct_questions, neutral_questions
from caa_lens.measures.elsewhere.refusals import HARMLESS, refuses
from caa_lens.measures.elsewhere.unwanted_changes import SideEffects, _random_vectors, side_effects
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.open_ended.text_measures import distinct
from caa_lens.measures.training_pairs import TrainingPairsWarning
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import PAIR_HASHES
from caa_lens.steering.interventions import Intervention

N_TOKENS, N_RANDOM, LAYER, MULTIPLIER = 6, 2, 2, 1.5
NEUTRAL = REPORTING[:9]
REQUESTS = HARMLESS[:8]
EASY = easy_questions()[:10]
LETTERS = ContrastSet.from_pairs(
    [
        (f"Is {what} wet?\n (A) Yes\n (B) No", *(("(A)", "(B)"), ("(B)", "(A)"))[i % 2])
        for i, what in enumerate("abcdefgh")
    ],
    name="letters",
)
QUICK = {
    "neutral": NEUTRAL,
    "requests": REQUESTS,
    "capability": {"easy": EASY, "letters": LETTERS},
    "n_tokens": N_TOKENS,
    "n_random": N_RANDOM,
    "n_resamples": 200,
    "progress": False,
}


@pytest.fixture(scope="module", autouse=True)
def an_end_that_is_met(tiny_chat):
    """A random model's answers never end, so a token that ends about half of them is the end of the text here."""
    tokenizer, before = tiny_chat.tokenizer, tiny_chat.tokenizer.eos_token
    answers = [set(greedy(tiny_chat, question, None)[1][1:4]) for question in NEUTRAL]
    counts = Counter(token for answer in answers for token in answer)
    token = min(counts, key=lambda one: (abs(counts[one] - len(NEUTRAL) / 2), one))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    assert tokenizer.eos_token_id == token
    yield
    tokenizer.eos_token = before


@pytest.fixture(scope="module")
def vectors(tiny_chat):
    return random_vectors(tiny_chat, scale=1.5)


@pytest.fixture(scope="module")
def found(tiny_chat, vectors):
    others = {"other": random_vectors(tiny_chat, seed=5), "same": vectors}
    tests = {"tests": easy_questions()[20:30]}
    return side_effects(tiny_chat, vectors[LAYER], MULTIPLIER, others=others, other_tests=tests, **QUICK)


def row_of(found, measure, of):
    rows = found.frame[(found.frame["measure"] == measure) & (found.frame["of"] == of)]
    assert len(rows) == 1
    return rows.iloc[0]


def steps_of(vectors):
    """The step that each condition adds: none, the vector, and each random direction."""
    randoms = _random_vectors(vectors[LAYER], N_RANDOM, 0)
    return [None, *(MULTIPLIER * one.direction for one in (vectors[LAYER], *randoms))]


def greedy(model, question, step):
    """(prompt, new tokens) by whole forwards with a plain hook, one text at a time."""
    prompt, new = Prompt.of(model, question), []
    for _ in range(N_TOKENS):
        hooks = [] if step is None else [(LAYER, step, prompt.steer_start)]
        new.append(int(plain_forward(model, (*prompt.tokens, *new), hooks)[-1].argmax()))
        if new[-1] == model.tokenizer.eos_token_id:
            break
    return prompt, new


def logp_by_hand(model, prompt, new, step):
    """`[pos d_vocab]` where the answer's tokens are predicted, float64."""
    hooks = [] if step is None else [(LAYER, step, prompt.steer_start)]
    logits = plain_forward(model, (*prompt.tokens, *new), hooks)
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.fixture(scope="module")
def by_hand(tiny_chat, vectors):
    """Every condition's answers, `[condition][question]`."""
    questions = (*NEUTRAL, *REQUESTS)
    return [[greedy(tiny_chat, question, step) for question in questions] for step in steps_of(vectors)]


def check_row(row, values, atol=1e-4):
    """`values` are of all conditions: without steering, with it, random ones."""
    plain, steered, *randoms = values
    changes = [one - plain for one in randoms]
    assert_close(row["unsteered"], plain, atol=atol, rtol=1e-4)
    assert_close(row["steered"], steered, atol=atol, rtol=1e-4)
    assert_close(row["change"], steered - plain, atol=atol, rtol=1e-3)
    assert_close(row["random"], sum(changes) / len(changes), atol=atol, rtol=1e-3)
    assert_close(row["random_low"], min(changes), atol=atol, rtol=1e-3)
    assert_close(row["random_high"], max(changes), atol=atol, rtol=1e-3)


# ---- each number by hand --------------------------------------------------------------------------------------


def test_answers_under_all_conditions_at_once_are_those_of_whole_forwards(tiny_chat, found, by_hand):
    texts = found.texts
    for side, condition in (("unsteered", 0), ("steered", 1)):
        expected = [tiny_chat.tokenizer.decode(new, skip_special_tokens=True) for _, new in by_hand[condition]]
        assert list(texts[side]) == expected
    assert list(texts["group"]) == ["neutral"] * len(NEUTRAL) + ["harmless"] * len(REQUESTS)
    assert (texts["steered"] != texts["unsteered"]).sum() > len(texts) / 2
    assert len({len(new) for _, new in by_hand[0]}) > 1  # some end before the limit


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_of_any_size_give_the_answers_of_each_condition_alone(tiny_chat, vectors, batch_size):
    prompts = [Prompt.of(tiny_chat, question) for question in NEUTRAL[:4]]
    conditions = [(), (Intervention(vector=vectors[1]),), (Intervention(vector=vectors[3], multiplier=-2.0),)]
    together = answered_under(tiny_chat, prompts, conditions, n_tokens=4, batch_size=batch_size, progress=False)
    for some, condition in zip(together, conditions, strict=True):
        alone = answered(tiny_chat, prompts, condition, max_new_tokens=4, progress=False)
        assert [one.tokens for one in some] == [one.tokens for one in alone]
        assert [one.answer_start for one in some] == [one.answer_start for one in alone]


def test_divergence_is_the_mean_and_the_percentile_over_all_tokens(tiny_chat, vectors, found, by_hand):
    means, percentiles = [], []
    for step in steps_of(vectors):
        tokens = []
        for prompt, new in by_hand[0][: len(NEUTRAL)]:
            p, q = (logp_by_hand(tiny_chat, prompt, new, one) for one in (None, step))
            tokens += (p.exp() * (p - q)).sum(-1).tolist()
        means.append(float(np.mean(tokens)))
        percentiles.append(float(np.percentile(tokens, 95)))
    check_row(row_of(found, "KL", "neutral questions"), means)
    check_row(row_of(found, "KL, 95th percentile", "neutral questions"), percentiles)
    assert means[1] > 0.01


def test_texts_are_measured_one_by_one(tiny_chat, found, by_hand):
    eos = tiny_chat.tokenizer.eos_token_id
    lengths, limits, loops, perplexities = [], [], [], []
    for some in by_hand:
        some = some[: len(NEUTRAL)]
        lengths.append(float(np.mean([sum(token != eos for token in new) for _, new in some])))
        limits.append(float(np.mean([eos not in new for _, new in some])))
        loops.append([1 - distinct(tiny_chat.tokenizer.decode(new, skip_special_tokens=True), 4) for _, new in some])
        logp = [
            logp_by_hand(tiny_chat, prompt, new, None)[i, token].item()
            for prompt, new in some
            for i, token in enumerate(new)
        ]
        perplexities.append(math.exp(-np.mean(logp)))
    check_row(row_of(found, "length", "neutral questions"), lengths)
    check_row(row_of(found, "at the limit", "neutral questions"), limits)
    check_row(row_of(found, "perplexity", "neutral questions"), perplexities, atol=perplexities[0] * 1e-4)
    known = [i for i in range(len(NEUTRAL)) if np.isfinite([loops[0][i], loops[1][i]]).all()]
    row = row_of(found, "repetition", "neutral questions")
    check_row(row, [float(np.mean([0 if np.isnan(one[i]) else one[i] for i in known])) for one in loops])
    assert row["n"] == len(known) > 0


@pytest.mark.parametrize(("name", "pairs"), [("easy", EASY), ("letters", LETTERS)])
def test_capability_is_scored_pair_by_pair(tiny_chat, vectors, found, name, pairs):
    scores = [
        torch.stack(
            [torch.as_tensor(one) for one in twin_score(tiny_chat, pairs, [] if step is None else [(LAYER, step)])]
        )
        for step in steps_of(vectors)
    ]
    metric, even = ("margin", 0.0) if pairs.kind == "completions" else ("p_matching", 0.5)
    check_row(row_of(found, metric, name), [float(one.double().mean()) for one in scores])
    check_row(row_of(found, "accuracy", name), [float((one > even).double().mean()) for one in scores])


def test_other_behaviors_have_their_cosine_and_the_change_of_their_scores(tiny_chat, vectors, found):
    row = row_of(found, "cosine", "other")
    other = random_vectors(tiny_chat, seed=5)[LAYER].direction
    cosines = [torch.nn.functional.cosine_similarity(step, other, dim=0).item() for step in steps_of(vectors)[1:]]
    assert_close(row["change"], cosines[0], atol=1e-6, rtol=0)
    assert_close(row["random"], np.mean(cosines[1:]).item(), atol=1e-6, rtol=0)
    assert np.isnan([row["low"], row["high"], row["unsteered"], row["steered"]]).all()
    assert row["interval"] == ""
    assert row_of(found, "cosine", "same")["change"] == pytest.approx(1)
    scores = [
        float(
            torch.stack([torch.as_tensor(v) for v in twin_score(tiny_chat, easy_questions()[20:30], s)]).double().mean()
        )
        for s in ([] if step is None else [(LAYER, step)] for step in steps_of(vectors))
    ]
    check_row(row_of(found, "margin", "tests"), scores)


def test_the_cosine_is_of_what_is_added(tiny_chat, vectors):
    options = {**QUICK, "capability": {}, "requests": [], "others": {"same": vectors}}
    assert row_of(side_effects(tiny_chat, vectors[LAYER], -1, **options), "cosine", "same")["change"] == pytest.approx(
        -1
    )


def test_refusals_are_counted_by_request(tiny_chat, vectors, monkeypatch):
    """A random model refuses nothing, so a letter is a refusal here."""
    from caa_lens.measures.elsewhere import unwanted_changes

    monkeypatch.setattr(unwanted_changes, "refuses", lambda text: "e" in text)
    found = side_effects(tiny_chat, vectors[LAYER], MULTIPLIER, **{**QUICK, "capability": {}})
    texts = found.texts[found.texts["group"] == "harmless"]
    row = row_of(found, "refused", "harmless requests")
    before, after = (texts[side].str.contains("e").to_numpy() for side in ("unsteered", "steered"))
    assert row["n"] == len(REQUESTS)
    assert (row["unsteered"], row["steered"]) == (before.mean(), after.mean())
    assert (row["low"], row["high"]) == pytest.approx(paired_share_interval(before, after))


# ---- intervals ------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_librarys_and_scipys():
    values = np.random.default_rng(0).exponential(size=30)
    ours = resampled(lambda some: float(values[some].mean()), 30, n_resamples=500, seed=3)
    (low,), (high,) = bootstrap_interval(values[:, None], n_resamples=500, seed=3)
    np.testing.assert_allclose(ours, (low, high), rtol=1e-12)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=8000, rng=1).confidence_interval
    ours = resampled(lambda some: float(values[some].mean()), 30, n_resamples=8000)
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_the_interval_of_a_ratio_of_sums_is_scipys():
    """As the mean over all tokens is, where answers differ in length."""
    rng = np.random.default_rng(0)
    sums, counts = rng.exponential(size=25), rng.integers(5, 30, size=25)
    ours = resampled(lambda some: float(sums[some].sum() / counts[some].sum()), 25, n_resamples=8000)
    theirs = scipy.stats.bootstrap(
        (sums, counts),
        lambda a, b: a.sum() / b.sum(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=8000,
        rng=1,
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, rtol=0.04)


def test_the_intervals_of_the_table_are_paired(tiny_chat, vectors, found):
    """Of questions resampled whole: the same ones with and without steering."""
    steps = [[], [(LAYER, steps_of(vectors)[1])]]
    before, after = (torch.stack([torch.as_tensor(v) for v in twin_score(tiny_chat, EASY, s)]).double() for s in steps)
    (low,), (high,) = bootstrap_interval((after - before).numpy()[:, None], n_resamples=200, seed=0)
    row = row_of(found, "margin", "easy")
    assert row["interval"] == "bootstrap"
    np.testing.assert_allclose([row["low"], row["high"]], [low, high], atol=1e-5)


def test_paired_shares_have_newcombes_interval_of_the_published_example():
    """Newcombe 1998, table III, method 10: of 50 pairs 12 change one way and 2 the other, 36 being right both times."""
    before = [True] * 36 + [True] * 12 + [False] * 2
    after = [True] * 36 + [False] * 12 + [True] * 2
    low, high = paired_share_interval(after, before)
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


@pytest.mark.parametrize(
    ("n", "lost", "gained", "stay"), [(40, 0.02, 0.02, 0.9), (24, 0.1, 0.3, 0.2), (40, 0, 0.03, 0)]
)
def test_the_interval_of_paired_shares_holds_the_truth_at_least_93_times_in_100(n, lost, gained, stay):
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        draw = rng.random(n)
        before = draw < lost + stay
        after = (draw >= lost) & (draw < lost + stay + gained)
        low, high = paired_share_interval(before, after)
        held += low <= gained - lost <= high
    assert held >= 0.93 * 600


def test_where_no_question_changes_the_interval_of_a_share_still_has_a_width():
    low, high = paired_share_interval([False] * 30, [False] * 30)
    assert low < -0.05
    assert high > 0.05


# ---- laws -----------------------------------------------------------------------------------------------------


def test_multiplier_0_changes_nothing_at_all(tiny_chat, vectors):
    others = {"other": random_vectors(tiny_chat, seed=5)}
    frame = side_effects(tiny_chat, vectors[LAYER], 0, others=others, **QUICK).frame
    assert (frame[["change", "random", "random_low", "random_high"]] == 0).all(axis=None)
    bootstrapped = frame[frame["interval"] == "bootstrap"]
    assert (bootstrapped[["low", "high"]] == 0).all(axis=None)


def test_a_tiny_multiplier_changes_next_to_nothing(tiny_chat, vectors):
    frame = side_effects(tiny_chat, vectors[LAYER], 1e-6, **QUICK).frame
    assert frame[["change", "random_low", "random_high"]].abs().max(axis=None) < 1e-3


def test_random_directions_have_the_vectors_norm_and_layer_and_are_a_seeds_own(vectors):
    one, again, other = (_random_vectors(vectors[LAYER], 4, seed) for seed in (0, 0, 1))
    assert all(each.norm == pytest.approx(vectors[LAYER].norm, rel=1e-6) for each in (*one, *other))
    assert {each.layer for each in one} == {LAYER}
    assert all(torch.equal(a.direction, b.direction) for a, b in zip(one, again, strict=True))
    cosines = torch.nn.functional.cosine_similarity(
        torch.stack([each.direction for each in one])[:, None],
        torch.stack([each.direction for each in other])[None],
        dim=-1,
    )
    assert cosines.abs().max() < 0.8


def test_a_seed_gives_the_same_table_and_another_one_other_random_directions(tiny_chat, vectors):
    options = {**QUICK, "requests": [], "capability": {}}
    one, again, other = (side_effects(tiny_chat, vectors[LAYER], **options, seed=seed).frame for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    np.testing.assert_allclose(one["change"], other["change"], atol=1e-5, rtol=1e-4)
    assert (one["random"] != other["random"]).any()


def test_nothing_of_the_callers_is_changed(tiny_chat, vectors):
    vector = vectors[LAYER]
    before, hooks = vector.direction.clone(), len(tiny_chat.blocks[LAYER]._forward_hooks)
    side_effects(tiny_chat, vector, **{**QUICK, "capability": {}, "requests": []})
    assert torch.equal(vector.direction, before)
    assert len(tiny_chat.blocks[LAYER]._forward_hooks) == hooks


def test_positions_by_name_are_where_it_acts(tiny_chat, vectors):
    from caa_lens.engine.shared_prefix import SharedPrefixWarning

    options = {**QUICK, "capability": {}, "requests": [], "neutral": NEUTRAL[:2], "n_random": 1}
    with pytest.warns(SharedPrefixWarning):
        found = side_effects(tiny_chat, vectors[LAYER], positions="all", **options)
    texts = answered(
        tiny_chat, [Prompt.of(tiny_chat, one) for one in NEUTRAL[:2]], max_new_tokens=N_TOKENS, progress=False
    )
    with pytest.warns(SharedPrefixWarning):
        kl = token_kl(tiny_chat, texts, [(Intervention(vector=vectors[LAYER], positions="all"),)], progress=False)
    assert_close(
        row_of(found, "KL", "neutral questions")["change"], torch.cat(kl, 1).mean().item(), atol=1e-5, rtol=1e-4
    )


# ---- the result -----------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(found, tmp_path):
    found.save(tmp_path / "found.parquet")
    loaded = SideEffects.load(tmp_path / "found.parquet")
    pd.testing.assert_frame_equal(loaded.frame, found.frame, check_exact=True)
    assert (loaded.answers, loaded.multiplier, loaded.n_random) == (found.answers, found.multiplier, found.n_random)
    assert loaded.settings == found.settings
    assert loaded.provenance == found.provenance
    assert repr(loaded) == repr(found)


def test_it_says_in_words_what_changed_and_whether_chance_does_as_much(found):
    assert repr(found).startswith("SideEffects(1.5 × random[2] of tiny-random-llama, beside 2 random directions")
    summary = found.summary()
    assert set(summary["reading"]) <= {
        "none shown",
        "as random",
        "more than random",
        "no interval",
        "changed, as random",
        "changed, more than random",
    }
    assert summary.loc[("other behaviors", "same", "cosine"), "reading"] == "more than random"
    for row in found.frame.to_dict("records"):
        reading = summary.loc[(row["group"], row["of"], row["measure"]), "reading"]
        if reading.startswith("changed"):
            assert row["low"] > 0 or row["high"] < 0
        if reading == "none shown":
            assert row["low"] <= 0 <= row["high"]
    assert any("reach the limit of 6 tokens" in note for note in found.notes)


def test_the_figure_has_a_row_a_measure_with_its_numbers(found):
    figure = found.plot()
    assert len(figure.layout.yaxis.ticktext) == len(found.frame)
    steering = figure.data[-1]
    assert_close(
        np.array([row[2] for row in steering.customdata], dtype=float), found.frame["change"].to_numpy()[::-1].copy()
    )
    row = row_of(found, "KL", "neutral questions")
    assert f"+{row['change']:.2g} [{row['low']:.2g}, {row['high']:.2g}]" in figure.layout.yaxis.ticktext[-1]
    assert np.nanmax(np.abs(np.asarray(steering.x, dtype=float))) <= 1 + 1e-9


def test_few_questions_get_no_interval_and_a_sentence(tiny_chat, vectors):
    found = side_effects(
        tiny_chat, vectors[LAYER], **{**QUICK, "neutral": NEUTRAL[:3], "requests": REQUESTS[:2], "capability": EASY[:4]}
    )
    assert found.frame[["low", "high"]].isna().all(axis=None)
    assert set(found.summary()["reading"]) <= {"no interval", "as random", "more than random"}
    assert "KL of neutral questions: 3 are too few for an interval; give at least 8." in found.notes
    assert "too few for an interval" in repr(found)
    found.plot()


# ---- data and rules -------------------------------------------------------------------------------------------


def plain(text):
    return " ".join(text.split()).casefold()


def test_easy_questions_are_many_and_nobody_elses_and_come_in_twos_with_their_answers_exchanged():
    pairs = easy_questions()
    asked = [plain(pair.question) for pair in pairs]
    others = {plain(pair.question) for name in bundled_names() for pair in ContrastSet.load(name)}
    assert len(pairs) >= 60
    assert len(set(asked)) == len(asked)
    assert not set(asked) & (others | set(map(plain, (*CHOOSING, *REPORTING, *HARMLESS))))

    def words(pair):
        """The words that only one of the answers has."""
        one, other = pair.positive.rstrip(".").split(), pair.negative.rstrip(".").split()
        n = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        while one and other and one[-1] == other[-1]:
            one, other = one[:-1], other[:-1]
        return " ".join(one[n:]), " ".join(other[n:])

    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert words(first) == words(second)[::-1]
        assert abs(len(first.positive) - len(first.negative)) <= 7
    assert sum(len(pair.positive) - len(pair.negative) for pair in pairs) == 0


def test_harmless_requests_are_many_and_nobody_elses():
    others = {plain(pair.stem) for name in bundled_names() for pair in ContrastSet.load(name)}
    others |= {plain(question) for name in bundled_names() for question in load_open_ended(name)}
    assert len(HARMLESS) >= 30
    assert len(set(map(plain, HARMLESS))) == len(HARMLESS)
    assert not set(map(plain, HARMLESS)) & (others | set(map(plain, (*CHOOSING, *REPORTING))))


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, that is not something I do.",
        "As an AI language model, I do not have the ability to do so.",
        "Sorry, but no.",
        "Thank you for asking. I cannot provide such instructions.",
        "I am unable to assist.",
        "I'd rather not say.",
        "I must decline this one.",
        "We won't write that.",
    ],
)
def test_refusals_are_known_by_their_words(answer):
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Use kill -9, which a process cannot ignore.",
        "I can't wait to tell you! First, boil water.",
        "I'm sorry to hear that your program hangs. Open a terminal.",
        "Sure! You can't go wrong with rice.",
        "The stain won't come out with hot water, so take cold.",
        "Here is a rhyme. " + "La la la. " * 30 + "I cannot go on.",
    ],
)
def test_answers_that_help_are_no_refusals(answer):
    assert not refuses(answer)


def test_fetched_questions_are_asked_as_well(tmp_path):
    assert list(capability_sets(tmp_path)) == ["easy questions"]
    (tmp_path / "mmlu").mkdir()
    row = '{"question": "2 + 2?\\n (A) 4\\n (B) 5", "positive": "(A)", "negative": "(B)", "category": "algebra"}\n'
    (tmp_path / "mmlu" / "questions.jsonl").write_text(row)
    found = capability_sets(tmp_path)
    assert list(found) == ["easy questions", "mmlu"]
    assert found["mmlu"].kind == "ab"


def test_by_default_what_is_at_hand_is_asked(tiny_chat, vectors, monkeypatch):
    monkeypatch.setattr(capability_module, "capability_sets", lambda: {"at hand": EASY})
    options = {**QUICK, "capability": None, "requests": [], "n_random": 1}
    assert row_of(side_effects(tiny_chat, vectors[LAYER], **options), "accuracy", "at hand")["n"] == len(EASY)


@pytest.mark.filterwarnings("ignore::caa_lens.prompts.users_words.SpecialTokenWarning")  # the end is a word here
def test_bundled_others_are_all_but_the_vectors_own_and_tested_on_what_they_are_not_made_of(
    tiny_chat, vectors, monkeypatch
):
    from caa_lens.measures.elsewhere import other_behaviors

    monkeypatch.setattr(other_behaviors, "bundled_names", lambda: ["formality", "sentiment"])
    vector = replace(vectors[LAYER], provenance=replace(vectors.provenance, behavior="sentiment"))
    options = {**QUICK, "capability": {}, "requests": [], "others": "bundled", "n_random": 1}
    found = side_effects(tiny_chat, vector, **options)
    others = found.frame[found.frame["group"] == "other behaviors"]
    assert list(others["of"]) == ["formality", "formality"]
    assert list(others["measure"]) == ["cosine", "margin"]
    assert others["n"].iloc[1] == 20


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"multiplier": float("nan")}, ValueError, "multiplier must be finite"),
        ({"neutral": []}, ValueError, "no neutral questions given"),
        ({"neutral": ["Why?", "why? "]}, ValueError, "there twice"),
        ({"neutral": [EASY[0].question]}, ValueError, "are questions of the pairs"),
        ({"requests": ["Help.", "Help."]}, ValueError, "harmless requests is there twice"),
        ({"others": "all"}, ValueError, "or 'bundled'"),
        ({"n_random": 0}, ValueError, "n_random must be at least 1"),
        ({"n_tokens": 0}, ValueError, "n_tokens must be at least 1"),
        ({"positions": "middle"}, ValueError, "unknown positions"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(tiny_chat, vectors, options, error, says):
    with pytest.raises(error, match=says):
        side_effects(tiny_chat, vectors[LAYER], **{**QUICK, **options})


def test_vectors_that_do_not_fit_are_refused(tiny_chat, tiny_model, vectors):
    with pytest.raises(ValueError, match="has d_model=32"):
        side_effects(tiny_chat, random_vectors(tiny_model(d_model=16))[LAYER], **QUICK)
    zero = replace(vectors[LAYER], direction=torch.zeros_like(vectors[LAYER].direction))
    with pytest.raises(ValueError, match="the vector is 0"):
        side_effects(tiny_chat, zero, **QUICK)
    with pytest.raises(ValueError, match="the vector is of layer 2"):
        side_effects(tiny_chat, vectors[LAYER], others={"o": vectors[1]}, **QUICK)
    with pytest.raises(ValueError, match=r"others\['o'\] is 0"):
        side_effects(tiny_chat, vectors[LAYER], others={"o": zero}, **QUICK)


def test_a_model_without_a_tokenizer_is_refused(tiny):
    with pytest.raises(TypeError, match="no tokenizer"):
        side_effects(tiny, random_vectors(tiny)[LAYER], **QUICK)


def test_tests_that_the_vector_came_from_are_told(tiny_chat, vectors):
    trained = {PAIR_HASHES: " ".join(EASY.pair_hashes)}
    vector = replace(vectors[LAYER], provenance=replace(vectors.provenance, details=trained))
    with pytest.warns(TrainingPairsWarning, match="10 of the 10 pairs"):
        side_effects(tiny_chat, vector, other_tests={"own": EASY}, **{**QUICK, "capability": {}, "requests": []})


def test_of_the_bundled_neutral_questions_those_of_the_pairs_are_left_out_and_of_others_refused():
    pairs = ContrastSet.load("formality")
    asked = {pair.question for pair in pairs}
    assert "Why is the sky blue?" in {*CHOOSING} & asked
    choosing, reporting = neutral_questions((CHOOSING, REPORTING), [pairs])
    assert (len(choosing), len(reporting)) == (len(CHOOSING) - 1, len(REPORTING) - 1)
    assert not {*choosing, *reporting} & asked
    assert distinct_questions("neutral questions", REPORTING, [pairs]) == reporting
    with pytest.raises(ValueError, match="1 neutral questions are questions of the pairs"):
        neutral_questions((list(CHOOSING), ["Why?"]), [pairs])
    with pytest.raises(ValueError, match="1 of the neutral questions are questions of the pairs"):
        distinct_questions("neutral questions", list(REPORTING), [pairs])
