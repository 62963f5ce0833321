"""The divergence of layers and multipliers on neutral prompts: of every candidate on few tokens, of some on more.

The two are kept apart: a divergence on few tokens is never set against one on more.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from caa_lens.measures.calibrating.affordable import Lengths
from caa_lens.measures.calibrating.neutral_cost import n_answer_tokens, shortened
from caa_lens.measures.calibrating.within_budget import end_within, measured_end, next_trial
from caa_lens.measures.divergence import token_kl
from caa_lens.measures.elsewhere.neutral_text import mean_and_p95
from caa_lens.measures.placed_conditions import Condition
from caa_lens.prompts.prompt_formats import Prompt

Key = tuple[int, float]  # a layer, and a multiplier with its sign
ROUNDS = 3  # of looking for the ends of a range


class CellCosts:
    """Mean and 95th percentile of the token KL of `(layer, multiplier)`, in nats.

    Attributes:
        few: of every candidate, on few tokens.
        full: of those that were measured on more.
        n_few, n_full: on how many tokens.
    """

    def __init__(
        self,
        model: Any,
        unsteered: Sequence[Prompt],
        condition: Callable[[int, float], Condition],
        lengths: Lengths,
        candidates: Sequence[Key],
        *,
        max_tokens: int | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.condition = model, condition
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress}
        some, self.prompts = shortened(unsteered, lengths.few), shortened(unsteered, lengths.full)
        self.n_few, self.n_full = n_answer_tokens(some), n_answer_tokens(self.prompts)
        self.few = self._measured(some, candidates)
        self.full: dict[Key, tuple[float, float]] = {}

    def measure(self, keys: Sequence[Key]) -> None:
        """Measure those that are not yet measured on more tokens."""
        if left := sorted(set(keys) - set(self.full)):
            self.full |= self._measured(self.prompts, left)

    def narrow(self, layers: Sequence[int], budget: float) -> None:
        """Measure what it takes to know the largest multiplier within a budget, of each sign, and of both together."""
        self.measure([key for layer in layers for key in self._around(layer, budget)])
        for _ in range(ROUNDS):
            trials = [
                (layer, sign * trial)
                for layer in layers
                for sign in (-1, 1)
                if (trial := next_trial(self.of_sign(layer, sign), budget)) is not None
            ]
            if not trials:
                break
            self.measure(trials)
        ends = [(layer, measured_end(self.of_sign(layer, sign), budget)) for layer in layers for sign in (-1, 1)]
        self.measure([(layer, sign * m) for layer, m in ends if m is not None for sign in (-1, 1)])

    def of_sign(self, layer: int, sign: int) -> dict[float, float]:
        """Mean KL by |multiplier| of one sign, of those measured on more tokens."""
        return {abs(m): kl for (at, m), (kl, _) in self.full.items() if at == layer and m * sign > 0}

    def both_signs(self, layer: int, *, full: bool) -> dict[float, float]:
        """The larger mean KL of both signs, by multiplier."""
        costs = self.full if full else self.few
        own = {m for at, m in costs if at == layer}
        return {m: max(costs[layer, m][0], costs[layer, -m][0]) for m in sorted(own) if m > 0 and -m in own}

    def _around(self, layer: int, budget: float) -> list[Key]:
        """The swept multipliers up to the first that few tokens put well over the budget: at least one."""
        found = []
        for sign in (-1, 1):
            few = {abs(m): kl for (at, m), (kl, _) in self.few.items() if at == layer and m * sign > 0}
            # Few tokens may be wrong by much: one more multiplier than they say.
            end = end_within(few, 2 * budget) or 0.0
            above = [m for m in sorted(few) if m > end]
            found += [(layer, sign * m) for m in sorted(few) if m <= end or m in above[:1]]
        return found

    def _measured(self, prompts: Sequence[Prompt], keys: Sequence[Key]) -> dict[Key, tuple[float, float]]:
        conditions = [self.condition(*key) for key in keys]
        tokens = torch.cat(token_kl(self.model, prompts, conditions, **self.options), dim=1)
        return dict(zip(keys, map(mean_and_p95, tokens), strict=True))


def without(kl: Mapping[float, float], broken: Sequence[float]) -> dict[float, float]:
    """The same with those over any budget whose scores are not finite."""
    return {m: float("inf") if m in broken else one for m, one in kl.items()}
