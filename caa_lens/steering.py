"""Steer a model inside a `with` block, in your own code.

Steering starts at the last token of the instruction and goes on through every generated token (paper section 3),
whatever the batching, padding or caching: see `hooks` for how positions are known.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caa_lens.arguments import as_prompt, check_hook_points, check_layers, check_model, check_width, describe
from caa_lens.hooks import Intervention
from caa_lens.prompts import Prompt, PromptBatch, explain, left_pad
from caa_lens.vectors import SteeringVector, SteeringVectors


class OtherPromptWarning(UserWarning):
    """The model ran another text than the prompt that `steer` was told, so steering started elsewhere in it."""


class NothingSteeredWarning(UserWarning):
    """`steer` without a `with` block, or a run in a block that ended before the first steered position."""


Steering = SteeringVector | tuple[SteeringVector, float | int | Tensor] | Intervention


def steer(
    model: Any,
    *vectors: Steering,
    prompt: str | Prompt | Sequence[str | Prompt] | None = None,
    start: int | Tensor | None = None,
    multiplier: float | int | Tensor = 1.0,
    explain_positions: bool = False,
) -> "SteeredBlock":
    """Steer everything the model runs inside a `with` block; composes with the caller's own hooks.

        prompt = Prompt.of(model, "How was your day?")
        with steer(model, 1.5 * v, prompt=prompt):
            model.generate(torch.tensor([prompt.tokens]))

    Args:
        vectors: vectors, `(vector, multiplier)` pairs or `Intervention`s, of any layers.
        prompt: what will be run; steering starts at its instruction's last token, so every prompt takes a block of its
            own. A string is put into the model's own prompt format: run the tokens of that, since
            `model.to_tokens(string)` is shorter and ends before steering starts. Several prompts mean a left-padded
            batch of them, as `caa_lens.prompts.left_pad(prompts, n_ctx=...)` makes it: run its `tokens` with its
            `attention_mask`.
        start: instead of a prompt, the first steered position in padded coordinates, a number or `[batch]`; 0 steers
            everything.
        multiplier: for vectors given without one; a number or `[batch]`.
        explain_positions: print which tokens are steered.

    Raises:
        ValueError: if neither or both of `prompt` and `start` are given, or a vector does not fit the model.

    Warns:
        NothingSteeredWarning: at the end of the block, if a run of the model in it ended before steering starts; and
            if there was no block.
        OtherPromptWarning: at the end of the block, if a run did not begin with the prompt.
    """
    check_model(model)
    batch = None
    if (prompt is None) == (start is None):
        both = "not both" if start is not None else "(start=0 steers every position)"
        raise ValueError(f"say where steering starts: either prompt=..., or start=..., {both}")
    if prompt is not None:
        given = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        prompts = [as_prompt(model, one) for one in given]
        batch = left_pad(prompts, n_ctx=model.cfg.n_ctx, device=model.W_E.device)
        start = int(batch.steer_start[0]) if len(prompts) == 1 else batch.steer_start
        if explain_positions:
            for some in prompts:
                _show(explain(some, model.tokenizer))
    elif explain_positions:
        _show(f"every position from {start} on is steered")
    return SteeredBlock(model, as_interventions(model, vectors, multiplier=multiplier, start=start), batch)


class SteeredBlock:
    """What `steer` returns: steers what its model runs inside a `with` block, and nothing outside of one."""

    def __init__(self, model: Any, interventions: Sequence[Intervention], prompts: PromptBatch | None = None) -> None:
        self.model = model
        self.interventions = tuple(interventions)
        self.prompts = prompts
        self._embedded: Tensor | None = None  # `[batch pos d_model]` of the tokens that run
        self._other_prompt = False
        self._hooks: list[Any] = []  # what to close, one of each open block
        self._entered = False
        self._runs: list[int] = []  # tokens of every run of the model in the block, those of its KV cache included

    def __enter__(self) -> Any:
        self._entered, self._runs, self._other_prompt = True, [], False
        hooks: list[tuple] = [intervention.hook() for intervention in self.interventions]
        if hooks:
            # What a block attends to, `[batch head query key]`, grows with a KV cache; so chunks of a prompt add up. No
            # other steered block runs without the lowest.
            lowest = min(intervention.vector.layer for intervention in self.interventions)
            hooks.append((f"blocks.{lowest}.attn.hook_pattern", self._measure))
            if self.prompts is not None:
                hooks.append(("hook_embed", self._keep))
        block = self.model.hooks(fwd_hooks=hooks)
        block.__enter__()
        self._hooks.append(block)
        return self.model

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)
        if error[0] is not None:
            return
        first = self._first_steered
        short = [length for length in self._runs if length <= first]
        if short:
            of = f" in {len(short)} of {len(self._runs)} runs" if len(short) < len(self._runs) else ""
            warnings.warn(
                f"nothing was steered{of}: what the model ran has {short[0]} tokens, and steering starts at position "
                f"{first}. Run the prompt's own tokens, torch.tensor([Prompt.of(model, question).tokens]): they are "
                "more than the question's; or give start=0",
                NothingSteeredWarning,
                stacklevel=2,
            )
        elif self._other_prompt:
            warnings.warn(
                "the model ran another text than the prompt that steer was told, so steering started elsewhere in it: "
                "give every prompt a block of its own, or generate(..., vectors=[...]), which needs none",
                OtherPromptWarning,
                stacklevel=2,
            )

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                "nothing was steered: steer(...) works in a block, `with cl.steer(...):`, around what the model runs",
                NothingSteeredWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        vectors = ", ".join(f"{one.multiplier} * {one.vector!r}" for one in self.interventions)
        return f"steers {vectors or 'nothing'} from position {self._first_steered} on, inside `with cl.steer(...):`"

    @property
    def _first_steered(self) -> int:
        starts = [0 if one.start is None else int(torch.as_tensor(one.start).min()) for one in self.interventions]
        return min(starts, default=0)

    def _measure(self, pattern: Tensor, hook: Any) -> None:
        *_, n_queries, n_keys = pattern.shape
        if n_queries == n_keys or not self._runs:  # nothing is behind: a new run, not the next chunk of one
            self._runs.append(n_keys)
        self._runs[-1] = n_keys
        embedded, self._embedded = self._embedded, None  # a run that starts above the embedding has none
        if self.prompts is not None and embedded is not None:
            self._other_prompt |= not self._are_of(self.prompts, embedded, behind=n_keys - n_queries)

    def _keep(self, embedded: Tensor, hook: Any) -> None:
        self._embedded = embedded

    def _are_of(self, prompts: PromptBatch, embedded: Tensor, *, behind: int) -> bool:
        """Whether tokens, by their embeddings `[batch pos d_model]`, are the prompts', as far as these go."""
        here = slice(behind, behind + embedded.shape[1])
        tokens, real = prompts.tokens[:, here], prompts.attention_mask[:, here]
        n_rows, n_pos = tokens.shape
        if n_pos == 0 or n_rows not in (1, len(embedded)):  # behind the prompts' end, without waiting for a GPU
            return True
        same = (embedded[:, :n_pos] == self.model.W_E[tokens]).all(-1)
        return bool((same | ~real).all())


def as_interventions(
    model: Any,
    vectors: Sequence[Steering],
    *,
    multiplier: float | int | Tensor = 1.0,
    start: int | Tensor | None = None,
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
            keep = given.start if given.start is not None else start
            made = Intervention(vector=given.vector, multiplier=given.multiplier, start=keep, operator=given.operator)
        elif isinstance(given, SteeringVector):
            made = Intervention(vector=given, multiplier=multiplier, start=start)
        elif _is_pair(given):
            made = Intervention(vector=given[0], multiplier=given[1], start=start)
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
        check_layers(model, [made.vector.layer])
        check_width(model, made.vector)
        check_hook_points(model, made.vector.layer)
        interventions.append(made)
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
