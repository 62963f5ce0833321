"""The `in_context` reading of the logit lens: a vector at the real residuals of pairs; formulas in `lens`."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.engine.activations import read_pairs
from caa_lens.interpretation.lens_controls import Controlled, controlled_sums
from caa_lens.models.loading.device_memory import free_memory
from caa_lens.models.unembedding import (
    centred,
    final_logits,
    final_norm,
    is_linear_behind_the_norm,
    normalised,
)
from caa_lens.prompts.prompt_formats import Prompt

STATES_AT_ONCE = 32  # two tables of logits stand side by side: 2 x 32 x d_vocab x 4 bytes


def read_in_context(
    model: Any,
    steps: Float[Tensor, "layer direction d_model"],
    layers: Sequence[int],
    prompts: Sequence[tuple[Prompt, Prompt]],
    *,
    background: int,
    seed: int,
    tokens: Sequence[int] = (),
    with_probabilities: bool = False,
) -> tuple[list[Controlled], Float[Tensor, "layer d_vocab"] | None]:
    """Centred mean changes of the lens' logits when a step is added, and if asked for of its probabilities.

    Args:
        steps: direction 0 of each layer is the vector times the multiplier, the others are controls.
        background: number of random directions whose mean is subtracted, each with its negative.
        tokens: whose ranks under the controls are wanted.

    Raises:
        ValueError: for a background where logits are not linear behind the final norm.
    """
    linear = is_linear_behind_the_norm(model)
    if background and not linear:
        raise ValueError(
            f"the logits of {model.cfg.model_name!r} are not linear in the normalised stream, which the background is "
            "computed from (a soft cap, or hooks of your own behind the blocks): use background=0"
        )
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(background, model.cfg.d_model, generator=generator)
    units = (random / random.norm(dim=-1, keepdim=True)).to(steps.device)
    bytes_of_layer = steps.shape[1] * 2 * model.cfg.d_vocab * 4
    at_once = len(layers) if linear else max(1, free_memory(steps.device) // 4 // bytes_of_layer)
    found: list[Controlled] = []
    changes: list[Tensor] = []
    for first in range(0, len(layers), at_once):
        some = slice(first, first + at_once)
        sums, change = _sums(model, steps[some], layers[some], prompts, units, linear, with_probabilities)
        counts = 2 * ((len(prompts) + 1) // 2), 2 * (len(prompts) // 2)
        found += [controlled_sums(model, each, counts, tokens, odd=False) for each in sums]
        changes.append(change / (2 * len(prompts)))
    return found, torch.cat(changes) if with_probabilities else None


def _sums(
    model: Any,
    steps: Float[Tensor, "layer direction d_model"],
    layers: Sequence[int],
    prompts: Sequence[tuple[Prompt, Prompt]],
    units: Float[Tensor, "random d_model"],
    linear: bool,
    with_probabilities: bool,
) -> tuple[Float[Tensor, "layer direction half width"], Float[Tensor, "layer d_vocab"]]:
    """Sums over the states of either half of the pairs: of the normalised stream, or of logits; of probabilities."""
    n_layers, n_directions, d_vocab = *steps.shape[:2], model.cfg.d_vocab
    sums = torch.zeros(n_layers, n_directions, 2, model.cfg.d_model if linear else d_vocab, device=steps.device)
    change = torch.zeros(n_layers, d_vocab, device=steps.device)
    for sides, indices in read_pairs(model, prompts, layers=layers):
        states = sides.to(steps.device)  # [pair side layer d_model]
        for half in (0, 1):
            rows = torch.tensor([row for row, i in enumerate(indices) if i % 2 == half], dtype=torch.long)
            of_half = states[rows.to(states.device)].flatten(0, 1)  # [state layer d_model]
            for i, directions in enumerate(steps if len(of_half) else ()):
                resid = of_half[:, i]
                if linear:
                    before = normalised(model, resid).sum(0)
                    for j, step in enumerate(directions):
                        sums[i, j, half] += normalised(model, resid + step).sum(0) - before
                if len(units):
                    sums[i, :, half] -= _background(model, resid, directions[0].norm() * units)
                if linear and not with_probabilities:
                    continue
                for some in resid.split(STATES_AT_ONCE):
                    before = final_logits(model, some)
                    for j, step in enumerate(directions[:1] if linear else directions):
                        after = final_logits(model, some + step)
                        if not linear:
                            sums[i, j, half] += (after - before).sum(0)
                        if with_probabilities and j == 0:
                            change[i] += (after.softmax(-1) - before.softmax(-1)).sum(0)
    return sums, change


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
