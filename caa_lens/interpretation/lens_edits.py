"""What the `effect` reading does to the stream where it is not just a vector that is added.

A vector under another operator is read beside random directions of its norm under the same operator. A fitted method
has parameters that no direction stands for; it is read beside random directions that are added where it acts, as long
as what it changes of the stream: with `changed(h)` the stream behind the block with the method, h without it, ::

    push     mean of changed(h) - h           over the prompts' tokens that it changes
    length   mean of || changed(h) - h ||     of the controls

`linearity` then compares the effect with the `causal` reading of the push.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.engine.staircase import EditedCondition
from caa_lens.engine.stream_responses import Edits, ReadPrompt
from caa_lens.engine.streams import last_residual, reading
from caa_lens.interpretation.lens_controls import random_directions
from caa_lens.interpretation.lens_options import LensOptions
from caa_lens.models.placement import device_behind, device_of_tokens
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import HOOK_POINT
from caa_lens.steering.interventions import Intervention, check_intervention
from caa_lens.steering.placing import placed
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

Condition = tuple[Intervention, ...]
Intervened = Sequence[Condition]
"""What is done at one layer: first what is read, then each control."""


def vectors_acting(
    vectors: SteeringVectors,
    layers: Sequence[int],
    steps: Float[Tensor, "layer direction d_model"],
    options: LensOptions,
) -> list[Intervened]:
    """Each layer's vector, and the controls among the steps, under an operator."""
    found: list[Intervened] = []
    multiplier = options.multiplier
    for layer, row in zip(layers, steps, strict=True):
        controls = [SteeringVector.from_direction(each / multiplier, layer=layer) for each in row[1:].cpu()]
        found.append(
            [
                (
                    Intervention(
                        vector=one, multiplier=multiplier, operator=options.operator, positions=options.positions
                    ),
                )
                for one in (vectors[layer], *controls)
            ]
        )
    return found


def method_acting(
    model: Any,
    fitted: Any,
    layers: Sequence[int],
    prompts: Sequence[ReadPrompt],
    options: LensOptions,
) -> tuple[list[Intervened], Float[Tensor, "layer direction d_model"]]:
    """A fitted method at each layer alone with its controls, and what they add; row 0 is the method's mean push.

    Raises:
        ValueError: for a method that changes nothing at one of the layers, or acts nowhere in the prompts.
    """
    acting: list[Intervened] = []
    steps = []
    drawn = random_directions(options.controls, model.cfg.d_model, options.seed)
    plain = [_streams(model, one, layers) for one in prompts]
    for layer in layers:
        condition = tuple(fitted.at([layer]).interventions(options.multiplier, positions=options.positions))
        for one in condition:
            check_intervention(model, one)
        push, length = _push(model, condition, layer, prompts, plain)
        where = condition[0].where if isinstance(condition[0].where, str) else "caa"
        if where == "front":  # which is as long as parameters by position, and the controls have none
            where = "all"
        controls = [SteeringVector.from_direction(length * each, layer=layer) for each in drawn]
        acting.append([condition, *((Intervention(vector=one, positions=where),) for one in controls)])
        steps.append(torch.stack([push, *(one.direction for one in controls)]))
    return acting, torch.stack(steps).to(device_behind(model))


def edits_of(model: Any, acting: Sequence[Intervened]) -> Edits:
    """All layers' interventions as edits; counted from the steering start, if all act from there on."""
    conditions = [condition for one in acting for condition in one]
    if all(_acts_from_the_end(one) for condition in conditions for one in condition):
        return [tuple(one._at((0, None)) for one in condition) for condition in conditions]
    return lambda prompt: [_in_place(model, condition, prompt) for condition in conditions]


def _acts_from_the_end(one: Intervention) -> bool:
    return one.where in (None, "caa") and one.gate is None and one.n_rows is None and one.site == HOOK_POINT


def _in_place(model: Any, condition: Condition, prompt: Prompt) -> EditedCondition:
    """Edits counted from a prompt's own first token."""
    named = [replace(one, positions="caa") if one.where is None else one for one in condition]
    found = []
    for one in placed(model, named, [prompt]):
        assert one.where is not None
        assert not isinstance(one.where, str)
        found.append(one._at(one.where))
    return tuple(found)


def _tokens(model: Any, one: ReadPrompt) -> Int[Tensor, "1 pos"]:
    return torch.tensor([one.prompt.tokens[: one.stop]], device=device_of_tokens(model))


@torch.no_grad()
def _streams(model: Any, one: ReadPrompt, layers: Sequence[int]) -> dict[int, Tensor]:
    """A prompt's stream behind each layer, `[pos d_model]`, without anything done to it."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, resid: Tensor) -> None:
        found[layer] = resid[0]

    with reading(model, layers, keep):
        last_residual(model, _tokens(model, one), n_layers=max(layers) + 1)
    return found


@torch.no_grad()
def _push(
    model: Any,
    condition: Condition,
    layer: int,
    prompts: Sequence[ReadPrompt],
    plain: Sequence[Mapping[int, Tensor]],
) -> tuple[Float[Tensor, " d_model"], float]:
    """What a condition changes of the stream behind a layer: the mean change, and the mean length of a change."""
    changes = []
    for one, without in zip(prompts, plain, strict=True):
        edits = _in_place(model, condition, one.prompt)
        with_it = last_residual(model, _tokens(model, one), edits=edits, n_layers=layer + 1)[0]
        change = with_it.float() - without[layer].float()
        changes.append(change[change.any(-1)].cpu())
    told = torch.cat(changes)
    if not len(told):
        raise ValueError(
            f"nothing changes the stream at layer {layer} in any of {len(prompts)} prompts: give prompts that open the "
            "method's gate, a strength other than 0, or leave the layer out, as in layers=[...]"
        )
    return told.mean(0), float(told.norm(dim=-1).mean())
