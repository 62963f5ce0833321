"""Figures of a sweep: the heat map of layers by multipliers, one layer's dose-response curve."""

import math
from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from caa_lens.measures.sweeps import METRIC_LABEL
from caa_lens.plots.style import BLUE, banded_curve, styled

if TYPE_CHECKING:
    from caa_lens.measures.sweeps import Sweep


def sweep_heatmap(sweep: "Sweep") -> go.Figure:
    """Mean score by layer and multiplier; white is the unsteered level, where that was swept."""
    summary = sweep.summary()
    table = summary.pivot(index="layer", columns="multiplier", values="mean")
    low = summary.pivot(index="layer", columns="multiplier", values="low").to_numpy()
    high = summary.pivot(index="layer", columns="multiplier", values="high").to_numpy()
    label = METRIC_LABEL[sweep.metric]
    unsteered = sweep.unsteered
    reach = max(abs(table.to_numpy() - unsteered).max(), 1e-6)
    colours = {"colorscale": "RdBu", "zmin": unsteered - reach, "zmax": unsteered + reach}
    level = f"; white is unsteered, {unsteered:.3f}"
    if math.isnan(unsteered):  # nothing to be above or below of
        colours, level = {"colorscale": "Blues"}, ""
    intervals = [
        [f"[{lo:.3f}, {hi:.3f}]" for lo, hi in zip(*rows, strict=True)] for rows in zip(low, high, strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[f"{m:g}" for m in table.columns],
            y=[str(layer) for layer in table.index],
            customdata=intervals,
            **colours,
            texttemplate="%{z:.2f}",
            textfont={"size": 11},
            hovertemplate="layer %{y}, multiplier %{x}<br>%{z:.4f} %{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return styled(
        figure,
        title=f"{escape(_measured(sweep))}: {label}{level}",
        x="multiplier",
        y="layer (0-based block)",
        height=max(320, 110 + 24 * len(table)),
    )


def _measured(sweep: "Sweep") -> str:
    """The behavior of the vectors, and the test set if it is called otherwise."""
    behavior, test = sweep.vectors.behavior, sweep.settings.get("test", "")
    return behavior if test in ("", behavior) else f"{behavior}, tested on {test}"


def dose_response(sweep: "Sweep", layer: int) -> go.Figure:
    """Mean score against multiplier at one layer, with the 95 % bootstrap interval over questions."""
    summary = sweep.summary()
    rows = summary[summary["layer"] == layer].sort_values("multiplier")
    if rows.empty:
        raise ValueError(f"layer {layer} was not swept: expected one of {sorted(set(summary['layer']))}")
    hover = "multiplier %{x:g}<br>%{y:.4f} [%{customdata[0]:.4f}, %{customdata[1]:.4f}]<extra></extra>"
    figure = go.Figure(banded_curve(rows, "multiplier", colour=BLUE, name="mean", hover=hover))
    figure.update_layout(showlegend=False)
    n_questions = sweep.frame["question"].nunique()
    return styled(
        figure,
        title=f"{escape(sweep.vectors.behavior)} at layer {layer}: mean of {n_questions} questions, 95 % interval",
        x="multiplier",
        y=METRIC_LABEL[sweep.metric],
    )
