"""What a calibration found: the result, with its tables and its sentences."""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.measures.answers import METRIC_LABEL
from caa_lens.measures.calibrating.neutral_cost import NeutralCost
from caa_lens.measures.sweeps import Sweep
from caa_lens.plots.calibration import effect_within_budget
from caa_lens.provenance import last_part, layer_ranges
from caa_lens.results import Result

STEERS, WRONG_WAY, NO_EFFECT, NONE = "steers", "steers the wrong way", "no effect found", "none within the budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A layer, a multiplier, and how far both ways the budget lets one go.

    Attributes:
        multiplier: above 0; it and its negative are within the budget.
        range: the most negative and the most positive multiplier within the budget that were measured. An end that is
            the largest swept multiplier may be reached before the budget is.
        effect, low, high: mean of score(+m) - score(-m) over questions that had no part in the choice, and its 95 %
            interval.
        agreeing: where all pairs choose and report in folds, the share of the parts that chose this cell.
    """

    layer: int
    multiplier: float
    range: tuple[float, float]
    effect: float
    low: float
    high: float
    agreeing: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration(Result):
    """Where and how much to steer within a budget of side effects.

    Attributes:
        frame: one row a candidate, and one for the end of what is within the budget at each leading layer: `behavior,
            layer, multiplier` (above 0: +m and -m together), `swept`, `validation` (mean effect on the pairs that
            chose; between two swept multipliers it is interpolated), `effect, low, high` (on the test part, always
            measured, with the 95 % bootstrap interval; NaN where it was not), `kl_mean, kl_p95` (nats a token, of the
            sign with the larger mean), `kl_tokens` (on how many: rows with other numbers are measured in other ways),
            `within` (the budget), `chosen`. If `cross_fitted`, only the chosen row has an effect, which is that of the
            choice, by questions that did not make it.
        settings: of the sweep; how many pairs chose, neutral prompts and tokens at each step, budget, price, seed.
        provenance: of the `vectors`.
        metric: "p_matching" or "margin", in whose units effects are.
        budget: mean token KL on neutral prompts, in nats.
        chosen: None where no candidate is within the budget.
        costs: on neutral prompts that chose nothing, unsteered first, then at what was chosen.
        cross_fitted: all pairs choose and report, in folds.
        n_choosing: how many of the scored questions, from the first on, choose.
        layers, multipliers: what was swept, 0 among the multipliers.
        logp_positive, logp_negative: of every question under every candidate, those that choose first.
        question_effects: of each test question at the chosen cell; empty where there is none, or if `cross_fitted`.
    """

    metric: str
    budget: float
    chosen: Chosen | None
    costs: tuple[NeutralCost, ...]
    cross_fitted: bool
    n_choosing: int
    layers: tuple[int, ...]
    multipliers: tuple[float, ...]
    logp_positive: Float[Tensor, "layer multiplier question"]
    logp_negative: Float[Tensor, "layer multiplier question"]
    question_effects: Float[Tensor, " tested"]

    @property
    def layer(self) -> int | None:
        """The chosen layer; None where nothing is within the budget."""
        return None if self.chosen is None else self.chosen.layer

    @property
    def multiplier(self) -> float | None:
        """The chosen multiplier, of either sign; None where nothing is within the budget."""
        return None if self.chosen is None else self.chosen.multiplier

    @property
    def range(self) -> tuple[float, float] | None:
        """The most negative and the most positive multiplier within the budget at the chosen layer."""
        return None if self.chosen is None else self.chosen.range

    @property
    def effect(self) -> float | None:
        """Mean of score(+m) - score(-m) at the chosen cell, on questions that had no part in the choice."""
        return None if self.chosen is None else self.chosen.effect

    @property
    def low(self) -> float | None:
        """Lower end of the effect's 95 % interval."""
        return None if self.chosen is None else self.chosen.low

    @property
    def high(self) -> float | None:
        """Upper end of the effect's 95 % interval."""
        return None if self.chosen is None else self.chosen.high

    @property
    def verdict(self) -> str:
        """What the interval says: "steers", "steers the wrong way", "no effect found", or "none within the budget"."""
        if self.chosen is None:
            return NONE
        if self.chosen.low > 0:
            return STEERS
        return WRONG_WAY if self.chosen.high < 0 else NO_EFFECT

    @property
    def sweep(self) -> Sweep:
        """The sweep of all candidates on the test questions, as `sweep` gives it; if `cross_fitted`, of all."""
        first = 0 if self.cross_fitted else self.n_choosing
        positive, negative = self.logp_positive[..., first:], self.logp_negative[..., first:]
        values = positive.exp() if self.metric == "p_matching" else positive - negative
        n_layers, n_multipliers, n_questions = positive.shape
        frame = pd.DataFrame(
            {
                "behavior": self.provenance["vectors"].behavior,
                "layer": np.repeat(self.layers, n_multipliers * n_questions),
                "multiplier": np.tile(np.repeat(self.multipliers, n_questions), n_layers),
                "question": np.tile(np.arange(n_questions), n_layers * n_multipliers),
                self.metric: values.flatten().numpy(),
                "logp_positive": positive.flatten().numpy(),
                "logp_negative": negative.flatten().numpy(),
                "positions": self.settings["positions"],
            }
        )
        return Sweep(frame=frame, settings=self.settings, provenance=self.provenance, metric=self.metric)

    def summary(self) -> pd.DataFrame:
        """The best candidate within the budget of each layer by the pairs that chose, the chosen one first.

        Where a layer was measured on more tokens, only such rows of it count.
        """
        own = self.frame[self.frame["within"]]
        most = own.groupby("layer")["kl_tokens"].transform("max")
        own = own[own["kl_tokens"] == most].sort_values(["chosen", "validation"], ascending=False, kind="stable")
        return own.drop_duplicates("layer").reset_index(drop=True)

    def costs_frame(self) -> pd.DataFrame:
        """Costs on neutral prompts that chose nothing: a row a multiplier, each number with `_low` and `_high`."""
        rows = []
        for one in self.costs:
            row: dict[str, float | None] = {"multiplier": one.multiplier}
            for name in ("kl_mean", "kl_p95", "perplexity", "repetition"):
                found = asdict(getattr(one, name))
                row |= {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
            rows.append(row)
        return pd.DataFrame(rows).astype(float)

    @property
    def text(self) -> str:
        """What was found, in sentences."""
        if self.chosen is None:
            return self._none()
        one, n_questions = self.chosen, self.logp_positive.shape[-1]
        who = f"the {n_questions - self.n_choosing} questions that did not choose it"
        if self.cross_fitted:
            who = f"{n_questions} questions, each under what others chose"
        numbers = f"{one.effect:+.3f} [{one.low:+.3f}, {one.high:+.3f}] on {who} ({METRIC_LABEL[self.metric]})"
        cell = f"layer {one.layer} with multiplier {one.multiplier:g}"
        found = {
            STEERS: f"At {cell}, +m against -m moves answers by {numbers}.",
            WRONG_WAY: f"It steers the wrong way: at {cell}, +m against -m moves answers by {numbers}.",
            NO_EFFECT: f"No effect was found. Of what is within the budget {cell} seemed best, but moves answers by "
            f"{numbers}, and the interval holds 0.",
        }[self.verdict]
        low, high = one.range
        worst = max((cost for cost in self.costs if cost.multiplier), key=_kl)
        over = "" if _kl(worst) <= self.budget else ", which is over it"
        most = max(self.multipliers)
        largest = " (nothing larger was tried)" if most in (-low, high) else ""
        return (
            f"{found} Multipliers from {low:.3g} to {high:.3g}{largest} are within the budget of {self.budget:g} nats "
            f"a token; on neutral prompts that chose nothing, {worst.multiplier:+g} has {worst.kl_mean} nats{over}."
        )

    def _none(self) -> str:
        known = self.frame[self.frame["kl_tokens"] == self.frame["kl_tokens"].max()]
        least = known.loc[known["kl_mean"].idxmin()]
        smallest = min(m for m in self.multipliers if m > 0)
        return (
            f"Nothing is within the budget of {self.budget:g} nats a token: at no layer of "
            f"{layer_ranges(sorted(self.layers))} is even the smallest multiplier, {smallest:g}. The least measured is "
            f"{least['kl_mean']:.3g} nats, at layer {least['layer']:.0f} with {least['multiplier']:g}. Give smaller "
            "multipliers, or a larger budget."
        )

    def plot(self) -> go.Figure:
        """Effect against divergence of every candidate, the budget, and what was chosen."""
        return effect_within_budget(
            self.frame,
            budget=self.budget,
            behavior=self.provenance["vectors"].behavior,
            label=METRIC_LABEL[self.metric],
            cross_fitted=self.cross_fitted,
            model=last_part(self.provenance["vectors"].model),
        )

    def __repr__(self) -> str:
        lines = [f"Calibration({self.provenance['vectors'].behavior}, {self.metric}): {self.verdict}", self.text]
        lines += [f"chosen by {self.settings['choosing']}; neutral: {self.settings['neutral']}"]
        lines += [
            f"  {one.multiplier:+g}: KL {one.kl_mean}, p95 {one.kl_p95}, perplexity {one.perplexity}, repetition "
            f"{one.repetition}"
            for one in self.costs
        ]
        return "\n".join(lines)


def no_effects() -> Float[Tensor, " tested"]:
    """Of no question."""
    return torch.empty(0)


def _kl(cost: NeutralCost) -> float:
    value = cost.kl_mean.value
    return float("nan") if value is None else value
