"""Figures of measures: a sweep as a heat map, one layer's dose-response curve, a judge's scores."""

import math

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import (
    BLUE,
    CELL_INK,
    DIVERGING,
    SEQUENTIAL,
    banded_curve,
    interval_text,
    mean_of,
    said,
    styled,
)


def sweep_heatmap(
    summary: pd.DataFrame, *, behavior: str, test: str, label: str, unsteered: float, n_questions: int, model: str = ""
) -> go.Figure:
    """Mean score by layer and multiplier; white is the unsteered level, where that was swept.

    Args:
        behavior: of the vectors.
        test: what the test set is called; named in the title if it is called otherwise.
        label: what is measured.
        unsteered: NaN where multiplier 0 was not swept.
        n_questions: that a cell is the mean of.
    """
    table, low, high = (
        summary.pivot(index="layer", columns="multiplier", values=value) for value in ("mean", "low", "high")
    )
    reach = max(abs(table.to_numpy() - unsteered).max(), 1e-6)
    colours = {"colorscale": DIVERGING, "zmin": unsteered - reach, "zmax": unsteered + reach}
    level = f"white is unsteered, {unsteered:.3f}"
    if math.isnan(unsteered):  # nothing to be above or below of
        colours, level = {"colorscale": SEQUENTIAL}, ""
    ends = zip(low.to_numpy(), high.to_numpy(), strict=True)
    intervals = [[interval_text(lo, hi) for lo, hi in zip(*rows, strict=True)] for rows in ends]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[f"{m:g}" for m in table.columns],
            y=[str(layer) for layer in table.index],
            customdata=intervals,
            **colours,
            texttemplate="%{z:.2f}",
            textfont={"size": 11, "color": CELL_INK},
            hovertemplate="layer %{y}, multiplier %{x}<br>%{z:.4f} %{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    measured = behavior if test in ("", behavior) else f"{behavior}, tested on {test}"
    return styled(
        figure,
        title=f"{measured}: {label}",
        subtitle=said(model, f"{n_questions} question{'s' if n_questions > 1 else ''}", level),
        x="multiplier",
        y="layer (0-based block)",
        height=max(320, 110 + 24 * len(table)),
        cells={"layer": "y", "multiplier": "x"},
    )


def dose_response(
    summary: pd.DataFrame, layer: int, *, behavior: str, label: str, n_questions: int, model: str = ""
) -> go.Figure:
    """Mean score against multiplier at one layer, with the 95 % bootstrap interval over questions.

    Raises:
        ValueError: for a layer that the summary does not have.
    """
    rows = summary[summary["layer"] == layer].sort_values("multiplier")
    if rows.empty:
        raise ValueError(f"layer {layer} was not swept: expected one of {sorted(set(summary['layer']))}")
    hover = "multiplier %{x:g}<br>%{y:.4f} %{customdata[0]}<extra></extra>"
    figure = go.Figure(banded_curve(rows, "multiplier", colour=BLUE, name="mean", hover=hover))
    figure.update_layout(showlegend=False)
    return styled(
        figure,
        title=f"{behavior} at layer {layer}",
        subtitle=said(model, mean_of(n_questions)),
        x="multiplier",
        y=label,
        cells={"layer": layer, "multiplier": "x"},
    )


def score_histogram(frame: pd.DataFrame, *, behavior: str, judge: str) -> go.Figure:
    """How many answers got which score, from 0 to 10 in steps of a half.

    Args:
        frame: column `score`, NaN where there is none.
    """
    scores = frame["score"].dropna()
    figure = go.Figure(
        go.Histogram(
            x=scores,
            xbins={"start": -0.25, "end": 10.25, "size": 0.5},
            marker={"color": BLUE},
            hovertemplate="score %{x}<br>%{y} answers<extra></extra>",
        )
    )
    figure.update_xaxes(range=[-0.5, 10.5], dtick=1)
    n_failed = len(frame) - len(scores)
    failed = f", {n_failed} without a score" if n_failed else ""
    figure.update_layout(bargap=0.05)
    title = f"{behavior}: {len(scores)} answers by judge {judge}{failed}"
    return styled(figure, title=title, x="score (0 to 10)", y="answers")
