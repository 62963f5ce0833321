"""Does steering move every question, or only the mean? The slope of each question's score over the multiplier.

    found = steerability(sweep(model, test, vectors, multipliers=[-2, -1, 0, 1, 2]))
    found.summary()          # by layer: mean slope, and the share of questions that move the wrong way
    found.wrong_way(14)      # which
    found.plot(14)           # sorted slopes

A mean that moves well can hide questions that move against it: Tan et al. 2024 (arXiv 2407.12404) found up to half of a
set's. They take slopes of the log odds of the two answers, which is `score="log_odds"` here; p of the matching answer
flattens near 0 and 1, where even a question that is steered well has a small slope.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from caa_lens.arguments import check_count, check_list, describe
from caa_lens.measures.answers import METRIC_LABEL
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.sweeps import Sweep
from caa_lens.plots.agreement import sorted_slopes
from caa_lens.provenance import last_part, layer_ranges
from caa_lens.results import Result

LOG_ODDS = "log_odds"
SCORES = ("metric", LOG_ODDS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steerability(Result):
    """Slopes of single questions.

    Attributes:
        frame: columns `behavior, layer, question, slope, low, high`. `slope` is the change of the score a multiplier,
            by least squares; `low, high` its 95 % interval, from how far the scores lie off the line: the model's
            answers have no chance in them, so it says how well a line describes the question, and is NaN of two
            multipliers.
        settings: those of the sweep, with the multipliers.
        provenance: of the `vectors`.
        score: "p_matching", "margin" or "log_odds", in whose units slopes are.
    """

    score: str

    def summary(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """By layer, mean slope and the share of questions that move the wrong way, with 95 % intervals over questions.

        Columns `layer, mean, low, high, wrong, wrong_low, wrong_high, n_wrong, n_questions`. The mean's interval is the
        percentile bootstrap's, the share's Wilson's. Questions without a slope (scores that are NaN) are left out.
        """
        from scipy.stats import binomtest

        rows = []
        for layer, own in self.frame.groupby("layer"):
            slopes = own["slope"].dropna().to_numpy()
            if not len(slopes):
                rows.append({"layer": layer, "n_wrong": 0, "n_questions": 0})
                continue
            (low,), (high,) = bootstrap_interval(slopes[:, None], n_resamples=n_resamples, seed=seed)
            n_wrong = int((slopes < 0).sum())
            share = binomtest(n_wrong, len(slopes)).proportion_ci(method="wilson")
            rows.append(
                {
                    "layer": layer,
                    "mean": slopes.mean(),
                    "low": low,
                    "high": high,
                    "wrong": n_wrong / len(slopes),
                    "wrong_low": share.low,
                    "wrong_high": share.high,
                    "n_wrong": n_wrong,
                    "n_questions": len(slopes),
                }
            )
        columns = ["layer", "mean", "low", "high", "wrong", "wrong_low", "wrong_high", "n_wrong", "n_questions"]
        return pd.DataFrame(rows, columns=columns)

    def wrong_way(self, layer: int) -> pd.DataFrame:
        """The questions whose score falls as the multiplier rises, the steepest first: `question, slope, low, high`.

        `question` is the pair's number in the test set: `test[question]` is the pair.
        """
        own = self._at(layer)
        found = own[own["slope"] < 0].sort_values("slope", kind="stable")
        return found[["question", "slope", "low", "high"]].reset_index(drop=True)

    @property
    def steepest_layer(self) -> int:
        """The layer with the largest mean slope. It is chosen on these questions: its slopes flatter it."""
        means = self.frame.groupby("layer")["slope"].mean().dropna()
        if not len(means):
            raise ValueError("no question has a slope at any layer: all scores are NaN; sweep smaller multipliers")
        return int(means.index[int(means.to_numpy().argmax())])

    def plot(self, layer: int | None = None) -> go.Figure:
        """Sorted slopes with their intervals at a layer; by default the steepest, as the title says."""
        chosen_here = layer is None and self.frame["layer"].nunique() > 1
        layer = self.steepest_layer if layer is None else layer
        unit = "log odds" if self.score == LOG_ODDS else METRIC_LABEL[self.score]
        of = self.provenance["vectors"].behavior
        return sorted_slopes(
            self._at(layer).dropna(subset="slope"),
            behavior=of,
            layer=layer,
            unit=unit,
            steepest=chosen_here,
            model=last_part(self.provenance["vectors"].model),
        )

    def _at(self, layer: int) -> pd.DataFrame:
        own = self.frame[self.frame["layer"] == check_count("layer", layer, least=0)]
        if own.empty:
            swept = layer_ranges(sorted(set(self.frame["layer"])))
            raise ValueError(f"layer {layer} has no slopes: expected one of {swept}")
        return own

    def __repr__(self) -> str:
        table = self.summary().set_index("layer").round(3).to_string()
        return f"Steerability({self.provenance['vectors'].behavior}, slopes of {self.score})\n{table}"


def steerability(sweep: Sweep, *, layers: Sequence[int] | None = None, score: str = "metric") -> Steerability:
    """How steerable each question of a sweep is: the slope of its score over the multiplier.

        slope = sum((m - mean m) (score - mean score)) / sum((m - mean m)^2)    over the swept multipliers m

    Args:
        layers: those of the sweep by default.
        score: "metric", the sweep's own, or "log_odds": log p(positive) - log p(negative), which does not flatten.

    Raises:
        TypeError: for anything but a Sweep.
        ValueError: for a sweep of one multiplier, a layer that was not swept, or another score.
    """
    if not isinstance(sweep, Sweep):
        raise TypeError(f"expected a Sweep, as sweep(model, test, vectors) gives, got {describe(sweep)}")
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: expected {' or '.join(map(repr, SCORES))}")
    frame = sweep.frame
    if layers is not None:
        chosen = check_list("layers", layers, int)
        if not chosen:
            raise ValueError("no layers given: expected some of those that were swept")
        if missing := sorted(set(chosen) - set(frame["layer"])):
            swept = layer_ranges(sorted(set(frame["layer"])))
            raise ValueError(f"not swept: layers {layer_ranges(missing)}, expected some of {swept}")
        frame = frame[frame["layer"].isin(chosen)]
    multipliers = np.sort(frame["multiplier"].unique()).astype(float)
    if len(multipliers) < 2:
        raise ValueError(f"a slope needs two multipliers or more, got {multipliers.tolist()}: sweep e.g. -1, 0 and 1")
    own = frame["logp_positive"] - frame["logp_negative"] if score == LOG_ODDS else frame[sweep.metric]
    scores = frame[["layer", "question", "multiplier"]].assign(score=own)
    table = scores.pivot(index=["layer", "question"], columns="multiplier", values="score")  # columns ascend
    slope, low, high = slopes_of(table.to_numpy(float), multipliers)
    found = table.index.to_frame(index=False).assign(slope=slope, low=low, high=high)
    found.insert(0, "behavior", sweep.provenance["vectors"].behavior)
    swept = ", ".join(f"{m:g}" for m in multipliers)
    return Steerability(
        frame=found,
        settings={**sweep.settings, "multipliers": swept},
        provenance=sweep.provenance,
        score=LOG_ODDS if score == LOG_ODDS else sweep.metric,
    )


def slopes_of(
    scores: Float[np.ndarray, "question multiplier"], multipliers: Float[np.ndarray, " multiplier"]
) -> tuple[Float[np.ndarray, " question"], Float[np.ndarray, " question"], Float[np.ndarray, " question"]]:
    """Least-squares slope of each row over the multipliers, and its 95 % interval: Student's t, NaN of two."""
    from scipy.stats import t

    centred = multipliers - multipliers.mean()
    spread = float(centred @ centred)
    slope = scores @ centred / spread
    free = len(multipliers) - 2
    if free == 0:
        return slope, np.full_like(slope, np.nan), np.full_like(slope, np.nan)
    off = scores - scores.mean(1, keepdims=True) - slope[:, None] * centred
    half = t.ppf(0.975, free) * np.sqrt((off**2).sum(1) / free / spread)
    return slope, slope - half, slope + half
