"""Plotly figures from results. Each takes a finished result and computes nothing but its layout.

Backgrounds are transparent and text is mid-grey, so that figures read in light and dark notebooks alike.
"""

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from caa_lens.sweeps import METRIC_LABEL

if TYPE_CHECKING:
    from caa_lens.sweeps import Sweep

GREY = "#808080"
BLUE = "#3b7dd8"
FAINT_BLUE = "rgba(59, 125, 216, 0.2)"
GRID = "rgba(128, 128, 128, 0.25)"


def styled(figure: go.Figure, *, title: str, x: str, y: str, height: int = 420) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13},
        height=height,
        margin={"l": 60, "r": 20, "t": 60, "b": 55},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(title=x, gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(title=y, gridcolor=GRID, zerolinecolor=GRID)
    return figure


def sweep_heatmap(sweep: "Sweep") -> go.Figure:
    """Mean score by layer and multiplier; the colour's middle is the unsteered level."""
    summary = sweep.summary()
    table = summary.pivot(index="layer", columns="multiplier", values="mean")
    low = summary.pivot(index="layer", columns="multiplier", values="low").to_numpy()
    high = summary.pivot(index="layer", columns="multiplier", values="high").to_numpy()
    label = METRIC_LABEL[sweep.metric]
    unsteered = sweep.unsteered
    middle = unsteered if unsteered == unsteered else float(table.to_numpy().mean())
    reach = max(abs(table.to_numpy() - middle).max(), 1e-6)
    intervals = [
        [f"[{lo:.3f}, {hi:.3f}]" for lo, hi in zip(*rows, strict=True)] for rows in zip(low, high, strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[f"{m:g}" for m in table.columns],
            y=[str(layer) for layer in table.index],
            customdata=intervals,
            colorscale="RdBu",
            zmin=middle - reach,
            zmax=middle + reach,
            colorbar={"title": {"text": label, "side": "right"}},
            texttemplate="%{z:.2f}",
            textfont={"size": 11},
            hovertemplate="layer %{y}, multiplier %{x}<br>%{z:.4f} %{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return styled(
        figure,
        title=f"{escape(sweep.vectors.behavior)}: {label}, unsteered {unsteered:.3f}",
        x="multiplier",
        y="layer (0-based block)",
        height=max(320, 110 + 24 * len(table)),
    )


def dose_response(sweep: "Sweep", layer: int) -> go.Figure:
    """Mean score against multiplier at one layer, with the 95 % bootstrap interval over questions."""
    summary = sweep.summary()
    rows = summary[summary["layer"] == layer].sort_values("multiplier")
    if rows.empty:
        raise ValueError(f"layer {layer} was not swept: expected one of {sorted(set(summary['layer']))}")
    band_x = [*rows["multiplier"], *rows["multiplier"][::-1]]
    band_y = [*rows["high"], *rows["low"][::-1]]
    figure = go.Figure(
        [
            go.Scatter(
                x=band_x,
                y=band_y,
                mode="lines",
                fill="toself",
                fillcolor=FAINT_BLUE,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            ),
            go.Scatter(
                x=rows["multiplier"],
                y=rows["mean"],
                customdata=rows[["low", "high"]],
                mode="lines+markers",
                line={"color": BLUE},
                showlegend=False,
                hovertemplate="multiplier %{x:g}<br>%{y:.4f} [%{customdata[0]:.4f}, %{customdata[1]:.4f}]"
                "<extra></extra>",
            ),
        ]
    )
    n_questions = sweep.frame["question"].nunique()
    return styled(
        figure,
        title=f"{escape(sweep.vectors.behavior)} at layer {layer}: mean of {n_questions} questions, 95 % interval",
        x="multiplier",
        y=METRIC_LABEL[sweep.metric],
    )
