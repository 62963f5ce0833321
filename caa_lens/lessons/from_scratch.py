"""Checks of notebook 1, CAA from scratch."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.activations import read_pairs
from caa_lens.lessons import verdicts
from caa_lens.lessons.verdicts import RIGHT, Verdict, exercise, judged, same_text, within, wrong
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import Prompt, resolve_format
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.steering_vectors import SteeringVector

LOST = "this is the share of the answer's own tokens: what is left when only the token before them is steered?"
SHARE = 0.02  # how far a share may be from the measured one
N_PROMPT = 5  # tokens of a made-up prompt that a repaired hook is given


@exercise(verdicts.a_vector)
def first_token(answer: Tensor, model: Any, pairs: ContrastSet, layer: int) -> Verdict:
    """Part 1: the vector of a layer, read at the first token of the answers."""
    if len(answer) != model.cfg.d_model:
        return wrong("this has another length than the stream: is it of one layer, and of one token?")
    beside = [each for each in (layer - 1, layer, layer + 1) if 0 <= each < model.cfg.n_layers]
    firsts = dict(zip(beside, _differences(model, pairs, beside, lambda prompt: prompt.answer_start), strict=True))
    differences = firsts.pop(layer)  # [pair d_model]
    right = differences.mean(0)
    hint = "this is of a layer beside it: `resid_post` of LAYER is what comes out of block LAYER"
    mistakes = [
        (-right, "this points the other way: which side is taken from which?"),
        (torch.zeros_like(right), "this is zero: up to the token that you read, both sides of a pair are the same"),
        (differences.sum(0), "this is the sum over the pairs: what is the mean?"),
        (right / right.norm(), "this has norm 1: nothing is to be divided by the norm"),
        (differences[0], "this is the difference of one pair: average over all of them"),
        *((other.mean(0), hint) for other in firsts.values()),
        (
            lambda: _differences(model, pairs, [layer])[0].mean(0),
            "this is the mean over the whole answer, as before",
        ),
        (
            lambda: _differences(model, pairs, [layer], lambda prompt: len(prompt) - 1)[0].mean(0),
            "this is read at the last token: where does the answer begin?",
        ),
    ]
    return judged(
        answer,
        right,
        near=within(0.05 * float(right.norm())),
        mistakes=mistakes,
        otherwise="neither the first token nor a mistake that is known here: at which position is the stream read, "
        "and at which layer?",
    )


@exercise(verdicts.a_number)
def share_left(
    answer: float, model: Any, pairs: ContrastSet, direction: Float[Tensor, " d_model"], layer: int
) -> Verdict:
    """Part 2: how much of the effect of -1 against +1 is left when the instruction's last token alone is steered."""
    v = SteeringVector.from_direction(direction.cpu(), layer)
    steered = {
        (where, multiplier): (Intervention(vector=v, multiplier=multiplier, positions=where),)
        for where in ("caa", "last", "answer")
        for multiplier in (-1.0, 1.0)
    }
    scores = score_answers(model, pairs, [(), *steered.values()], progress=False).values.mean(0)  # [condition]
    margins = dict(zip([None, *steered], scores.tolist(), strict=True))
    effect = {where: margins[where, 1.0] - margins[where, -1.0] for where in ("caa", "last", "answer")}
    whole, right = effect["caa"], effect["last"] / effect["caa"]
    mistakes = [
        (1.0, "this is all of it: is your hook still steering from `start` on?"),
        (effect["last"], "this is the effect itself: what share is it of the effect with all tokens steered?"),
        (0.0, "nothing is left: does your hook return what it changed, and is it the instruction's last token?"),
        (1 - right, LOST),
        (1 / right if right else 0.0, "this is the whole over the part: take the part over the whole"),
        (100 * right, "this is in percent: a share is between 0 and 1"),
        (-right, "the sign is turned: take the margin at +1 minus the margin at -1, both times"),
        (effect["answer"] / whole, LOST),
        (
            (margins["last", 1.0] - margins[None]) / (margins["caa", 1.0] - margins[None]),
            "this is the share of one side: take the effect from -1 to +1",
        ),
    ]
    return judged(
        answer,
        right,
        near=within(SHARE),
        mistakes=mistakes,
        otherwise="not the share: divide margin(+1) minus margin(-1) of your steering by the same of ours",
    )


@exercise(verdicts.a_text)
def said_without(answer: str, model: Any, question: str, v: SteeringVector) -> Verdict:
    """Part 3: what the model says when the direction is taken out of the stream."""
    ablated, n_tokens = Intervention(vector=v, operator="ablate"), 16

    def said(*vectors: Any) -> str:
        return str(generate(model, question, vectors=list(vectors), max_new_tokens=n_tokens))

    right = said(ablated)
    if question in answer:
        return wrong("this has the question in it: give what the model says, and no more")
    if len(answer) < len(right) and right.strip().startswith(answer.strip()):
        return wrong("it goes on: give all 16 tokens")
    return judged(
        answer,
        right,
        near=same_text,
        mistakes=[
            (said, "this is the unsteered text: was the intervention given to `vectors`?"),
            (lambda: said((v, -1.0)), "this is the text with the vector subtracted: what does `operator` say?"),
            (lambda: said((v, 1.0)), "this is the text with the vector added: what does `operator` say?"),
        ],
        otherwise="another text: is it the same question, greedy, with the vector of LAYER?",
    )


@exercise(verdicts.a_function)
def repaired(answer: Callable[..., Any], d_model: int, layer: int) -> Verdict:
    """Part 4: a hook that also steers when the model is fed one new token at a time.

    Called as the model would call it: on a prompt, then on single tokens; steering starts before the prompt's end.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(d_model, generator=generator)
    prompt, token, later = (torch.randn(1, n, d_model, generator=generator) for n in (N_PROMPT, 1, 1))
    start, multiplier = N_PROMPT - 2, -1.5
    try:
        name, hook_fn = answer(direction, multiplier, start, layer=layer)
    except (TypeError, ValueError) as error:
        return wrong(f"expected a function as `steering`, which gives a name and a hook; this one raised: {error}")
    if not callable(hook_fn) or not isinstance(name, str):
        return wrong("expected a name and a hook, in this order")
    if name != SteeringVector.from_direction(direction, layer).hook_name:
        return wrong("the hook sits at another place than the stream behind block `layer`")
    found = []
    for resid in (prompt, token, later):
        given = resid.clone()
        try:
            out = hook_fn(given, hook=SimpleNamespace(name=name, layer=lambda: layer, ctx={}))
        except Exception as error:  # whatever a learner's hook raises is told to the learner
            return wrong(f"your hook raised {type(error).__name__}: {error}")
        if not torch.equal(given, resid):
            return wrong("your hook changes the tensor that it was given: others may hold it")
        if not isinstance(out, Tensor) or out.shape != resid.shape:
            return wrong("your hook has to return the stream, in the shape in which it came")
        found.append((out - resid)[0] / (multiplier * direction))  # [pos d_model]: 1 where it is steered
    pushed = [where.mean(-1).round(decimals=4).tolist() for where in found]
    if not all(bool(torch.allclose(where, where[:, :1].expand_as(where), atol=1e-3)) for where in found):
        return wrong("what is added is not `multiplier * direction`")
    return _of_pushes(pushed, start)


def _of_pushes(pushed: list[list[float]], start: int) -> Verdict:
    """How often each position of the prompt and of two tokens behind it was pushed, as a verdict."""
    before, after = pushed[0][:start], pushed[0][start:]
    if any(before):
        return wrong("the prompt is steered before `start`")
    if not all(each == 1 for each in after):
        return wrong("of the prompt, every token from `start` on is to be steered, once; not its last one alone")
    if not any(pushed[1] + pushed[2]):
        return wrong("a single new token is still left alone: what is `resid.shape[1]` then?")
    if not all(each == 1 for each in pushed[1] + pushed[2]):
        return wrong("every new token is to be steered, once")
    return RIGHT


def _differences(
    model: Any, pairs: ContrastSet, layers: list[int], position: Callable[[Prompt], int] | None = None
) -> Float[Tensor, "layer pair d_model"]:
    """Positive minus negative side of every pair, at one position; by default the mean over what `extract` reads."""

    def placed(prompt: Prompt) -> Prompt:
        return prompt if position is None else replace(prompt, read=(position(prompt), position(prompt) + 1))

    encoded = encode_pairs(model, pairs, resolve_format(model, None))
    prompts = [(placed(positive), placed(negative)) for positive, negative in encoded]
    found = torch.empty(len(layers), len(pairs), model.cfg.d_model)
    for sides, indices in read_pairs(model, prompts, layers=layers):  # [batch side layer d_model]
        found[:, list(indices)] = (sides[:, 0] - sides[:, 1]).transpose(0, 1).float().cpu()
    return found
