"""Answers to notebook 2, right and wrong in each known way, on a small random model."""

import warnings

import pytest
import torch
from helpers.models import random_vectors
from helpers.verdicts import hint_of

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.lessons import pushes as check
from caa_lens.lessons.verdicts import NOT_ANSWERED, RIGHT
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.prompt_formats import default_format
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_block import steer

LAYER = 2
PAIRS = ContrastSet.load("sentiment").sample(3)
QUESTION = "How was the party?"


@pytest.fixture(scope="module")
def vectors(tiny_chat):
    return random_vectors(tiny_chat, scale=0.7)


def test_a_quarter_of_the_stream_is_right(tiny_chat, vectors):
    norms = pair_activations(tiny_chat, PAIRS, progress=False).norms.mean((0, 1))  # [layer]
    right = {layer: float(0.25 * norms[layer] / vectors[layer].norm) for layer in range(5)}

    def judge(answer):
        return check.quarter(answer, tiny_chat, PAIRS, vectors, LAYER)

    assert judge(right[LAYER]) == RIGHT
    assert judge(...) is NOT_ANSWERED
    hint_of(judge(-right[LAYER]), "positive multiplier")
    hint_of(judge(0.25), "a quarter of the vector")
    hint_of(judge(1 / right[LAYER]), "upside down")
    hint_of(judge(4 * right[LAYER]), "as long as the stream")
    hint_of(judge(2 * right[LAYER]), "half of the stream")
    hint_of(judge(right[LAYER + 1]), "a layer beside it")
    hint_of(judge(right[LAYER - 1]), "a layer beside it")
    hint_of(judge(77), "another multiplier")


def margins(model, *conditions):
    """One condition at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SharedPrefixWarning)
        return [float(score_answers(model, PAIRS, [each], progress=False).values.mean()) for each in conditions]


def test_half_of_two_layers_is_right(tiny_chat, vectors):
    vectors = 4 * vectors  # so long that a margin does not just grow with the multiplier
    one, other = (Intervention(vector=vectors[layer]) for layer in (1, 3))
    half_one, half_other = (Intervention(vector=vectors[layer], multiplier=0.5) for layer in (1, 3))
    first, second, half, whole, plain = margins(tiny_chat, (one,), (other,), (half_one, half_other), (one, other), ())

    def judge(answer):
        return check.two_layers(answer, tiny_chat, PAIRS, vectors, 1, 3)

    assert judge([first, second, half]) == RIGHT
    assert judge(torch.tensor([first, second, half])) == RIGHT
    assert judge(...) is NOT_ANSWERED
    hint_of(judge([first, second, whole]), "both vectors in full")
    hint_of(judge([second, first, half]), "first two are in the wrong order")
    hint_of(judge([first, second, (first + second) / 2]), "mean of the two")
    hint_of(judge([each - plain for each in (first, second, half)]), "changes of the margin")
    hint_of(judge([9, 9, 9]), "other margins")
    hint_of(judge(half), "expected 3 numbers")


def test_the_margin_with_every_token_steered_is_right(tiny_chat, vectors):
    def at(where, multiplier=1.0):
        return (Intervention(vector=vectors[LAYER], multiplier=multiplier, positions=where),)

    everywhere, from_the_end, but_the_first, prompt, down, plain = margins(
        tiny_chat, at("all"), at("caa"), at("after_first"), at("prompt"), at("all", -1.0), ()
    )

    def judge(answer):
        return check.whole_prompt(answer, tiny_chat, PAIRS, vectors, LAYER)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge(everywhere) == RIGHT
    assert judge(...) is NOT_ANSWERED
    hint_of(judge(from_the_end), "from the end of the instruction")
    hint_of(judge(but_the_first), "the first token is left out")
    hint_of(judge(prompt), "answer's tokens are left alone")
    hint_of(judge(down), "at -1")
    hint_of(judge(plain), "unsteered")
    hint_of(judge(9), "another margin")


def seen(model, vectors, *, around):
    """What hooks note below, at and above the steered layer, opened around the steering or inside of it."""
    noted = {}

    def see(resid, hook):
        v = vectors[hook.layer()].direction.to(resid)
        noted[hook.layer()] = float(resid[0, -1] @ v / (v @ v))

    prompt = default_format(model).encode(model.tokenizer, QUESTION)
    tokens = torch.tensor([prompt.tokens])
    hooks = [(f"blocks.{layer}.hook_resid_post", see) for layer in range(5)]
    with torch.no_grad():
        if around:
            with model.hooks(fwd_hooks=hooks), steer(model, vectors[LAYER], prompt=prompt):
                model(tokens)
        else:
            with steer(model, vectors[LAYER], prompt=prompt):
                model.run_with_hooks(tokens, fwd_hooks=hooks)
    return [noted[layer] for layer in (LAYER - 1, LAYER, LAYER + 1)]


def test_what_hooks_around_the_steering_see_is_right(tiny_chat, vectors):
    outside, inside = (seen(tiny_chat, vectors, around=around) for around in (True, False))
    plain = seen(tiny_chat, vectors * 1e-9, around=False)
    plain = [each * 1e-9 for each in plain]  # in units of the vectors themselves

    def judge(answer):
        return check.hooks_around(answer, tiny_chat, QUESTION, vectors, LAYER)

    assert judge(outside) == RIGHT
    assert judge(dict(zip((1, 2, 3), outside, strict=True))) == RIGHT
    assert judge(...) is NOT_ANSWERED
    hint_of(judge(inside), "after the steering")
    hint_of(judge(plain), "nothing is steered")
    hint_of(judge(outside[::-1]), "wrong order")
    hint_of(judge([each * vectors[layer].norm for each, layer in zip(outside, (1, 2, 3), strict=True)]), "the unit is")
    hint_of(judge([9, 9, 9]), "other numbers")
