"""Several prompts as one batch: padding is on the left, and every position moves by its row's padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptBatch:
    """Left-padded prompts; all positions are padded coordinates.

    Attributes:
        tokens: token ids, `[batch pos]`.
        attention_mask: False on padding, `[batch pos]`.
        padding: number of padding tokens of each row, `[batch]`.
        steer_start: first steered position of each row, `[batch]`.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    padding: Int[Tensor, " batch"]
    steer_start: Int[Tensor, " batch"]


def left_pad(prompts: Sequence[Any], *, n_ctx: int, device: torch.device | str = "cpu", room: int = 0) -> PromptBatch:
    """Pad prompts (`caa_lens.prompts.Prompt`) on the left to one length.

    Args:
        n_ctx: the model's context length.
        room: tokens that will be generated after the prompt.

    Raises:
        ValueError: if there are no prompts, or a prompt with `room` more tokens does not fit into the context.
    """
    if not prompts:
        raise ValueError("no prompts given: expected at least one")
    for prompt in prompts:
        check_fits(prompt, n_ctx, room)
    length = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros((len(prompts), length), dtype=torch.long)
    padding = torch.tensor([length - len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt.tokens)
    return PromptBatch(
        tokens=tokens.to(device),
        attention_mask=(torch.arange(length) >= padding[:, None]).to(device),
        padding=padding.to(device),
        steer_start=(padding + torch.tensor([prompt.steer_start for prompt in prompts])).to(device),
    )


def check_fits(prompt: Any, n_ctx: int, room: int = 0) -> None:
    """Raise a ValueError if a prompt, with `room` tokens to come, is longer than the context."""
    if len(prompt) + room > n_ctx:
        wanted = f"{len(prompt)} tokens" + (f" and {room} to generate" if room else "")
        raise ValueError(
            f"the prompt has {wanted}, but the model's context is {n_ctx}: shorten it"
            f"{', or generate fewer' if room else ''}. It ends {prompt.text[-80:]!r}"
        )


def check_steered(prompt: Any) -> None:
    """Raise a ValueError if steering would start behind a prompt that is only read."""
    if prompt.steer_start >= len(prompt):
        raise ValueError(
            f"steering would start at position {prompt.steer_start}, behind the prompt, so that nothing of it is "
            "steered: give the beginning of an answer too, or a format with start_offset=0"
        )


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
