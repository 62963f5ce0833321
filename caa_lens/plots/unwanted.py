"""The figure of side effects: changes with intervals, each row in its own scale, over what random directions do."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import BLUE, GREY, escaped, interval_text, said, styled

LETTERS, ROW = 26, 50  # of a line that a phone has room for; pixels of a row of three lines
SHORT = {"neutral questions": "", "harmless requests": ""}


def changes_forest(frame: pd.DataFrame, *, of: str, n_random: int, model: str = "") -> go.Figure:
    """A row a measure: the change with its interval, and the range and mean of the random directions' changes.

    Units differ, so each row is drawn in its own scale, with no change in the middle; the numbers stand at its left.

    Args:
        frame: columns of `side_effects`.
        of: what is added.
    """
    rows = frame.iloc[::-1]
    reach = rows[["change", "low", "high", "random_low", "random_high"]].abs().max(axis=1).clip(lower=1e-12).to_numpy()
    names = [f"{_name(row)}<br><b>{_numbers(row)}</b>" for row in rows.to_dict("records")]
    at = np.arange(len(rows))
    scaled = {column: rows[column].to_numpy() / reach for column in ("change", "low", "high", "random")}
    low, high = rows["random_low"].to_numpy() / reach, rows["random_high"].to_numpy() / reach
    figure = go.Figure()
    ranges: dict[str, Any] = {"x": [], "y": []}
    for place, first, last in zip(at, low, high, strict=True):
        ranges["x"] += [first, last, None]
        ranges["y"] += [place, place, None]
    several = n_random > 1
    figure.add_scatter(
        **ranges,
        mode="lines",
        line={"color": GREY, "width": 4},
        name=f"{n_random} random directions" if several else "a random direction",
        hoverinfo="skip",
        showlegend=several,
    )
    figure.add_scatter(
        x=scaled["random"],
        y=at,
        customdata=rows[["random", "random_low", "random_high"]],
        mode="markers",
        marker={"symbol": "line-ns", "size": 12, "line": {"color": GREY, "width": 2}},
        name="their mean" if several else "a random direction",
        hovertemplate="random %{customdata[0]:.4f}, from %{customdata[1]:.4f} to %{customdata[2]:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=scaled["change"],
        y=at,
        error_x={
            "array": scaled["high"] - scaled["change"],
            "arrayminus": scaled["change"] - scaled["low"],
            "thickness": 1.5,
            "width": 3,
            "color": BLUE,
        },
        customdata=rows[["unsteered", "steered", "change", "n"]].assign(
            interval=[interval_text(*ends) for ends in zip(rows["low"], rows["high"], strict=True)]
        ),
        mode="markers",
        marker={"color": BLUE, "size": 9},
        name="steering, 95 % interval",
        hovertemplate="from %{customdata[0]:.4f} to %{customdata[1]:.4f}<br>change %{customdata[2]:.4f} "
        "%{customdata[4]}, n = %{customdata[3]}<extra></extra>",
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    styled(
        figure,
        title=f"{of}: changes where there should be none",
        subtitle=said(model, "each row in its own scale"),
        x="",
        y="",
        height=170 + ROW * len(rows),
        legend=True,
    )
    figure.update_xaxes(range=[-1.12, 1.12], showticklabels=False, showgrid=False, fixedrange=True)
    figure.update_yaxes(tickvals=at, ticktext=names, range=[-0.6, len(rows) - 0.4], automargin=True, fixedrange=True)
    return figure.update_yaxes(tickfont={"size": 11})


def _name(row: dict[Any, Any]) -> str:
    of = SHORT.get(row["of"], row["of"])
    if not of:
        return escaped(row["measure"])
    between = ":<br>" if len(f"{row['measure']}: {of}") > LETTERS else ": "
    return escaped(row["measure"]) + between + escaped(of)


def _numbers(row: dict[Any, Any]) -> str:
    ends = "" if np.isnan(row["low"]) else f" [{row['low']:.2g}, {row['high']:.2g}]"
    return f"{row['change']:+.2g}{ends}".replace("-", "−")
