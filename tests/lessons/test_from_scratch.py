"""Answers to notebook 1, right and wrong in each known way, made by plain hooks on a small random model."""

import pytest
import torch

from caa_lens.contrast.sets import ContrastSet
from caa_lens.lessons import from_scratch as check
from caa_lens.lessons.verdicts import NOT_ANSWERED, RIGHT
from caa_lens.prompts.prompt_formats import default_format, encode_answer
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.steering_vectors import SteeringVector

LAYER = 2
PAIRS = ContrastSet.load("sentiment").sample(4)
QUESTION = "How was the party?"


def encoded(model, pair):
    return [
        encode_answer(default_format(model), model.tokenizer, pair.question, answer)
        for answer in (pair.positive, pair.negative)
    ]


def stream(model, prompt, layer):
    name = f"blocks.{layer}.hook_resid_post"
    return model.run_with_cache(torch.tensor([prompt.tokens]), names_filter=name)[1][name][0].detach().cpu()


def mean_at(model, first, stop=lambda prompt: None, layer=LAYER):
    """Mean difference of the pairs, one prompt at a time, over positions from `first` on, to `stop` or one only."""
    found = []
    for pair in PAIRS:
        sides = []
        for prompt in encoded(model, pair):
            resid = stream(model, prompt, layer)
            sides.append(resid[first(prompt) : stop(prompt) or first(prompt) + 1].mean(0))
        found.append(sides[0] - sides[1])
    return torch.stack(found).mean(0)


def answer_start(prompt):
    return prompt.answer_start


@pytest.fixture(scope="module")
def first(tiny_chat):
    return mean_at(tiny_chat, answer_start)


def judge_first(model, answer):
    return check.first_token(answer, model, PAIRS, LAYER)


def test_the_vector_of_the_first_token_is_right(tiny_chat, first):
    assert judge_first(tiny_chat, first) == RIGHT
    assert judge_first(tiny_chat, SteeringVector.from_direction(first, LAYER)) == RIGHT
    assert judge_first(tiny_chat, ...) is NOT_ANSWERED


def test_a_vector_read_elsewhere_gets_the_hint_where(tiny_chat, first):
    last = mean_at(tiny_chat, lambda prompt: len(prompt) - 1)
    whole = mean_at(tiny_chat, answer_start, len)
    planted = {
        "points the other way": -first,
        "this is zero": mean_at(tiny_chat, lambda prompt: prompt.answer_start - 1),
        "sum over the pairs": first * len(PAIRS),
        "norm 1": first / first.norm(),
        "mean over the whole answer": whole,
        "at the last token": last,
        "a layer beside it": mean_at(tiny_chat, answer_start, layer=LAYER + 1),
        "another length": torch.ones(7),
        "neither the first token": torch.randn(len(first), generator=torch.Generator().manual_seed(0)),
    }
    for hint, answer in planted.items():
        said = judge_first(tiny_chat, answer)
        assert not said.right
        assert hint in repr(said), (hint, said)
    assert "a layer beside it" in repr(judge_first(tiny_chat, mean_at(tiny_chat, answer_start, layer=LAYER - 1)))


def margin(model, direction, multiplier, positions):
    """Mean margin of the pairs with `positions(prompt)` steered, by a plain hook."""
    margins = []
    for pair in PAIRS:
        sides = []
        for prompt in encoded(model, pair):
            where = torch.zeros(len(prompt), 1)
            where[positions(prompt)] = 1.0
            tokens, step = torch.tensor([prompt.tokens]), multiplier * where * direction
            hook = (f"blocks.{LAYER}.hook_resid_post", lambda resid, hook, step=step: resid + step)
            logits = model.run_with_hooks(tokens, fwd_hooks=[hook])
            n = prompt.answer_start
            sides.append(logits[0, n - 1 : -1].log_softmax(-1).gather(-1, tokens[0, n:, None]).mean())
        margins.append(float(sides[0] - sides[1]))
    return sum(margins) / len(margins)


@torch.no_grad()
def test_the_share_of_one_steered_token_is_right_and_other_shares_get_their_hints(tiny_chat, first):
    direction = 20 * first  # so long that +1 does not just undo -1

    def effect(positions, low=-1.0):
        return margin(tiny_chat, direction, 1.0, positions) - margin(tiny_chat, direction, low, positions)

    def everything(prompt):
        return slice(prompt.answer_start - 1, None)

    def once(prompt):
        return slice(prompt.answer_start - 1, prompt.answer_start)

    def answer(prompt):
        return slice(prompt.answer_start, None)

    def judge(share):
        return check.share_left(share, tiny_chat, PAIRS, direction, LAYER)

    right = effect(once) / effect(everything)
    assert judge(right) == RIGHT
    assert judge(...) is NOT_ANSWERED
    planted = {
        "this is all of it": 1.0,
        "nothing is left": -0.019 if effect(once) > 0 else 0.019,  # about nothing, and apart from the effect itself
        "the whole over the part": 1 / right,
        "in percent": 100 * right,
        "the sign is turned": -right,
        "the answer's own tokens": effect(answer) / effect(everything),
        "the effect itself": effect(once),
        "one side": effect(once, 0.0) / effect(everything, 0.0),
        "not the share": 17.0,
    }
    assert "the answer's own tokens" in repr(judge(1 - right))
    for hint, share in planted.items():
        said = judge(share)
        assert not said.right
        assert hint in repr(said), (hint, said)


def test_the_text_without_the_direction_is_right_and_others_get_their_hints(tiny_chat, first):
    v = SteeringVector.from_direction(3 * first, LAYER)

    def said(*vectors):
        return generate(tiny_chat, QUESTION, vectors=list(vectors), max_new_tokens=16)

    right = said(Intervention(vector=v, operator="ablate"))
    texts = {"unsteered": said(), "subtracted": said((v, -1.0)), "added": said((v, 1.0))}
    assert len({right, *texts.values()}) == 4

    def judge(answer):
        return check.said_without(answer, tiny_chat, QUESTION, v)

    assert judge(right) == judge(f" {right}\n") == RIGHT
    assert judge(...) is NOT_ANSWERED
    for hint, text in texts.items():
        assert hint in repr(judge(text))
    assert "has the question in it" in repr(judge(f"{QUESTION} {right}"))
    assert "it goes on" in repr(judge(right[: len(right) // 2]))
    assert "another text" in repr(judge("Nothing."))


def hook_that(steers, layer_of_name=None):
    """Like the notebook's `steering`, but for which positions are steered."""

    def made(direction, multiplier, start, layer=LAYER):
        def add(resid, hook):
            return steers(resid, multiplier * direction, start)

        return f"blocks.{layer if layer_of_name is None else layer_of_name}.hook_resid_post", add

    return made


def steered_from(first):
    def steers(resid, step, start):
        steered = resid.clone()
        steered[:, first(resid, start) :] += step
        return steered

    return steers


def in_place(resid, step, start):
    resid[:, start if resid.shape[1] > 1 else 0 :] += step
    return resid


def counting(direction, multiplier, start, layer=LAYER):
    """Right in another way: counts the tokens behind it."""
    behind = 0

    def add(resid, hook):
        nonlocal behind
        steered = resid.clone()
        steered[:, max(0, start - behind) :] += multiplier * direction
        behind += resid.shape[1]
        return steered

    return f"blocks.{layer}.hook_resid_post", add


@pytest.mark.parametrize(
    "repaired", [hook_that(steered_from(lambda resid, start: start if resid.shape[1] > 1 else 0)), counting]
)
def test_a_repaired_hook_is_right_however_it_knows(repaired):
    assert check.repaired(repaired, 8, LAYER) == RIGHT


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (hook_that(steered_from(lambda resid, start: start)), "still left alone"),
        (hook_that(steered_from(lambda resid, start: 0)), "before `start`"),
        (hook_that(steered_from(lambda resid, start: resid.shape[1] - 1)), "not its last one alone"),
        (hook_that(in_place), "changes the tensor"),
        (hook_that(lambda resid, step, start: None), "return the stream"),
        (hook_that(lambda resid, step, start: resid[:, -1:] + step), "return the stream"),
        (hook_that(lambda resid, step, start: resid / 0 if resid.shape[1] > 9 else resid @ step), "return the stream"),
        (hook_that(steered_from(lambda resid, start: start if resid.shape[1] > 1 else 0), 3), "another place"),
        (hook_that(lambda resid, step, start: 1 / 0), "raised ZeroDivisionError"),
        (lambda: None, "this one raised"),
        (lambda direction, multiplier, start, layer: (len, "name"), "in this order"),
        (3, "expected a function"),
    ],
)
def test_a_hook_that_is_not_repaired_gets_a_hint(answer, hint):
    said = check.repaired(answer, 8, LAYER)
    assert not said.right
    assert hint in repr(said)


def test_no_hint_holds_the_answer(tiny_chat, first):
    assert check.repaired(..., 8, LAYER) is NOT_ANSWERED
    said = repr(check.share_left(17.0, tiny_chat, PAIRS, first, LAYER)) + repr(judge_first(tiny_chat, 2 * first))
    assert not [word for word in said.split() if word.strip(".,()").replace(".", "").isdigit()]
