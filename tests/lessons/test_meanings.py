"""Answers to notebook 3, right and wrong in each known way, on a small random model."""

import pytest
import torch
from helpers.models import random_vectors
from helpers.verdicts import hint_of

from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation.lens import logit_lens, word_ranks
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.lessons import meanings as check
from caa_lens.lessons.verdicts import NOT_ANSWERED, RIGHT
from caa_lens.prompts.prompt_formats import default_format
from caa_lens.vectors.extraction import extract

LAYER, LAST = 2, 4
PAIRS = ContrastSet.load("formality").sample(4)
TEXT = "The staff were kind, but the soup was cold."
TURNED = "The soup was cold, but the staff were kind."


@pytest.fixture(scope="module")
def vectors(tiny_chat):
    return random_vectors(tiny_chat, scale=2.0)


def test_the_promoted_tokens_are_right(tiny_chat, vectors):
    formal = extract(tiny_chat, PAIRS, progress=False)

    def top(of, layer, side="promoted"):
        return list(logit_lens(tiny_chat, of, layers=[layer], k=8).tokens()[side].iloc[0])

    def judge(answer):
        return check.promoted(answer, tiny_chat, PAIRS, vectors)

    right = top(formal, LAST)
    assert judge(right) == judge(right[::-1]) == RIGHT
    assert judge([*right[:6], "x", "y"]) == RIGHT  # of another sample of pairs, say
    assert judge(...) is NOT_ANSWERED
    hint_of(judge(top(formal, LAST, "suppressed")), "suppressed")
    hint_of(judge(top(vectors, LAST)), "the sentiment vector's")
    hint_of(judge(top(formal, LAST - 4)), "a lower layer")
    hint_of(judge(top(formal, LAST - 1)), "the layer below")
    hint_of(judge(["x"] * 8), "other tokens")
    hint_of(judge(right[:4]), "expected 8 tokens")
    assert not set(right) & set(repr(judge(["x"] * 8)).split())


def test_both_linearities_are_right(tiny_chat, vectors):
    def effect(multiplier):
        lens = logit_lens(
            tiny_chat,
            vectors,
            layers=[LAYER],
            reading="effect",
            prompts=["How was it?"],
            multiplier=multiplier,
            controls=0,
            progress=False,
        )
        return lens.frame[["linearity", "size_ratio"]].iloc[0].tolist()

    (small, small_size), (large, large_size) = effect(1), effect(8)

    def judge(answer):
        return check.linearity(answer, tiny_chat, vectors, LAYER, ["How was it?"])

    assert judge({8: large, 1: small}) == judge((small, large)) == RIGHT
    assert judge({1: small, 8: ...}) is NOT_ANSWERED
    hint_of(judge([large, small]), "wrong order")
    hint_of(judge([small_size, large_size]), "another column")
    hint_of(judge([small, small]), "both are of multiplier 1")
    hint_of(judge([large, large]), "both are of multiplier 8")
    hint_of(judge([9, 9]), "other numbers")
    hint_of(judge(small), "expected 2 numbers")


def test_the_word_at_minus_two_and_its_layer_are_right(tiny_chat):
    vectors = random_vectors(tiny_chat, scale=0.7)
    prompt = default_format(tiny_chat).encode(tiny_chat.tokenizer, "How was the party?", "The party was a")
    down, up = (residual_lens(tiny_chat, prompt, vectors=[(vectors[LAYER], m)]) for m in (-2.0, 2.0))
    end, plain = down.summary().iloc[-1], down.summary().iloc[-2]
    word, layer = end["answer"], int(end["settles_at"])
    assert len({layer, int(plain["settles_at"]), LAYER}) == 3
    assert len({word, plain["answer"], up.summary().iloc[-1]["answer"]}) == 3

    def judge(answer):
        return check.steered_down(answer, tiny_chat, prompt, vectors[LAYER])

    assert judge((word, layer)) == judge([word.strip("␣").upper(), end["settles_at"]]) == RIGHT
    assert judge(...) is judge((..., ...)) is NOT_ANSWERED
    hint_of(judge((up.summary().iloc[-1]["answer"], layer)), "at +2")
    hint_of(judge((plain["answer"], layer)), "unsteered word")
    hint_of(judge(("zebra", layer)), "another word")
    hint_of(judge((word, layer + 1)), "one off")
    hint_of(judge((word, 0)), "the layer is not")
    hint_of(judge((word, LAYER)), "where the vector is added")


def test_the_cosine_at_kind_is_right(tiny_chat, vectors):
    def at_kind(text, layer=LAYER, measure="cosine"):
        found = token_similarity(tiny_chat, text, vectors, raw_text=True)
        return float(found.summary(measure)[layer].iloc[found.pieces.index(" kind")])

    def judge(answer, text=TURNED):
        return check.kind(answer, tiny_chat, text, vectors, LAYER, before=TEXT)

    right = at_kind(TURNED)
    assert judge(right) == judge(round(right, 3)) == RIGHT
    assert judge(...) is NOT_ANSWERED
    hint_of(judge(-right), "the sign is turned")
    hint_of(judge(at_kind(TEXT)), "the sentence as it was")
    hint_of(judge(at_kind(TURNED, measure="dot")), "the dot product")
    hint_of(judge(at_kind(TURNED, LAYER + 1)), "a layer beside it")
    hint_of(judge(at_kind(TURNED, LAYER - 1)), "a layer beside it")
    hint_of(judge(9), "another number")
    hint_of(judge(right, text="Nothing."), "not in your text")


def test_the_lens_margins_are_right(tiny_chat, vectors):
    layers, measured = [1, 2, 4], [5.0, 6.0, 7.0]

    def margins(reading):
        found = word_ranks(tiny_chat, vectors, ["wonderful", "terrible"], layers=layers, reading=reading)
        return found.margin(positive=["wonderful"], negative=["terrible"])["margin"]

    def judge(answer):
        return check.direct_part(answer, tiny_chat, vectors, layers, measured)

    right = margins("direct")
    assert judge(right) == judge(right.tolist()) == RIGHT
    assert judge(...) is NOT_ANSWERED
    hint_of(judge(-right), "the sign is turned")
    hint_of(judge(right[::-1]), "wrong order")
    hint_of(judge(margins("normed")), "`normed`")
    hint_of(judge(measured), "the measured parts themselves")
    hint_of(judge([9, 9, 9]), "other numbers")
    hint_of(judge([9, 9]), "one number a layer")
    hint_of(judge(torch.ones(3) * 9), "other numbers")
