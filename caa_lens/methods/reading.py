"""Activations that fits read: of all prompts at once, at the stream or at a site inside of the blocks."""

from collections.abc import Sequence
from contextlib import ExitStack
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


def read_last_at_sites(
    model: Any,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    sites: Sequence[str],
    *,
    batch_size: int,
    what: str,
    progress: bool,
) -> dict[str, Float[Tensor, "prompt layer width"]]:
    """The numbers of sites inside of blocks at each prompt's last token, several heads as one width.

    In float32 on the CPU, by site.

    Raises:
        ValueError: for a site that a block does not have, or that its forward does not come to.
    """
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}
    at_once = batch_size if plain_runs(model).padded else 1
    with tqdm(total=len(prompts), desc=what, unit="prompt", disable=not progress) as bar, torch.no_grad():
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            found: dict[str, dict[int, Tensor]] = {site: {} for site in sites}
            with ExitStack() as readers:
                for site in sites:
                    readers.enter_context(reading_sites(model, layers, site, found[site].__setitem__))
                for streams in read_streams(model, some, layers[-1], batch_size=at_once):
                    last = torch.tensor([len(prompt) - 1 for prompt in streams.prompts])
                    for site in sites:
                        kept[site].append(_rows_at(found[site], layers, last, site))
            bar.update(len(some))
    return {site: torch.cat(rows) for site, rows in kept.items()}


def _rows_at(found: dict[int, Tensor], layers: Sequence[int], last: Tensor, site: str) -> Tensor:
    if missing := [layer for layer in layers if layer not in found]:
        raise ValueError(
            f"the model ran block {missing[0]}, and did not come to {site} in it, so that nothing can be read there: "
            "take another site, such as 'hook_resid_post'"
        )
    device = found[layers[0]].device  # one copy for all layers, up and down
    row, at = torch.arange(len(last), device=device), last.to(device)
    rows = [found[layer][row.to(found[layer].device), at.to(found[layer].device)] for layer in layers]
    return torch.stack([one.flatten(1).float().to(device) for one in rows], dim=1).cpu()


def at_last(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, to be read at their last token."""
    return [replace(prompt, read=(len(prompt) - 1, len(prompt))) for prompt in prompts]
