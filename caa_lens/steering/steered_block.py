"""Steer a model inside a `with` block, in your own code.

Steering starts at the last token of the instruction and goes on through every generated token (paper section 3),
whatever the batching, padding or caching: see `hooks` for how positions are known.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caa_lens.contrast.messages import Asked
from caa_lens.engine.positions import Positions, Reach, check_positions, chosen
from caa_lens.models.checks import check_model
from caa_lens.models.placement import device_of_tokens
from caa_lens.prompts.batches import PromptBatch, left_pad
from caa_lens.prompts.checks import as_prompt, listed
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.prompts.token_table import explain
from caa_lens.steering.interventions import POSITIONS, Intervention, Steering, as_interventions
from caa_lens.steering.open_blocks import OpenBlock
from caa_lens.steering.placing import placed, placed_span
from caa_lens.steering.steered_runs import NothingSteeredWarning


class OverlappingBlocksWarning(UserWarning):
    """Two blocks on one model were open at once without one being inside the other; runs in between had both."""


def steer(
    model: Any,
    *vectors: Steering,
    prompt: Asked | Prompt | Sequence[Asked | Prompt] | None = None,
    start: int | Tensor | None = None,
    positions: str | Positions | None = None,
    multiplier: float | int | Tensor = 1.0,
    explain_positions: bool = False,
) -> "SteeredBlock":
    """Steer everything the model runs inside a `with` block; composes with the caller's own hooks.

        prompt = Prompt.of(model, "How was your day?")
        with steer(model, 1.5 * v, prompt=prompt):
            model.generate(torch.tensor([prompt.tokens]))

    What `torch.compile` made of the model drops hooks, so inside the block everything runs uncompiled. A block is its
    thread's: runs of other threads are steered too, but they cannot open a block of their own on the same model.

    Args:
        vectors: vectors, `(vector, multiplier)` pairs or `Intervention`s, of any layers. What an intervention itself
            says (multiplier, start, positions) comes before what is said here.
        prompt: what will be run; steering starts at its instruction's last token, so every prompt takes a block of its
            own. A string, or a list of messages, is put into the model's own prompt format: run the tokens of that,
            since `model.to_tokens(string)` is shorter and ends before steering starts. Several prompts mean a padded
            batch of them, as `caa_lens.prompts.left_pad(prompts, n_ctx=...)` makes it: run its `tokens` with its
            `attention_mask`.
        start: instead of a prompt, the first steered position in padded coordinates, a number or `[batch]`; 0 steers
            everything.
        positions: what is steered, if not everything from the start on: a span `(first, stop)`, half-open, None for an
            end that never comes; a bool mask `[batch pos]`, behind whose last column nothing is steered; or a name,
            such as "last" for the prompt's last token, see `caa_lens.steering.placing`. A span counts from the prompt's
            own first token, or without a prompt in padded coordinates; a mask always does the latter.
        multiplier: for vectors given without one; a number or `[batch]`.
        explain_positions: print which tokens are steered.

    Raises:
        ValueError: if it is not said what is steered, or said twice, or a vector does not fit the model.
        RuntimeError: on entering, if another thread or task has a block open on this model, or inside of a compiled
            function.

    Warns:
        NothingSteeredWarning: at the end of the block, if a run of the model in it ended before steering starts, did
            not go through a vector's layer, or ran without the hooks; and if there was no block.
        OtherPromptWarning: at the end of the block, if a run did not begin with the prompt.
        VisiblePaddingWarning: at the end of the block, if attention saw the padding of a batch.
        OverlappingBlocksWarning: if blocks of one model end in another order than they began.
    """
    check_model(model, may_be_compiled=True)
    batch, where = None, None
    if start is not None and (prompt is not None or positions is not None):
        other = "prompt" if prompt is not None else "positions"
        raise ValueError(f"say where steering starts: either {other}=..., or start=..., not both")
    all_say = bool(vectors) and all(isinstance(one, Intervention) and one.where is not None for one in vectors)
    if prompt is None and start is None and positions is None and not all_say:
        raise ValueError(
            "say where steering starts: either prompt=..., or start=... (start=0 steers every position), or "
            "positions=...; or in every vector, as an Intervention"
        )
    if prompt is not None:
        prompts = [as_prompt(model, one) for one in listed(prompt)]
        batch = left_pad(prompts, n_ctx=model.cfg.n_ctx, device=device_of_tokens(model))
        if isinstance(positions, str) and positions in POSITIONS:
            where = placed_span(positions, prompts, batch.padding.tolist())
        else:
            where = _in_batch(positions, batch)  # which refuses other texts
        if positions is None:
            start = int(batch.steer_start[0]) if len(prompts) == 1 else batch.steer_start
        if explain_positions:
            for row, some in enumerate(prompts):
                _show(explain(some, model.tokenizer) if where is None else _explain(some, model, where, batch, row))
    elif positions is not None:
        where = check_positions(positions)
    made = as_interventions(model, vectors, multiplier=multiplier, start=start, positions=where)
    if batch is not None:
        made = placed(model, made, prompts, batch.padding.tolist())
    if prompt is None and explain_positions:
        places = sorted({str(Reach.of(one.edit().positions)) for one in made}) if start is None else []
        for line in [f"steered {place}" for place in places] or [f"every position from {start} on is steered"]:
            _show(line)
    return SteeredBlock(model, made, batch)


def _in_batch(positions: str | Positions | None, batch: PromptBatch) -> Positions | None:
    """A prompt's own positions in the coordinates of the left-padded batch."""
    n_rows = len(batch.tokens)
    checked = None if positions is None else check_positions(positions)
    if not isinstance(checked, tuple) or n_rows == 1:
        return checked
    first, stop = checked
    padding = batch.padding
    moved = None if stop is None else torch.as_tensor(stop, device=padding.device) + padding
    return torch.as_tensor(first, device=padding.device) + padding, moved


def _explain(prompt: Prompt, model: Any, where: Positions, batch: PromptBatch, row: int) -> str:
    n_rows, n_pos = batch.tokens.shape
    steered = chosen(where, behind=0, n_rows=n_rows, n_pos=n_pos, device=batch.tokens.device)
    steered = steered.expand(n_rows, n_pos)[row, n_pos - len(prompt) :]
    reach = Reach.of(where)
    after = "every generated token is steered" if reach.stop is None else "no generated token is steered"
    if reach.stop is not None and reach.stop > n_pos:
        after = f"of the generated tokens, those before position {reach.stop} of the batch are steered"
    return f"{explain(prompt, model.tokenizer, steered=steered.tolist())}\nand {after}"


class SteeredBlock:
    """What `steer` returns: steers what its model runs inside a `with` block, and nothing outside of one."""

    def __init__(self, model: Any, interventions: Sequence[Intervention], prompts: PromptBatch | None = None) -> None:
        self.model = model
        self.interventions = tuple(interventions)
        self.prompts = prompts
        self._edits = [one.edit() for one in interventions]
        self._open: list[OpenBlock] = []  # one of each time that it is open
        self._entered = False

    def __enter__(self) -> Any:
        self._entered = True
        self._open.append(OpenBlock(self.model, self._edits, self.prompts))
        return self.model

    def __exit__(self, *error: Any) -> None:
        entered = self._open.pop()
        overlapping = entered.leave()
        if error[0] is not None or entered.runs is None:
            return
        for warning in entered.runs.warnings():
            warnings.warn(warning, stacklevel=2)
        if overlapping:
            warnings.warn(
                "a block that was opened later on this model is still open, and what ran since then had the vectors of "
                "both: end one block before the next begins, or put one inside the other",
                OverlappingBlocksWarning,
                stacklevel=2,
            )

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn(
                "nothing was steered: steer(...) works in a block, `with cl.steer(...):`, around what the model runs",
                NothingSteeredWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        vectors = ", ".join(one.in_words for one in self.interventions)
        places = sorted({str(Reach.of(edit.positions)) for edit in self._edits}) or ["nowhere"]
        return f"steers {vectors or 'nothing'} {' or '.join(places)}, inside `with cl.steer(...):`"


def _show(text: str) -> None:
    """Print for a person who asked for it, in a notebook or a terminal."""
    sys.stdout.write(text + "\n")
