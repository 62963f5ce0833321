"""Which layers and multipliers are within a budget, and which of them has the largest effect: numbers only, no model.

A cell is a layer and a multiplier m > 0; its effect is score(+m) - score(-m), by question, and it is within the budget
where both signs are. At each layer the cells are the swept multipliers that are within, and the *end*: the largest that
is, between two swept ones. Divergence is taken as a power of the multiplier there, and each question's effect as linear
in it. An end is thus foretold; `next_trial` says what to measure to be sure of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# An end is looked for at this share of the budget, so that it is not missed from above, and is near enough where there
# is at most this much more to win.
AIM, CLOSE = 0.97, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A layer and a multiplier within the budget, both signs."""

    layer: int
    multiplier: float


def end_within(kl: Mapping[float, float], budget: float) -> float | None:
    """The largest multiplier within a budget, foretold between those that were measured; None where not even the first.

    Args:
        kl: divergence by multiplier, all above 0. One that is NaN is over any budget.
    """
    multipliers = sorted(kl)
    for i, m in enumerate(multipliers):
        if kl[m] <= budget:
            continue
        if i == 0:
            return None
        below = multipliers[i - 1]
        # A divergence of 0 is a rounded one.
        low, high = max(kl[below], 1e-9), kl[m]
        if not math.isfinite(high) or low >= budget:
            return below
        return below * (m / below) ** (math.log(budget / low) / math.log(high / low))
    return multipliers[-1]


def measured_end(kl: Mapping[float, float], budget: float) -> float | None:
    """The largest measured multiplier up to which all that were measured are within a budget."""
    end = None
    for m in sorted(kl):
        if not kl[m] <= budget:
            break
        end = m
    return end


def next_trial(kl: Mapping[float, float], budget: float) -> float | None:
    """The multiplier to measure next on the way to the end, of three digits; None where the end is near enough."""
    measured, foretold = measured_end(kl, budget), end_within(kl, AIM * budget)
    if measured is None or foretold is None:
        return None
    trial = _three_digits_below(foretold)
    return trial if trial > measured * (1 + CLOSE) and trial not in kl else None


def effects_at(
    effects: Float[np.ndarray, "question multiplier"], multipliers: Sequence[float], m: float
) -> Float[np.ndarray, " question"]:
    """Each question's effect at a multiplier, linear between the swept ones around it."""
    swept = np.asarray(multipliers, float)
    above = int(np.clip(np.searchsorted(swept, m), 1, len(swept) - 1)) if len(swept) > 1 else 0
    if len(swept) == 1 or m in multipliers:
        return effects[:, list(multipliers).index(m)]
    share = (m - swept[above - 1]) / (swept[above] - swept[above - 1])
    return (1 - share) * effects[:, above - 1] + share * effects[:, above]


def cells_within(
    kl: Mapping[int, Mapping[float, float]], multipliers: Sequence[float], budget: float, *, measured: bool
) -> list[Cell]:
    """At each layer the swept multipliers within a budget, and the end.

    Args:
        kl: by layer and multiplier, the larger of both signs.
        measured: take the largest measured multiplier for the end, not the foretold one.
    """
    find = measured_end if measured else end_within
    found = []
    for layer, own in kl.items():
        end = find(own, budget)
        if end is not None:
            ms = sorted({*(m for m in multipliers if m <= end and m in own and own[m] <= budget), end})
            found += [Cell(layer=layer, multiplier=m) for m in ms]
    return found


def effects_of(
    effects: Mapping[int, Float[np.ndarray, "question multiplier"]], multipliers: Sequence[float], cells: Sequence[Cell]
) -> Float[np.ndarray, "question cell"]:
    """The effect of each question in each cell."""
    return np.stack([effects_at(effects[one.layer], multipliers, one.multiplier) for one in cells], axis=1)


def leading_layers(
    effects: Mapping[int, Float[np.ndarray, "question multiplier"]],
    multipliers: Sequence[float],
    kl: Mapping[int, Mapping[float, float]],
    budget: float,
    n: int,
) -> list[int]:
    """The layers with the largest mean effect within a budget; where none has any, those that come nearest to it."""
    cells = cells_within(kl, multipliers, budget, measured=False)
    if not cells:
        return sorted(kl, key=lambda layer: _or_infinite(kl[layer][min(kl[layer])]))[:n]
    best: dict[int, float] = {}
    for one, mean in zip(cells, effects_of(effects, multipliers, cells).mean(0), strict=True):
        best[one.layer] = max(best.get(one.layer, -math.inf), float(mean))
    return sorted(best, key=lambda layer: -best[layer])[:n]


def largest(
    effects: Mapping[int, Float[np.ndarray, "question multiplier"]], multipliers: Sequence[float], cells: Sequence[Cell]
) -> Cell:
    """The cell with the largest mean effect."""
    return cells[int(effects_of(effects, multipliers, cells).mean(0).argmax())]


def _three_digits_below(m: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(m)) - 2)
    return float(f"{math.floor(m / unit * (1 + 1e-12)) * unit:.3g}")


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
