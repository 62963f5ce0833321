"""The `causal` and the `effect` reading of a lens: what the model answers a vector; formulas in `lens`.

Both follow the vector through every block above its layer. `stream_responses` runs vector and controls as rows behind
each prompt; here the last block's outputs become scores over the vocabulary. Where logits are linear in the normalised
stream, only its mean change is kept, and unembedded once a direction; elsewhere (a soft cap, hooks of the caller's own)
every state becomes logits, a group of layers at a time, so that the table of all directions fits into memory.

The causal scores are the exact derivative of the logits, final norm included: the norm's own derivative at the
prompt's unsteered state, not the norm of the response, in which a response along the state would count that in truth
changes nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor

from caa_lens.engine.overflow import check_finite
from caa_lens.engine.stream_responses import ReadPrompt, Response, responses, tangents
from caa_lens.interpretation.lens_controls import Controlled, controlled_sums
from caa_lens.interpretation.lens_edits import Intervened, edits_of
from caa_lens.models.loading.device_memory import free_memory
from caa_lens.models.unembedding import (
    AT_ONCE,
    final_logits,
    is_linear_behind_the_norm,
    normalised,
    normalised_change,
    unembed_linear,
)


@torch.no_grad()
def read_downstream(
    model: Any,
    steps: Float[Tensor, "layer direction d_model"],
    layers: Sequence[int],
    prompts: Sequence[ReadPrompt],
    *,
    to_first_order: bool,
    acting: Sequence[Intervened] | None = None,
    tokens: Sequence[int] = (),
    with_probabilities: bool = False,
    progress: bool = True,
) -> tuple[list[Controlled], Float[Tensor, "layer d_vocab"] | None]:
    """Mean over prompts, and each prompt's positions, of every direction's change of the logits.

    To first order the scores are logits, centred over the vocabulary; else nats, the change of log p. If asked for,
    the mean change of the vector's probabilities, too, of the same order.

    Args:
        steps: direction 0 of each layer is the vector times its multiplier, the others are controls.
        acting: what is done instead of adding the steps, one for each layer; see `lens_edits`.
        tokens: whose ranks under the controls are wanted.
    """
    linear = is_linear_behind_the_norm(model)
    n_directions, d_vocab = steps.shape[1], model.cfg.d_vocab
    bytes_of_layer = n_directions * 2 * d_vocab * 4
    at_once = len(layers) if linear else max(1, free_memory(steps.device) // 4 // bytes_of_layer)
    found: list[Controlled] = []
    probabilities: list[Tensor] = []
    for first in range(0, len(layers), at_once):
        some = slice(first, first + at_once)
        sums = _Sums(model, steps[some].shape[0], n_directions, len(prompts), to_first_order, linear)
        what = "response of the logits" if to_first_order else "effect on the logits"
        for one in responses(
            model,
            prompts,
            steps[some],
            layers[some],
            to_first_order=to_first_order,
            edits=None if acting is None else edits_of(model, acting[some]),
            what=what,
            progress=progress,
        ):
            sums.add(one, with_probabilities)
        found += sums.controlled(tokens)
        probabilities.append(sums.probabilities)
    return found, torch.cat(probabilities) if with_probabilities else None


@torch.no_grad()
def carried_down(
    model: Any,
    states: Float[Tensor, "layer state d_model"],
    layers: Sequence[int],
    prompts: Sequence[ReadPrompt],
    *,
    progress: bool = True,
) -> Float[Tensor, "layer state d_model"]:
    """J_l h of each state h, with J_l the mean over prompts, and each prompt's positions, as in `residual_stream`."""
    carried, n_states = torch.zeros_like(states), states.shape[1]
    what = "states carried to the last block"
    for one in responses(model, prompts, states, layers, to_first_order=True, what=what, progress=progress):
        check_finite(model, one.after, "responses")
        steps = one.steps.to(states.device)
        carried[steps // n_states, steps % n_states] += one.after.mean(1).to(states) / len(prompts)
    return carried


class _Sums:
    """Sums over prompts of what each direction changes, for both halves of the prompts."""

    def __init__(
        self, model: Any, n_layers: int, n_directions: int, n_prompts: int, to_first_order: bool, linear: bool
    ) -> None:
        self.model, self.to_first_order, self.linear = model, to_first_order, linear
        self.n_directions, self.n_prompts = n_directions, n_prompts
        width = model.cfg.d_model if linear else model.cfg.d_vocab
        self.changes = torch.zeros(n_layers, n_directions, 2, width)
        # Of the vector alone: what softmax subtracts, and the probabilities.
        self.normaliser = torch.zeros(n_layers)
        self.probabilities = torch.zeros(n_layers, model.cfg.d_vocab)

    def add(self, one: Response, with_probabilities: bool) -> None:
        half, weight = one.prompt % 2, 1 / one.before.shape[0]
        layer, direction = one.steps // self.n_directions, one.steps % self.n_directions
        # What is added to, where, and what: it comes down from the device in one piece.
        told: list[tuple[Tensor, Any, Tensor]] = []
        if self.linear:
            if self.to_first_order:
                change = normalised_change(self.model, one.before, one.after)
            else:
                change = normalised(self.model, one.after) - normalised(self.model, one.before)
            told.append((self.changes, (layer, direction, half), change.sum(1)))
        else:
            for row, (i, j) in enumerate(zip(layer.tolist(), direction.tolist(), strict=True)):
                for before, after in self._pieces(one.before, one.after[row]):
                    told.append((self.changes, (i, j, half), self._logits(before, after)[1].sum(0)))
        wanted = with_probabilities or not self.to_first_order
        vectors = (direction == 0).nonzero().flatten() if wanted else direction[:0]
        for rows in vectors.split(max(1, AT_ONCE // one.before.shape[0])):
            for before, after in self._pieces(one.before, one.after[rows.to(one.after.device)]):
                logits, change = self._logits(before, after)
                p = logits.softmax(-1)
                if self.to_first_order:
                    moved = p * (change - (p * change).sum(-1, keepdim=True))
                else:
                    moved = (logits + change).softmax(-1) - p
                    normaliser = (logits + change).logsumexp(-1) - logits.logsumexp(-1)
                    told.append((self.normaliser, layer[rows], normaliser.sum(-1) / self.n_prompts))
                told.append((self.probabilities, layer[rows], moved.sum(-2) / self.n_prompts))
        finite = torch.isfinite(one.after).all()
        flat = torch.cat([finite.float()[None], *(values.float().flatten() for _, _, values in told)]).cpu()
        if not flat[0]:
            check_finite(self.model, one.after, "responses")
        pieces = flat[1:].split([values.numel() for _, _, values in told])
        for (sums, where, values), piece in zip(told, pieces, strict=True):
            sums[where] += weight * piece.reshape(values.shape)

    def _pieces(self, before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some positions at a time."""
        return zip(before.split(AT_ONCE), after.split(AT_ONCE, dim=-2), strict=True)

    def _logits(
        self, before: Float[Tensor, "pos d_model"], after: Float[Tensor, "*step pos d_model"]
    ) -> tuple[Float[Tensor, "pos d_vocab"], Float[Tensor, "*step pos d_vocab"]]:
        """The logits of some states, and what each step changes of them."""
        logits = final_logits(self.model, before)
        if not self.to_first_order:
            return logits, final_logits(self.model, after) - logits
        if self.linear:
            return logits, unembed_linear(self.model, normalised_change(self.model, before, after))
        with tangents():
            told = final_logits(self.model, forward_ad.make_dual(before.expand_as(after).clone(), after.clone()))
            change = forward_ad.unpack_dual(told).tangent
            if change is None:
                raise ValueError(
                    f"what stands behind the blocks of {self.model.cfg.model_name} has no derivative: read it with "
                    "reading='effect'"
                )
            return logits, change.clone()

    def controlled(self, tokens: Sequence[int]) -> list[Controlled]:
        """The mean scores, layer by layer; only one layer's whole table is held at a time."""
        counts, odd = ((self.n_prompts + 1) // 2, self.n_prompts // 2), self.to_first_order
        return [
            controlled_sums(self.model, changes, counts, tokens, odd=odd, normaliser=None if odd else float(normaliser))
            for changes, normaliser in zip(self.changes, self.normaliser, strict=True)
        ]


def linearity(effect: Float[Tensor, " d_vocab"], causal: Float[Tensor, " d_vocab"]) -> tuple[float, float]:
    """How far the finite change is from the linear one: their cosine over the vocabulary, and their ratio of sizes.

    Both centred. (1, 1) is a linear answer; a ratio below 1, one that saturates.
    """
    one, other = (each.double() - each.double().mean() for each in (effect, causal))
    size = other.norm().clamp_min(1e-300)
    return float(one @ other / (one.norm().clamp_min(1e-300) * size)), float(one.norm() / size)
