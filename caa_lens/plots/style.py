"""What all figures share: colours, axes, framed heat maps, curves with a band.

Backgrounds are transparent and text is mid-grey, so that figures read in light and dark notebooks alike.
"""

import html

import pandas as pd
import plotly.graph_objects as go

GREY = "#808080"
BLUE = "#3b7dd8"
ORANGE = "#d9742b"
GREEN = "#2f9e6e"
FAINT_BLUE = "rgba(59, 125, 216, 0.2)"
GRID = "rgba(128, 128, 128, 0.25)"


def escaped(text: str) -> str:
    """Plotly reads a few tags and `&amp;`, `&lt;`, `&gt;` in its labels, but no `&quot;`."""
    return html.escape(text, quote=False)


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
    table: pd.DataFrame,
    *,
    limit: float | int | None,
    bar: str,
    hover: str,
    low: pd.DataFrame | None = None,
    high: pd.DataFrame | None = None,
    written: str | None = None,
) -> go.Figure:
    """Cells from -limit to limit, white at 0; the cells of a name with itself are framed.

    Args:
        table: rows and columns carry layers or names.
        limit: the largest absolute value by default.
        low, high: ends of the intervals, as `%{customdata}` for the hover text.
        written: d3 format of the numbers written into the cells; by default none are.
    """
    rows, columns = ([escaped(str(name)) for name in axis] for axis in (table.index, table.columns))
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
    frame: pd.DataFrame, x: str, *, colour: str, name: str, hover: str, dash: str = "solid"
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
