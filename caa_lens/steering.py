"""Steer a model inside a `with` block, in your own code.

Steering starts at the last token of the instruction and goes on through every generated token (paper section 3),
whatever the batching, padding or caching: see `hooks` for how positions are known.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from caa_lens.arguments import as_prompt, check_model, check_vector, describe
from caa_lens.hooks import Intervention
from caa_lens.open_blocks import OpenBlock
from caa_lens.overflow import check_steps
from caa_lens.positions import Positions, Reach, check_positions, chosen
from caa_lens.prompts import Prompt, PromptBatch, explain, left_pad
from caa_lens.steered_runs import NothingSteeredWarning
from caa_lens.steered_runs import OtherPromptWarning as OtherPromptWarning
from caa_lens.steered_runs import VisiblePaddingWarning as VisiblePaddingWarning
from caa_lens.vectors import SteeringVector, SteeringVectors


class OverlappingBlocksWarning(UserWarning):
    """Two blocks on one model were open at once without one being inside the other; runs in between had both."""


Steering = SteeringVector | tuple[SteeringVector, float | int | Tensor] | Intervention


def steer(
    model: Any,
    *vectors: Steering,
    prompt: str | Prompt | Sequence[str | Prompt] | None = None,
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
        vectors: vectors, `(vector, multiplier)` pairs or `Intervention`s, of any layers.
        prompt: what will be run; steering starts at its instruction's last token, so every prompt takes a block of its
            own. A string is put into the model's own prompt format: run the tokens of that, since
            `model.to_tokens(string)` is shorter and ends before steering starts. Several prompts mean a left-padded
            batch of them, as `caa_lens.prompts.left_pad(prompts, n_ctx=...)` makes it: run its `tokens` with its
            `attention_mask`.
        start: instead of a prompt, the first steered position in padded coordinates, a number or `[batch]`; 0 steers
            everything.
        positions: what is steered, if not everything from the start on: a span `(first, stop)`, half-open, None for an
            end that never comes; a bool mask `[batch pos]`, behind whose last column nothing is steered; or "last",
            the prompt's last token. A span counts from the prompt's own first token, or without a prompt in padded
            coordinates; a mask always does the latter.
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
    if prompt is None and start is None and positions is None:
        raise ValueError(
            "say where steering starts: either prompt=..., or start=... (start=0 steers every position), or "
            "positions=..."
        )
    if prompt is not None:
        given = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        prompts = [as_prompt(model, one) for one in given]
        batch = left_pad(prompts, n_ctx=model.cfg.n_ctx, device=model.W_E.device)
        where = _in_batch(positions, batch)
        if positions is None:
            start = int(batch.steer_start[0]) if len(prompts) == 1 else batch.steer_start
        if explain_positions:
            for row, some in enumerate(prompts):
                _show(explain(some, model.tokenizer) if where is None else _explain(some, model, where, batch, row))
    elif positions is not None:
        where = check_positions(positions)
    if prompt is None and explain_positions:
        _show(f"every position from {start} on is steered" if where is None else f"steered {Reach.of(where)}")
    made = as_interventions(model, vectors, multiplier=multiplier, start=start, positions=where)
    return SteeredBlock(model, made, batch)


def _in_batch(positions: str | Positions | None, batch: PromptBatch) -> Positions | None:
    """A prompt's own positions in the coordinates of the left-padded batch."""
    n_rows, n_pos = batch.tokens.shape
    if isinstance(positions, str) and positions == "last":
        return n_pos - 1, n_pos  # padding is on the left
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
        self._open: list[OpenBlock] = []  # one of each time that it is open
        self._entered = False

    def __enter__(self) -> Any:
        self._entered = True
        self._open.append(OpenBlock(self.model, self.interventions, self.prompts))
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
        vectors = ", ".join(f"{one.multiplier} * {one.vector!r}" for one in self.interventions)
        places = sorted({str(Reach.of(one.where)) for one in self.interventions}) or ["nowhere"]
        return f"steers {vectors or 'nothing'} {' or '.join(places)}, inside `with cl.steer(...):`"


def as_interventions(
    model: Any,
    vectors: Sequence[Steering],
    *,
    multiplier: float | int | Tensor = 1.0,
    start: int | Tensor | None = None,
    positions: Positions | None = None,
) -> list[Intervention]:
    """Interventions from the forms a user may write, checked against the model.

    Raises:
        TypeError: for anything else, `SteeringVectors` included: iterated over, it would steer at all its layers.
        ValueError: for a vector that does not fit the model.
    """
    if isinstance(vectors, SteeringVectors):
        raise TypeError("expected a list of vectors, got SteeringVectors: choose a layer, as in [vectors[13]]")
    if isinstance(vectors, SteeringVector | Intervention):
        raise TypeError(f"expected a list of vectors, got one {type(vectors).__name__}: put it into a list")
    if not isinstance(vectors, Sequence) or isinstance(vectors, str):
        raise TypeError(f"expected a list of vectors, got {describe(vectors)}: without any, [], nothing is steered")
    interventions = []
    for given in vectors:
        if isinstance(given, Intervention):
            made = replace(given, start=start, positions=positions) if given.where is None else given
        elif isinstance(given, SteeringVector):
            made = Intervention(vector=given, multiplier=multiplier, start=start, positions=positions)
        elif _is_pair(given):
            made = Intervention(vector=given[0], multiplier=given[1], start=start, positions=positions)
        else:
            if isinstance(given, int | float):
                remedy = "a multiplier stands in a pair with its vector, as in (vectors[13], 2.0)"
            elif isinstance(given, list):
                remedy = "leave out the list: steer takes vectors one after another, generate one list of them"
            else:
                remedy = (
                    "of SteeringVectors choose a layer, as in vectors[13], and of a tensor make a vector with "
                    "SteeringVector.from_direction"
                )
            raise TypeError(
                "expected a SteeringVector, a (SteeringVector, multiplier) pair or an Intervention, got "
                f"{describe(given)}; {remedy}"
            )
        check_vector(model, made.vector)
        interventions.append(made)
    check_steps(model, interventions)
    return interventions


def _is_pair(given: object) -> bool:
    """A vector with something that is meant as its multiplier."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        return False
    return isinstance(given[0], SteeringVector) and not isinstance(given[1], SteeringVector | tuple | Intervention)


def _show(text: str) -> None:
    """Print for a person who asked for it, in a notebook or a terminal."""
    from rich.console import Console

    Console().print(text, markup=False, highlight=False)
