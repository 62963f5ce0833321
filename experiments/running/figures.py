"""The two kinds of figure that experiments draw themselves: curves with intervals, and points by behavior."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

METRIC_NAME = {"p_matching": "by letter", "margin": "by completions"}


def curves(
    frame: "pd.DataFrame",
    *,
    x: str,
    y: str,
    by: str,
    title: str,
    labels: tuple[str, str],
    mark: float | None = None,
    signed: str | None = None,
) -> "go.Figure":
    """One line for each value of `by`; error bars where the frame has `low` and `high`.

    Args:
        labels: of the two axes.
        signed: a column that parts each line in two, dotted where it is negative.
        mark: an x that a dashed line is drawn at.
    """
    from html import escape

    import plotly.graph_objects as go

    from caa_lens.plots.style import COLOURS, GREY, SYMBOLS, styled

    figure = go.Figure()
    with_interval = {"low", "high"} <= set(frame)
    places = {name: i for i, name in enumerate(dict.fromkeys(frame[by]))}
    for key, rows in frame.groupby([by, signed] if signed else [by], sort=False):
        rows = rows.sort_values(x)
        name = " ".join([str(key[0]), *(f"{value:+g}" for value in key[1:])])
        dotted = signed is not None and key[1] < 0
        error = None
        if with_interval:
            above, below = rows["high"] - rows[y], rows[y] - rows["low"]
            error = {"type": "data", "array": above, "arrayminus": below, "thickness": 1, "width": 2}
        figure.add_scatter(
            x=rows[x],
            y=rows[y],
            error_y=error,
            name=escape(str(name), quote=False),
            mode="lines+markers",
            line={"color": COLOURS[places[key[0]] % len(COLOURS)], "dash": "dot" if dotted else "solid"},
            marker={"size": 6, "symbol": SYMBOLS[places[key[0]] % len(SYMBOLS)]},
            hovertemplate=f"{escape(str(name), quote=False)}<br>{x} %{{x:g}}<br>%{{y:.4f}}<extra></extra>",
        )
    if mark is not None:
        figure.add_vline(x=mark, line={"color": GREY, "dash": "dash", "width": 1})
    return styled(figure, title=title, x=labels[0], y=labels[1], height=460, legend=True)


def curves_by_metric(
    frame: "pd.DataFrame",
    *,
    x: str,
    by: str,
    title: str,
    label: str,
    y: str = "mean",
    effect: bool = False,
    **more: Any,
) -> "list[go.Figure]":
    """One figure for each metric in the frame, named in its title: margins and probabilities do not share an axis.

    With `effect`, `y` is a difference of two scores, and the axis says so.
    """
    from caa_lens.measures.answers import METRIC_LABEL

    figures = []
    for metric, rows in frame.groupby("metric", sort=False):
        axis = f"difference in {METRIC_LABEL[metric]}" if effect else METRIC_LABEL[metric]
        figures.append(
            curves(rows, x=x, y=y, by=by, title=f"{title}; {METRIC_NAME[metric]}", labels=(label, axis), **more)
        )
    return figures
