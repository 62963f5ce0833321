"""Where named positions are in a prompt, and whether its gate is open: what an intervention leaves to the prompt.

    caa          from the end of the instruction on (the paper's)
    all          every token
    after_first  every token but the first, whose stream is like no other's
    prompt       every token before the answer
    answer       every token of the answer, or every generated one
    last         the prompt's last token, which predicts the answer's first
    front        as many tokens from the first on as the parameters have rows

Only what begins at the end of the instruction, or later, leaves the prompt's beginning as it was, so that conditions
can share it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.engine.activations import read_residuals
from caa_lens.engine.positions import Positions
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.interventions import Gate, Intervention


def span_of(name: str, prompt: Prompt, n_rows: int | None = None) -> tuple[int, int | None]:
    """The positions of a name in a prompt, counted from its own first token.

    Args:
        n_rows: of parameters that differ by position; they need as many positions, and "front" no more.

    Raises:
        ValueError: for a prompt that has fewer positions than "front" has parameters, or for other names more or fewer.
    """
    answer, start = prompt.answer_start, prompt.steer_start
    first = {"caa": start, "after_first": 1, "answer": answer, "last": answer - 1}.get(name, 0)
    stop: int | None = answer if name in ("prompt", "last") else None
    if name == "front":
        if n_rows is None:
            raise ValueError("'front' is as many tokens as there are parameters by position, and there are none")
        if answer < n_rows:
            raise ValueError(
                f"the prompt has {answer} tokens, fewer than the {n_rows} positions of the block that is added at its "
                "front: give a longer prompt, or positions='caa'"
            )
        return 0, n_rows
    if n_rows is None or name == "answer":
        return first, stop
    if answer - first != n_rows:
        raise ValueError(
            f"the prompt has {answer - first} positions {_in_words(name)}, but the parameters were made for {n_rows}, "
            "one a position: give prompts of the length that they were fitted on"
        )
    return first, first + n_rows


def placed(
    model: Any, interventions: Sequence[Intervention], prompts: Sequence[Prompt], padding: Sequence[int] | None = None
) -> list[Intervention]:
    """Interventions with their named positions as spans, and with their gates as one multiplier a prompt.

    Args:
        prompts: those of the batch that will be run.
        padding: tokens in front of each, by which its positions are moved.

    Raises:
        ValueError: as `span_of`; for a gate with other multipliers than one or one a prompt.
    """
    padding = [0] * len(prompts) if padding is None else list(padding)
    opened = open_gates(model, [one.gate for one in interventions if one.gate is not None], prompts)
    found = []
    for one in interventions:
        if one.gate is not None:
            multiplier = torch.as_tensor(one.multiplier, dtype=torch.float32)
            if multiplier.ndim and len(multiplier) != len(prompts):
                raise ValueError(f"multiplier has {len(multiplier)} entries for {len(prompts)} prompts")
            # Nothing is done where a gate is closed, to the bit.
            one = replace(one, gate=None, multiplier=multiplier.cpu() * opened[id(one.gate)])
        if isinstance(one.positions, str) or (one.where is None and one.n_rows is not None):
            name = one.positions if isinstance(one.positions, str) else "caa"
            spans = [span_of(name, prompt, one.n_rows) for prompt in prompts]
            one = replace(one, positions=_moved(spans, padding))
        found.append(one)
    return found


def open_gates(model: Any, gates: Sequence[Gate], prompts: Sequence[Prompt]) -> dict[int, Float[Tensor, " prompt"]]:
    """For each gate, by its id, 1 for the prompts that open it and else 0, from one run without steering."""
    if not gates:
        return {}
    layers = tuple(sorted({gate.layer for gate in gates}))
    at_last = [replace(prompt, read=(prompt.answer_start - 1, prompt.answer_start)) for prompt in prompts]
    states = torch.cat(list(read_residuals(model, at_last, layers=layers))).cpu()  # [prompt layer d_model]
    return {id(gate): gate.is_open(states[:, layers.index(gate.layer)]).float() for gate in gates}


def _moved(spans: Sequence[tuple[int, int | None]], padding: Sequence[int]) -> tuple[int | Tensor, int | Tensor | None]:
    """Spans of prompts as one of their left-padded batch: plain numbers where all rows have the same."""
    first = [begin + pad for (begin, _), pad in zip(spans, padding, strict=True)]
    stop = [None if end is None else end + pad for (_, end), pad in zip(spans, padding, strict=True)]

    def one_or_all(ends: list) -> Any:
        return ends[0] if len(set(ends)) == 1 else torch.tensor(ends)

    return one_or_all(first), one_or_all(stop)


def _in_words(name: str) -> str:
    return {"caa": "from the instruction's end to its own", "last": "at its end"}.get(name, "before the answer")


def placed_span(name: str, prompts: Sequence[Prompt], padding: Sequence[int]) -> Positions:
    """The positions of a name in a left-padded batch of prompts."""
    return _moved([span_of(name, prompt) for prompt in prompts], padding)
