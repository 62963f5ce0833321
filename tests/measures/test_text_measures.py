"""Text measures against slow and obvious twins, and against texts whose measure is known."""

import itertools
import math

import pandas as pd
import pytest
import torch
from helpers.models import random_vectors

from caa_lens.measures.open_ended.text_measures import answer_logp, distinct, measure_texts, sentiment
from caa_lens.prompts.prompt_formats import LLAMA2_BASE, chat_template_format, resolve_format
from caa_lens.steering.generation import generate

# One of the texts holds a special token on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::caa_lens.prompts.users_words.SpecialTokenWarning")

QUESTION = "How was your day?"
TEXTS = [
    (QUESTION, "It was wonderful."),
    (QUESTION, "I walked along the river, and then it began to rain, so I went home early and read a book."),
    ("Why?", "no"),
    (QUESTION, "\n ünïcode 日本, <|im_end|> and so on"),
]


def one_token_at_a_time(model, question, answer, prompt_format=None, system=None):
    """Log-probability of each of the answer's tokens: one run for each, without batch or padding."""
    prompt = resolve_format(model, prompt_format).encode(model.tokenizer, question, answer, system=system)
    logp = []
    for i in range(prompt.answer_start, len(prompt)):
        with torch.no_grad():
            tokens = torch.tensor([prompt.tokens[:i]])
            logits = model(tokens, attention_mask=torch.ones_like(tokens))[0, -1]
        logp.append(float(logits.double().log_softmax(-1)[prompt.tokens[i]]))
    return logp


def told(tiny_model, tokenizer, follows):
    """A model that after the tokens of `follows` is sure, and otherwise knows nothing."""
    model = tiny_model(d_vocab=len(tokenizer), n_ctx=512, n_layers=1, tokenizer=tokenizer)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.ln_final.w.data += 1
    for i, (before, after) in enumerate(follows.items()):  # a direction for each
        model.W_E.data[before, i] = 1
        model.W_U.data[i, after] = 50 / model.cfg.d_model**0.5
    return model


# ---- perplexity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_log_probabilities_are_those_of_one_token_at_a_time(tiny_chat, batch_size, system):
    measured = measure_texts(tiny_chat, TEXTS, system=system, batch_size=batch_size)
    for row, (question, answer) in enumerate(TEXTS):
        expected = one_token_at_a_time(tiny_chat, question, answer, system=system)
        assert measured["n_tokens"][row] == len(expected)
        assert measured["mean_logp"][row] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
        assert measured["perplexity"][row] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)


def test_each_token_of_the_real_model_has_the_log_probability_of_a_run_of_its_own(demo_model):
    fmt = resolve_format(demo_model, None)
    texts = [TEXTS[0], TEXTS[2]]
    prompts = [fmt.encode(demo_model.tokenizer, question, answer) for question, answer in texts]
    for logp, (question, answer) in zip(answer_logp(demo_model, prompts), texts, strict=True):
        expected = torch.tensor(one_token_at_a_time(demo_model, question, answer))
        torch.testing.assert_close(logp, expected, atol=2e-4, rtol=0, check_dtype=False)


def test_the_separator_before_the_answer_is_not_lost_in_llama_2_formats(llama2_tokenizer, tiny_model):
    model = tiny_model(d_vocab=32000, n_ctx=256, tokenizer=llama2_tokenizer)
    (logp,) = answer_logp(model, [LLAMA2_BASE.encode(llama2_tokenizer, QUESTION, "Fine, thanks.")])
    assert logp.tolist() == pytest.approx(one_token_at_a_time(model, QUESTION, "Fine, thanks.", LLAMA2_BASE), abs=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(demo_tokenizer, tiny_model):
    measured = measure_texts(told(tiny_model, demo_tokenizer, {}), TEXTS)
    assert measured["perplexity"].tolist() == pytest.approx([len(demo_tokenizer)] * len(TEXTS), rel=1e-5)


def test_a_model_that_is_sure_of_what_comes_has_perplexity_1_and_of_anything_else_a_huge_one(
    demo_tokenizer, tiny_model
):
    prompt = chat_template_format(demo_tokenizer).encode(demo_tokenizer, QUESTION, "no rain now")
    answer = prompt.tokens[prompt.answer_start - 1 :]
    sure = told(tiny_model, demo_tokenizer, dict(itertools.pairwise(answer)))
    measured = measure_texts(sure, [(QUESTION, "no rain now"), (QUESTION, "rain no now")])
    assert measured["perplexity"][0] == pytest.approx(1, abs=1e-6)
    assert measured["perplexity"][1] > 1e6


def test_steering_that_is_too_strong_gives_text_that_the_unsteered_model_finds_unlikely(demo_model):
    (vector,) = random_vectors(demo_model, layers=[12])
    texts = [generate(demo_model, QUESTION, vectors=[(vector, m)], max_new_tokens=12) for m in (0.0, 1000.0)]
    perplexity = measure_texts(demo_model, [(QUESTION, text) for text in texts])["perplexity"]
    assert perplexity[0] < 4  # its own first choice, token by token
    assert perplexity[1] > 5 * perplexity[0]


def test_an_empty_text_has_no_perplexity_and_the_others_keep_theirs(tiny_chat):
    with_empty = measure_texts(tiny_chat, [TEXTS[0], (QUESTION, ""), TEXTS[2]])
    without = measure_texts(tiny_chat, [TEXTS[0], TEXTS[2]])
    assert with_empty["n_tokens"].tolist() == [without["n_tokens"][0], 0, without["n_tokens"][1]]
    assert with_empty["perplexity"].isna().tolist() == [False, True, False]
    assert with_empty["perplexity"].dropna().tolist() == pytest.approx(without["perplexity"].tolist(), rel=1e-5)


def test_the_model_is_left_without_hooks_and_gradients(tiny_chat):
    measure_texts(tiny_chat, TEXTS)
    assert not [hook.name for hook in tiny_chat.hook_points() if hook.fwd_hooks]
    (logp,) = answer_logp(tiny_chat, [resolve_format(tiny_chat, None).encode(tiny_chat.tokenizer, *TEXTS[0])])
    assert not logp.requires_grad


def test_a_text_that_does_not_fit_into_the_context_is_named(tiny_chat):
    with pytest.raises(ValueError, match="but the model's context is 512: shorten it"):
        measure_texts(tiny_chat, [(QUESTION, "rain " * 600)])


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 1, 1),
        ("a a a a", 1, 1 / 4),
        ("a b a b a b", 2, 2 / 5),
        ("A a, A a", 2, 3 / 4),  # a a | a , | , a | a a
        ("!!!!", 1, 1 / 4),
        ("one two", 2, 1),
    ],
)
def test_distinct_is_distinct_ngrams_over_ngrams(text, n, share):
    assert distinct(text, n) == share


def test_distinct_of_a_text_with_fewer_units_than_n_is_not_a_number():
    assert math.isnan(distinct("one two", 3))
    assert math.isnan(distinct("", 1))


def test_a_loop_repeats_more_with_every_round_and_a_text_without_one_not_at_all():
    rounds = [measure_texts(None, [(QUESTION, "the sun is out today " * n)])["repetition"][0] for n in (1, 2, 4, 40)]
    assert rounds[0] == 0
    assert rounds == sorted(rounds)
    assert rounds[-1] > 0.95
    # 5 distinct 4-grams of 5 n - 3
    assert rounds[1:] == pytest.approx([1 - 5 / (5 * n - 3) for n in (2, 4, 40)])


def test_sentiment_knows_good_from_bad_and_what_is_negated():
    assert sentiment("I love this wonderful place.") > 0.5
    assert sentiment("I hate this horrible place.") < -0.5
    assert sentiment("It is not good.") < 0 < sentiment("It is good.")
    assert sentiment("The table has four legs.") == sentiment("") == sentiment(" \n") == 0


def test_sentiment_is_the_mean_over_sentences_so_that_long_texts_do_not_saturate():
    good, bad, neutral = "I love it.", "I hate it!", "It is Tuesday."
    one = sentiment(good)
    assert sentiment(f"{good} {good}\n\n{good}") == pytest.approx(one)
    assert sentiment(f"{good} {neutral}") == pytest.approx(one / 2)
    assert sentiment(f"{good} {bad}") == pytest.approx((one + sentiment(bad)) / 2)


# ---- frames --------------------------------------------------------------------------------------------------------


def test_columns_order_and_index_pass_through_and_the_given_frame_stays_as_it_was(tiny_chat):
    frame = pd.DataFrame(TEXTS, columns=["question", "answer"], index=[3, 1, 1, 0])
    frame["multiplier"] = [0.0, 1.0, 2.0, 3.0]
    before = frame.copy()
    measured = measure_texts(tiny_chat, frame)
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(measured[list(frame.columns)], frame)
    plain = measure_texts(tiny_chat, TEXTS)
    words = ["sentiment", "repetition", "distinct_1", "distinct_2"]
    assert list(plain.columns) == ["question", "answer", *words, "n_tokens", "mean_logp", "perplexity"]
    pd.testing.assert_frame_equal(measured[plain.columns].reset_index(drop=True), plain)
    pd.testing.assert_frame_equal(measure_texts(None, TEXTS), plain[["question", "answer", *words]])


def test_a_column_that_would_be_overwritten_is_refused():
    frame = pd.DataFrame([("q", "a")], columns=["question", "answer"]).assign(perplexity=1.0)
    with pytest.raises(ValueError, match="column perplexity is repeated, or is added here: rename or drop it"):
        measure_texts(None, frame)
