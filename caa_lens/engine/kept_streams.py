"""Streams that are kept behind one block, and run on from there: what a fit trains through, again and again.

Nothing below a layer depends on what is done at it or above, so the blocks up to it run once. Texts are padded on the
right: a causal model's earlier tokens do not see it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.engine.edits import Edit
from caa_lens.engine.plain_runs import plain_runs
from caa_lens.engine.streams import editing
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.placement import device_of_tokens
from caa_lens.prompts.batches import check_fits
from caa_lens.prompts.prompt_formats import Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streams:
    """`resid_post` of a batch of texts behind one block, padded on the right.

    Attributes:
        resid: in the model's dtype.
        layer: the block; -1 for what goes into the first.
        prompts: the texts.
    """

    resid: Float[Tensor, "batch pos d_model"]
    layer: int
    prompts: tuple[Prompt, ...]

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Ids, on the CPU; 0 behind a text's end."""
        return right_padded(self.prompts)


def read_streams(model: Any, prompts: Sequence[Prompt], layer: int, *, batch_size: int = 8) -> Iterator[Streams]:
    """Run the blocks up to a layer, and keep every token's stream behind it; -1 keeps what goes into the first block.

    Raises:
        ValueError: for a prompt that is longer than the context.
    """
    at_once = batch_size if plain_runs(model).padded else 1
    for prompt in prompts:
        check_fits(prompt, model.cfg.n_ctx)
    for first in range(0, len(prompts), at_once):
        some = tuple(prompts[first : first + at_once])
        tokens = right_padded(some).to(device_of_tokens(model))
        with torch.no_grad():
            resid = adapter_of(model).run(model, tokens, n_layers=layer + 1)
        yield Streams(resid=resid, layer=layer, prompts=some)


def run_on(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    resid: Float[Tensor, "batch pos d_model"],
    layer: int,
    *,
    until: int | None = None,
    edits: Sequence[Edit] = (),
) -> Float[Tensor, "batch pos d_model"]:
    """Run the blocks above a layer on its streams, up to and with block `until`; gradients are kept.

    Not every kind of model can start at a block: there the blocks below run as well, and what they write is forgotten.

    Args:
        tokens: whole texts from their first token on.
        resid: behind block `layer`, at all of them.
        edits: what is done at that layer and above; positions count from a text's first token.
    """
    for edit in edits:
        if edit.layer == layer:
            resid = edit.apply(resid, 0)
    n_layers = None if until is None else until + 1
    with editing(model, [edit for edit in edits if edit.layer > layer]):
        return adapter_of(model).run_on(model, tokens.to(device_of_tokens(model)), resid, layer, n_layers=n_layers)


def right_padded(prompts: Sequence[Prompt]) -> Int[Tensor, "batch pos"]:
    """Ids of prompts as one batch, 0 behind a text's end."""
    tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt.tokens)
    return tokens
