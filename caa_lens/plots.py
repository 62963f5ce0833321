"""Plotly figures from results. Each takes a finished result and computes nothing but its layout.

Backgrounds are transparent and text is mid-grey, so that figures read in light and dark notebooks alike.
"""

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from caa_lens.sweeps import METRIC_LABEL

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.sweeps import Sweep

GREY = "#808080"
BLUE = "#3b7dd8"
ORANGE = "#d9742b"
GREEN = "#2f9e6e"
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


def framed_heatmap(
    table: "pd.DataFrame",
    *,
    limit: float | int | None,
    bar: str,
    hover: str,
    low: "pd.DataFrame | None" = None,
    high: "pd.DataFrame | None" = None,
    written: str | None = None,
) -> go.Figure:
    """Cells from -limit to limit, white at 0; the cells of a name with itself are framed.

    Args:
        table: rows and columns carry layers or names.
        limit: the largest absolute value by default.
        low, high: ends of the intervals, as `%{customdata}` for the hover text.
        written: d3 format of the numbers written into the cells; by default none are.
    """
    rows, columns = ([escape(str(name), quote=False) for name in axis] for axis in (table.index, table.columns))
    intervals = None
    if low is not None and high is not None:
        ends = zip(low.to_numpy(), high.to_numpy(), strict=True)
        intervals = [[interval_text(a, b) for a, b in zip(*pair, strict=True)] for pair in ends]
    limit = max(float(abs(table.to_numpy()).max()), 1e-9) if limit is None else limit
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=columns,
            y=rows,
            customdata=intervals,
            colorscale="RdBu",
            zmin=-limit,
            zmax=limit,
            colorbar={"title": {"text": bar, "side": "right"}},
            texttemplate=written and f"%{{z:{written}}}",
            hovertemplate=hover,
        )
    )
    for i, name in enumerate(rows):
        if name in columns:
            j = columns.index(name)  # shapes count the categories of an axis
            box = {"x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5}
            figure.add_shape(type="rect", **box, line={"color": "black", "width": 1})
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def interval_text(low: float, high: float) -> str:
    return f"[{low:.4f}, {high:.4f}]"


def banded_curve(
    frame: "pd.DataFrame", x: str, *, colour: str, name: str, hover: str, dash: str = "solid"
) -> list[go.Scatter]:
    """Column `mean` against column `x` with the band from `low` to `high`; `%{customdata}` holds both ends."""
    band = go.Scatter(
        x=[*frame[x], *frame[x][::-1]],
        y=[*frame["high"], *frame["low"][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.15)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    curve = go.Scatter(
        x=frame[x],
        y=frame["mean"],
        customdata=frame[["low", "high"]],
        mode="lines+markers",
        line={"color": colour, "dash": dash},
        marker={"size": 6},
        name=name,
        legendgroup=name,
        hovertemplate=hover,
    )
    return [band, curve]


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
