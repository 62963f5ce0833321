"""What all figures share: one palette, two themes, titles that wrap, framed heat maps, curves with a band.

A figure has a background of its own, so that what is read on it does not depend on the page around it: it is light,
in light and dark notebooks alike. `figure.update_layout(template="caa_lens_dark")` makes it dark; a report does so
where its reader's system is dark.

Text has a contrast of at least 4.5 to its background, and lines and markers have one of at least 3, in both themes
(WCAG 2.2, level AA). Curves that a colour-blind reader may mix up have other dashes or markers too. Widths are not set:
a figure fills its page, and can be read from 390 pixels on, unless `styled` was told otherwise.
"""

import html
import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

BLUE, ORANGE, GREEN = "#3b7dd8", "#d9742b", "#2f9e6e"
PURPLE, PINK, OLIVE, CYAN, RED = "#8a63d2", "#c2508f", "#9a8420", "#1f98ad", "#d6455d"
GREY = "#808080"  # of lines and markers; never of text
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, PINK, OLIVE, CYAN, RED)
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "x", "diamond", "square", "triangle-up", "star", "cross", "triangle-down")
FAINT_BLUE = "rgba(59, 125, 216, 0.2)"
GRID = "rgba(128, 128, 128, 0.25)"
NEGATIVE, POSITIVE = "#dd5f4a", "#4584d6"  # the ends of the scale of signed values
DIVERGING = [[0.0, NEGATIVE], [0.25, "#f1b5a9"], [0.5, "#ffffff"], [0.75, "#afcaef"], [1.0, POSITIVE]]
SEQUENTIAL = [[0.0, "#ffffff"], [0.5, "#afcaef"], [1.0, POSITIVE]]
CELL_INK = "#10151f"  # of text in cells and around them; cells have the same colours in both themes, and all are light

LIGHT_INK, LIGHT_PAPER = "#1d2433", "#ffffff"
DARK_INK, DARK_PAPER = "#e6e9ef", "#14181f"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
TITLE, TEXT, SMALL = 15, 13, 12  # pixels
TITLE_LETTERS, SUBTITLE_LETTERS = 48, 56  # of a line that fits into 390 pixels
LINE = 1.3 * TITLE  # pixels from one line of a title to the next
NARROW, WIDEST = 390, 900  # pixels: a phone's page, and what a notebook's column has for a figure


def _theme(ink: str, paper: str) -> go.layout.Template:
    axis: dict[str, Any] = {"gridcolor": GRID, "zerolinecolor": GRID, "automargin": True}
    axis["title"] = {"standoff": 8, "font": {"size": SMALL}}
    bar = {"thickness": 12, "outlinewidth": 0, "ticks": "", "tickfont": {"size": SMALL - 1}}
    return go.layout.Template(
        layout={
            "font": {"color": ink, "size": TEXT, "family": FONT},
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "colorway": COLOURS,
            "hoverlabel": {"namelength": -1, "align": "left"},
            "legend": {"font": {"size": SMALL}},
            "coloraxis": {"colorbar": bar},
            "xaxis": axis,
            "yaxis": axis,
        },
        data={"heatmap": [{"colorbar": bar}]},
    )


LIGHT, DARK = _theme(LIGHT_INK, LIGHT_PAPER), _theme(DARK_INK, DARK_PAPER)
pio.templates["caa_lens"], pio.templates["caa_lens_dark"] = LIGHT, DARK


def escaped(text: str) -> str:
    """Plotly reads a few tags and `&amp;`, `&lt;`, `&gt;` in its labels, but no `&quot;`."""
    return html.escape(text, quote=False)


def styled(
    figure: go.Figure,
    *,
    title: str,
    x: str,
    y: str,
    subtitle: str = "",
    height: int = 420,
    legend: bool = False,
    panels: bool = False,
    min_width: int = NARROW,
    cells: Mapping[str, str | int] | None = None,
) -> go.Figure:
    """Theme, title, names of the axes and margins.

    Args:
        title, subtitle: as plain text; lines are broken where they would leave a narrow figure.
        height: in pixels, with one line of title and one of subtitle; more lines make it higher.
        legend: below the figure, whatever it takes.
        panels: whether there are titles of panels.
        cells: what a point stands for, for a page that shows its questions: the axis (`x`, `y`) that is the `layer`,
            and the one that is the `multiplier`, or the one layer of all.
        min_width: pixels below which it cannot be read, where such a figure should scroll.
    """
    lines, under = wrapped(title, TITLE_LETTERS) or [""], wrapped(subtitle, SUBTITLE_LETTERS)
    text = "<br>".join(
        [*map(escaped, lines), *(f'<span style="font-size: {SMALL}px">{escaped(line)}</span>' for line in under)]
    )
    top = round(22 + LINE * (len(lines) + len(under)))
    figure.update_layout(
        template=LIGHT,
        title={
            "text": text,
            "font": {"size": TITLE},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            # Of one line plotly moves the top to that place, of several the baseline of the first.
            "pad": {"l": 12, "t": 12 if len(lines) + len(under) == 1 else 12 + 0.7 * TITLE},
        },
        height=round(height + LINE * (len(lines) + len(under) - 2)),
        margin={"l": 50, "r": 16, "t": top + (26 if panels else 0), "b": 46},
        # What a page that shows the title itself needs to know.
        meta={"title": title, "subtitle": subtitle, "title_height": top - 16, "min_width": min_width, "cells": cells},
    )
    if legend:
        below = {"orientation": "h", "x": 0, "xref": "container", "xanchor": "left"}
        figure.update_layout(legend={**below, "y": 0, "yref": "container", "yanchor": "bottom"}, showlegend=True)
    if panels:
        figure.update_annotations(font={"size": TEXT})
    figure.update_xaxes(title=x)
    return figure.update_yaxes(title=y)


def wrapped(text: str, most: int) -> list[str]:
    """Lines of at most so many letters, as few as can be, and about as long as each other; 95 % stays together."""
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(text, most, break_on_hyphens=False)
    for width in range(most - 1, 0, -1):
        shorter = textwrap.wrap(text, width, break_on_hyphens=False)
        if len(shorter) > len(lines) or any(" " not in line and line not in text.split() for line in shorter):
            break
        lines = shorter
    return lines


def said(*parts: str) -> str:
    """What a subtitle tells, without what is not known."""
    return ", ".join(part for part in parts if part not in ("", "unknown"))


def mean_of(n: int, what: str = "questions") -> str:
    """`mean of 30 questions, 95 % interval`; of one there is neither."""
    return f"1 {what.removesuffix('s')}, so no interval" if n == 1 else f"mean of {n} {what}, 95 % interval"


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
        bar: what the colour bar is called, where there is one.
        written: d3 format of the numbers written into the cells, in the place of a colour bar; by default none are.
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
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            colorbar={"title": {"text": bar, "side": "right"}},
            showscale=written is None,
            texttemplate=written and f"%{{z:{written}}}",
            textfont={"color": CELL_INK, "size": SMALL - 1},
            hovertemplate=hover,
        )
    )
    for i, name in enumerate(rows):
        if name in columns:
            j = columns.index(name)  # shapes count the categories of an axis
            box = {"x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5}
            figure.add_shape(type="rect", **box, line={"color": CELL_INK, "width": 1})
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def width_of_written(table: pd.DataFrame) -> int:
    """Pixels that a heat map with numbers in its cells cannot do without."""
    return max(NARROW, 50 + 7 * max(len(str(name)) for name in table.index) + 38 * len(table.columns))


def interval_text(low: float, high: float) -> str:
    """Nothing where there is no interval, as of one question."""
    return f"[{low:.4f}, {high:.4f}]" if low == low else ""


def interval_texts(frame: pd.DataFrame) -> list[list[str]]:
    """Of the columns `low` and `high`, as `%{customdata[0]}` for the hover text."""
    return [[interval_text(low, high)] for low, high in zip(frame["low"], frame["high"], strict=True)]


def banded_curve(
    frame: pd.DataFrame, x: str, *, colour: str, name: str, hover: str, dash: str = "solid"
) -> list[go.Scatter]:
    """Column `mean` against column `x` with the band from `low` to `high`; `%{customdata[0]}` is the interval."""
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
        customdata=interval_texts(frame),
        mode="lines+markers",
        line={"color": colour, "dash": dash},
        marker={"size": 6},
        name=name,
        legendgroup=name,
        hovertemplate=hover,
    )
    return [band, curve]
