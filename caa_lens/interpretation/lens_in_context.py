"""The `in_context` reading of the logit lens: a vector at the real residuals of pairs; formulas in `lens`."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.engine.activations import read_pairs
from caa_lens.interpretation.residual_stream import STATES_AT_ONCE
from caa_lens.models.unembedding import (
    centred,
    final_logits,
    final_norm,
    is_linear_behind_the_norm,
    normalised,
    unembed_linear,
)
from caa_lens.prompts.prompt_formats import Prompt


def read_in_context(
    model: Any,
    steps: Float[Tensor, "layer d_model"],
    layers: Sequence[int],
    prompts: Sequence[tuple[Prompt, Prompt]],
    *,
    background: int,
    seed: int,
    with_probabilities: bool,
) -> tuple[Float[Tensor, "layer d_vocab"], Float[Tensor, "layer d_vocab"] | None]:
    """Centred mean changes of the lens' logits, and if asked for of its probabilities, when a step is added.

    Args:
        steps: the vectors times the multiplier, one a layer.
        background: number of random directions whose mean is subtracted, each with its negative.

    Raises:
        ValueError: for a background where logits are not linear behind the final norm.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(background, model.cfg.d_model, generator=generator)
    units = (random / random.norm(dim=-1, keepdim=True)).to(steps.device)
    linear = is_linear_behind_the_norm(model)
    if background and not linear:
        raise ValueError(
            f"the logits of {model.cfg.model_name!r} are not linear in the normalised stream, which the background is "
            "computed from (a soft cap, or hooks of your own behind the blocks): use background=0"
        )
    shift = torch.zeros_like(steps)  # of the normalised stream, where all else is linear
    shifts = torch.zeros(len(layers), model.cfg.d_vocab, device=steps.device)  # of the logits, where it is not
    change = torch.zeros_like(shifts) if with_probabilities else None
    for sides, _ in read_pairs(model, prompts, layers=layers):
        states = sides.flatten(0, 1).to(steps.device)  # [state layer d_model]
        for i, step in enumerate(steps):
            resid = states[:, i]
            if linear:
                shift[i] += (normalised(model, resid + step) - normalised(model, resid)).sum(0)
            if background:
                shift[i] -= _background(model, resid, step.norm() * units)
            if change is None and linear:
                continue
            for some in resid.split(STATES_AT_ONCE // 2):  # half, for two tables of logits stand side by side
                after, before = final_logits(model, some + step), final_logits(model, some)
                if change is not None:
                    change[i] += (after.softmax(-1) - before.softmax(-1)).sum(0)
                if not linear:
                    shifts[i] += (after - before).sum(0)
    n_states = 2 * len(prompts)
    scores = unembed_linear(model, shift / n_states) if linear else shifts / n_states
    return scores - scores.mean(-1, keepdim=True), None if change is None else change / n_states


def _background(
    model: Any, resid: Float[Tensor, "state d_model"], directions: Float[Tensor, "direction d_model"]
) -> Float[Tensor, " d_model"]:
    """Sum over states h of the mean of normed(h + u) - normed(h) over the directions u and their negatives.

    From (h + u) / rms(h + u), with rms(h + u)^2 known from |h|, |u| and h . u: no state is ever added to a direction,
    which would take states x directions x d_model numbers.
    """
    before = normalised(model, resid).sum(0)
    norm = final_norm(model)
    if norm is None:
        return torch.zeros_like(before)  # h + u and h - u are as far from h
    resid, directions = centred(model, resid), centred(model, directions)
    squares = resid.pow(2).sum(-1, keepdim=True) + directions.pow(2).sum(-1)  # [state direction]
    products = resid @ directions.T
    d_model, eps = resid.shape[1], norm.eps
    plus = ((squares + 2 * products) / d_model + eps).rsqrt()
    minus = ((squares - 2 * products) / d_model + eps).rsqrt()
    of_resid = ((plus + minus).mean(1, keepdim=True) / 2 * resid).sum(0)
    of_directions = (plus - minus).sum(0) @ directions / (2 * len(directions))
    return of_resid + of_directions - before
