"""Read `resid_post` at chosen positions: of any prompts, and of both answers of contrast pairs.

Both are generators over batches, so memory does not grow with the number of prompts. Only the positions asked for
are kept; a prompt's span of several tokens is averaged in float32. What is read is what comes out of a block's
`hook_resid_post` after all hooks, also where another module stands in its place (a sparse autoencoder, say).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import check_count
from caa_lens.engine import shared_prefix
from caa_lens.engine.plain_runs import plain_runs
from caa_lens.engine.streams import last_residual, reading
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_of_tokens
from caa_lens.prompts.batches import left_pad, n_common
from caa_lens.prompts.checks import check_prompt
from caa_lens.prompts.prompt_formats import Prompt


def read_residuals(
    model: Any, prompts: Sequence[Prompt], *, layers: Sequence[int] | None = None, batch_size: int = 8
) -> Iterator[Float[Tensor, "batch layer d_model"]]:
    """Mean `resid_post` over each prompt's `read` span, in float32, batch by batch in the given order.

    Layers come as `check_layers` gives them: distinct and ascending, however they were asked for.
    Runs the model itself, so the caller's own hooks are felt, those of torch too. Where these, or the model, might not
    bear padding, every prompt runs by itself (see `plain_runs`).
    """
    yield from _spans(model, prompts, layers, batch_size, lambda resid: resid)


def read_norms(
    model: Any, prompts: Sequence[Prompt], *, layers: Sequence[int] | None = None, batch_size: int = 8
) -> Iterator[Float[Tensor, "batch layer"]]:
    """Mean over each prompt's `read` span of ||resid_post||, otherwise as `read_residuals`."""
    for norms in _spans(model, prompts, layers, batch_size, lambda resid: resid.norm(dim=-1, keepdim=True)):
        yield norms[..., 0]


def _spans(
    model: Any,
    prompts: Sequence[Prompt],
    layers: Sequence[int] | None,
    batch_size: int,
    of_token: Callable[[Tensor], Tensor],
) -> Iterator[Float[Tensor, "batch layer size"]]:
    """The mean of `of_token(resid_post)` over each prompt's span, where it keeps `[... pos d_model]` but the last."""
    check_model(model)
    batch_size = check_count("batch_size", batch_size)
    layers = check_layers(model, layers)
    for prompt in prompts:
        check_prompt(model, prompt)
    at_once = batch_size if plain_runs(model).padded else 1
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        parts = [_read_batch(model, some[i : i + at_once], layers, of_token) for i in range(0, len(some), at_once)]
        yield torch.cat(parts)


def _read_batch(
    model: Any, prompts: Sequence[Prompt], layers: Sequence[int], of_token: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch layer size"]:
    device = device_of_tokens(model)
    batch = left_pad(prompts, n_ctx=model.cfg.n_ctx, device=device)
    length = batch.tokens.shape[1]  # the padding is known without asking the device
    spans = [tuple(length - len(prompt) + end for end in prompt.read) for prompt in prompts]
    kept: dict[int, Tensor] = {}

    def keep(layer: int, resid: Tensor) -> None:
        means = [of_token(row[start:stop].float()).mean(0) for row, (start, stop) in zip(resid, spans, strict=True)]
        kept[layer] = torch.stack(means).to(device)

    with torch.no_grad(), reading(model, layers, keep):
        last_residual(model, batch.tokens, batch.attention_mask, n_layers=layers[-1] + 1)
    return torch.stack([kept[layer] for layer in layers], dim=1)


def read_pairs(
    model: Any,
    pairs: Sequence[tuple[Prompt, Prompt]],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[Float[Tensor, "pair side layer d_model"], Sequence[int]]]:
    """`read_residuals` of both prompts of each pair, side 0 positive and side 1 negative, running what they share once.

    Yields:
        The activations of a batch of pairs, in float32, and the pairs' indices. Pairs come sorted by length, longest
        first, so that padding is small and the largest memory need shows at once.
    """
    layers = check_layers(model, layers)
    reason = shared_prefix.unsupported(model)
    if reason is not None:
        shared_prefix.warn_unshared(reason)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        some = [pairs[i] for i in indices]
        if reason is None:
            yield _read_with_shared_prefix(model, some, layers), indices
        else:
            sides = [
                next(read_residuals(model, [pair[side] for pair in some], layers=layers, batch_size=batch_size))
                for side in (0, 1)
            ]
            yield torch.stack(sides, dim=1), indices


@torch.inference_mode()
def _read_with_shared_prefix(
    model: Any, pairs: Sequence[tuple[Prompt, Prompt]], layers: Sequence[int]
) -> Float[Tensor, "pair side layer d_model"]:
    shared = [_shared_length(positive, negative) for positive, negative in pairs]
    n_layers = layers[-1] + 1
    prefix = shared_prefix.prefill(model, [pair[0].tokens[:n] for pair, n in zip(pairs, shared, strict=True)], n_layers)
    suffixes = [[prompt.tokens[n:] for prompt in pair] for pair, n in zip(pairs, shared, strict=True)]
    n_pos = max(len(row) for rows in suffixes for row in rows)
    weights = torch.zeros(len(pairs), 2, n_pos)  # averages over each row's read span
    for i, (pair, n) in enumerate(zip(pairs, shared, strict=True)):
        for side, prompt in enumerate(pair):
            start, stop = prompt.read
            weights[i, side, start - n : stop - n] = 1 / (stop - start)
    weights = weights.to(device_of_tokens(model))
    place = {layer: i for i, layer in enumerate(layers)}
    kept = torch.empty(len(pairs), 2, len(layers), model.cfg.d_model, device=weights.device)
    questions = sides = slice(None)

    def coming(*which: slice) -> None:
        nonlocal questions, sides
        questions, sides = which

    def keep(layer: int, resid: Tensor) -> Tensor:
        if layer in place:
            weight = weights[questions, sides, : resid.shape[2], None].to(resid.device)
            kept[questions, sides, place[layer]] = (weight * resid.float()).sum(2).to(kept.device)
        return resid

    shared_prefix.run_suffixes(model, prefix, suffixes, keep, n_layers, coming)
    return kept


def _shared_length(positive: Prompt, negative: Prompt) -> int:
    """Number of leading tokens that two prompts share before either is read."""
    limit = min(positive.read[0], negative.read[0])
    return min(limit, n_common(positive.tokens, negative.tokens))
