"""A finished comparison: effect against cost for every method, and both at the same cost.

The cost is the mean divergence by token on neutral prompts, in nats (`measures.divergence`). At a budget, the effect of
each question is interpolated in the logarithm of the cost between the two swept strengths that lie around it: near 0
the cost grows as the square of the strength, so few strengths do. Below the weakest swept strength the other point is
strength 0, where effect and cost are exactly 0; there the effect is taken in proportion to the strength, and that to
the root of the cost. Nothing is extrapolated: a method that stays below a budget at the end of its own range is shown
at that end, and is said not to reach it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from caa_lens.arguments import check_list
from caa_lens.measures.answers import METRIC_LABEL
from caa_lens.measures.elsewhere.neutral_text import OF_TEXT
from caa_lens.measures.intervals import bootstrap_interval, mean_with_interval
from caa_lens.methods.costs import Cost
from caa_lens.plots.comparison import effect_against_cost
from caa_lens.provenance import last_part
from caa_lens.results import Result

BUDGETS = (0.05, 0.1, 0.3)
NOTHING, WORDS = "no steering", "in words"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen for a method on the validation part.

    Attributes:
        method: its name.
        setting: the chosen layer, or number of elements; `unit` says which.
        value: its score there: the mean effect of both signs, each towards its own side, at the budget of the choice.
        tried: of all settings, in their order: (setting, score).
        up, down: the strengths of each sign with the largest effect within the largest budget; 0 if none is within.
    """

    method: str
    setting: int
    unit: str
    value: float
    tried: tuple[tuple[int, float], ...]
    up: float
    down: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison(Result):
    """Methods on the same test questions, at the same side effects.

    Attributes:
        frame: columns `method, setting, layers, positions, site, strength, behavior, question, score, effect` (the
            score less that without steering), and by method and strength `kl_mean, kl_p95` of the unsteered model's
            neutral answers, `kl_steered, kl_steered_p95, perplexity, repetition` of the steered ones, and `checked,
            checked_low, checked_high` of their text (NaN where they were not asked for). "no steering" and "in words"
            are controls, as is the method "random".
        choices: what was chosen for each method on the validation part.
        costs: of each method.
        metric: "p_matching" or "margin", what a score is.
        budgets: mean divergences at which methods are compared, in nats a token.
        n_neutral: how many neutral prompts divergences are means over.
    """

    choices: tuple[Choice, ...]
    costs: tuple[Cost, ...]
    metric: str
    budgets: tuple[float, ...] = BUDGETS
    n_neutral: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have strengths, in their order."""
        found = dict.fromkeys(self.frame["method"])
        return tuple(one for one in found if one not in (NOTHING, WORDS))

    def curves(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """By method and strength the mean effect over questions with its 95 % interval, and the costs."""
        cells = ["method", "strength"]
        means = mean_with_interval(self.frame, cells, "effect", n_resamples=n_resamples, seed=seed)
        costs = ["kl_mean", "kl_p95", *OF_TEXT]
        about = ["setting", "layers", "positions", "site", *costs]
        others = self.frame.drop_duplicates(cells)[[*cells, *about]]
        order = {name: i for i, name in enumerate(dict.fromkeys(self.frame["method"]))}
        found = means.merge(others, on=cells)
        return found.sort_values(cells, key=lambda one: one.map(order) if one.name == "method" else one).reset_index(
            drop=True
        )

    def at_kl(
        self,
        budgets: Sequence[float | int] | None = None,
        *,
        reference: str = "CAA",
        n_resamples: int = 2000,
        seed: int | None = 0,
    ) -> pd.DataFrame:
        """Effects at the same mean divergence, and how much more than another method's, paired by question.

        Args:
            budgets: in nats a token; those of the comparison by default.
            reference: the method that the others are set against.

        Returns:
            Columns `kl, method, sign, strength, effect, low, high, more, more_low, more_high, reached, at`: `more` is
            the effect less the reference's; where a budget is not `reached`, all is of the end of the method's range,
            whose divergence is `at`, and `more` is NaN.

        Raises:
            ValueError: for budgets that are not above 0, or a reference that was not compared.
        """
        asked = self.budgets if budgets is None else check_list("budgets", budgets, float)
        if not asked or min(asked) <= 0:
            raise ValueError(f"budgets are divergences above 0 nats, got {list(asked)}")
        if reference not in self.methods:
            raise ValueError(f"{reference!r} was not compared: expected one of {', '.join(self.methods)}")
        keys = [(budget, name, sign) for budget in asked for name in self.methods for sign in (1, -1)]
        found = {key: self._matched(*key) for key in keys}
        columns = []
        for budget, name, sign in keys:
            own, other = found[budget, name, sign], found[budget, reference, sign]
            paired = own.effects - other.effects if own.reached and other.reached else np.full_like(own.effects, np.nan)
            columns += [own.effects, paired]
        low, high = bootstrap_interval(np.stack(columns, axis=1), n_resamples=n_resamples, seed=seed)
        rows = []
        for i, (budget, name, sign) in enumerate(keys):
            own = found[budget, name, sign]
            rows.append(
                {
                    "kl": budget,
                    "method": name,
                    "sign": sign,
                    "strength": own.strength,
                    "effect": own.effects.mean(),
                    "low": low[2 * i],
                    "high": high[2 * i],
                    "more": columns[2 * i + 1].mean(),
                    "more_low": low[2 * i + 1],
                    "more_high": high[2 * i + 1],
                    "reached": own.reached,
                    "at": own.kl,
                }
            )
        return pd.DataFrame(rows)

    def _matched(self, budget: float, name: str, sign: int) -> "Matched":
        rows = self.frame[(self.frame["method"] == name) & (self.frame["strength"] * sign > 0)]
        table = rows.pivot(index="question", columns="strength", values="effect")
        order = sorted((float(s) for s in table.columns), key=abs)
        kl = rows.groupby("strength")["kl_mean"].first()
        return matched(order, [float(kl[s]) for s in order], table[order].to_numpy(), budget)

    def chosen(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """The test part at the strengths that the validation part chose, with the controls: rows of `curves`."""
        wanted = {(one.method, s) for one in self.choices for s in (one.up, one.down) if s}
        curves = self.curves(n_resamples, seed)
        here = [
            (name, strength) in wanted or name in (NOTHING, WORDS)
            for name, strength in zip(curves["method"], curves["strength"], strict=True)
        ]
        return curves[here].reset_index(drop=True)

    def table(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """`at_kl` as it is printed: a row a method and sign, a column a budget, as "+0.45 [+0.31, +0.58]".

        Where a method ends before a budget, its end stands there, with the divergence that it has: "... ends at 0.012".
        """
        found = self.at_kl(reference=self.methods[0], n_resamples=n_resamples, seed=seed)
        cells = {
            (one.method, one.sign, one.kl): f"{one.effect:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            + ("" if one.reached else f" ends at {one.at:.3g}")
            for one in found.itertuples()
        }
        return pd.DataFrame(
            [
                {"method": name, "sign": "+" if sign > 0 else "-"}
                | {f"KL {budget:g}": cells[name, sign, budget] for budget in self.budgets}
                for name in self.methods
                for sign in (1, -1)
            ]
        )

    def summary(self) -> pd.DataFrame:
        """Effects at the same divergence: one row a method and sign, one column a budget.

        NaN where the method ends before; `end_kl` and `end_effect` are of the strongest that was swept.
        """
        table = self.at_kl(n_resamples=0, reference=self.methods[0])
        table["effect"] = table["effect"].where(table["reached"])
        wide = table.pivot(index=["method", "sign"], columns="kl", values="effect")
        wide = wide.reindex([(name, sign) for name in self.methods for sign in (1, -1)]).reset_index()
        ends = [self._matched(math.inf, name, sign) for name, sign in zip(wide["method"], wide["sign"], strict=True)]
        wide["end_kl"] = [one.kl for one in ends]
        wide["end_effect"] = [float(one.effects.mean()) for one in ends]
        wide.columns.name = None
        return wide

    def costs_frame(self) -> pd.DataFrame:
        """The costs as a frame, one row a method."""
        return pd.DataFrame([{name: getattr(one, name) for name in Cost.__slots__} for one in self.costs])

    def plot(self) -> go.Figure:
        """Effect against divergence for every method, both signs; controls are single points."""
        return effect_against_cost(
            self.curves(),
            behavior=str(self.frame["behavior"].iloc[0]),
            label=METRIC_LABEL[self.metric],
            n_questions=int(self.frame["question"].nunique()),
            n_neutral=self.n_neutral,
            points=(NOTHING, WORDS),
            model=last_part(self.settings.get("model", "")),
        )

    def __repr__(self) -> str:
        n = self.frame["question"].nunique()
        behavior = self.frame["behavior"].iloc[0]
        return f"Comparison({behavior}, {self.metric}, {len(self.methods)} methods x {n} questions)"


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """A method at a budget: the effect of each question, the strength, and whether the budget is within its range."""

    effects: np.ndarray
    strength: float
    kl: float
    reached: bool


def matched(strengths: Sequence[float], kl: Sequence[float], effects: np.ndarray, budget: float | int) -> Matched:
    """The effects at a budget, between the first two neighbouring strengths whose divergences lie around it.

    Args:
        strengths: of one sign, from weak to strong.
        kl: the mean divergence of each, in nats.
        effects: `[question strength]`.

    Weights are linear in log KL; below the weakest strength the effect is in proportion to the root of KL, from 0 on.
    Where the budget is beyond all strengths, the strongest, marked as not reached.
    """
    if kl[0] > budget:
        share = math.sqrt(budget / kl[0])
        return Matched(share * effects[:, 0], share * strengths[0], float(budget), True)
    for i in range(len(kl) - 1):
        low, high = kl[i], kl[i + 1]
        if low <= budget <= high and low > 0:
            share = 0.0 if high == low else math.log(budget / low) / math.log(high / low)
            effect = (1 - share) * effects[:, i] + share * effects[:, i + 1]
            strength = (1 - share) * strengths[i] + share * strengths[i + 1]
            return Matched(effect, strength, float(budget), True)
    end = len(kl) - 1
    return Matched(effects[:, end], strengths[end], kl[end], kl[end] == budget)
