"""Activations that fits read: of all prompts at once, at the stream or at a site inside of the blocks."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.engine.activations import read_residuals
from caa_lens.engine.kept_streams import read_streams, run_on
from caa_lens.engine.plain_runs import plain_runs
from caa_lens.engine.streams import reading_sites
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import HOOK_POINT


def read_all(
    model: Any, prompts: Sequence[Prompt], layers: Sequence[int], *, batch_size: int, what: str, progress: bool
) -> Float[Tensor, "prompt layer d_model"]:
    """Mean `resid_post` over each prompt's `read` span, of all prompts, in float32 on the CPU."""
    kept = []
    with tqdm(total=len(prompts), desc=what, unit="prompt", disable=not progress) as bar:
        for some in read_residuals(model, prompts, layers=layers, batch_size=batch_size):
            kept.append(some.cpu())
            bar.update(len(some))
    return torch.cat(kept)


def read_every_token(
    model: Any, prompts: Sequence[Prompt], layers: Sequence[int], *, batch_size: int = 8
) -> list[Float[Tensor, "layer pos d_model"]]:
    """`resid_post` of every token of each prompt, in float32 on the CPU."""
    kept: list[Tensor] = []
    for streams in read_streams(model, prompts, layers[0], batch_size=batch_size):
        resid, at = streams.resid, [streams.resid.float().cpu()]
        with torch.no_grad():
            for below, layer in pairwise(layers):
                resid = run_on(model, streams.tokens, resid, below, until=layer)
                at.append(resid.float().cpu())
        every = torch.stack(at, dim=1)  # [batch layer pos d_model]
        kept += [row[:, : len(prompt)] for row, prompt in zip(every, streams.prompts, strict=True)]
    return kept


def read_last_at_site(
    model: Any,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    site: str,
    *,
    batch_size: int,
    what: str,
    progress: bool,
) -> Float[Tensor, "prompt layer width"]:
    """A site's numbers at each prompt's last token, several heads as one width, in float32 on the CPU."""
    if site == HOOK_POINT:
        return read_all(model, _at_last(prompts), layers, batch_size=batch_size, what=what, progress=progress)
    kept: list[Tensor] = []
    at_once = batch_size if plain_runs(model).padded else 1
    with tqdm(total=len(prompts), desc=what, unit="prompt", disable=not progress) as bar, torch.no_grad():
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            found: dict[int, Tensor] = {}
            with reading_sites(model, layers, site, found.__setitem__):
                for streams in read_streams(model, some, layers[-1], batch_size=at_once):
                    last = torch.tensor([len(prompt) - 1 for prompt in streams.prompts])
                    rows = [found[layer][torch.arange(len(last)), last.to(found[layer].device)] for layer in layers]
                    kept.append(torch.stack([row.flatten(1).float().cpu() for row in rows], dim=1))
            bar.update(len(some))
    return torch.cat(kept)


def _at_last(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(prompt, read=(len(prompt) - 1, len(prompt))) for prompt in prompts]
