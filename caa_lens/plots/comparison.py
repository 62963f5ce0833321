"""The figure of a comparison of methods: effect against cost."""

from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import BLUE, GREEN, GREY, ORANGE, styled

COLOURS = (BLUE, ORANGE, GREEN, "#8a5fd0", "#c2437e", "#a08a20", "#2aa0b5", "#7a5230", "#5b6b2f", "#b03a2e")


def effect_against_cost(
    curves: pd.DataFrame,
    *,
    behavior: str,
    label: str,
    n_questions: int,
    n_neutral: int = 0,
    points: Sequence[str] = (),
) -> go.Figure:
    """Mean effect by mean divergence, a curve a method and sign; bars are 95 % intervals over questions.

    Args:
        curves: columns `method, strength, mean, low, high, kl_mean`.
        label: what an effect is a change of.
        n_neutral: how many prompts divergences are of; 0 leaves it unsaid.
        points: methods without strengths, which are drawn as single points.
    """
    figure, colours = go.Figure(), iter(COLOURS)
    for name in dict.fromkeys(curves["method"]):
        rows = curves[curves["method"] == name]
        if name in points:
            figure.add_scatter(**_drawn(rows, str(name), GREY), mode="markers", marker={"symbol": "x", "size": 9})
            continue
        colour = GREY if name == "random" else next(colours, GREY)
        for sign in (1, -1):
            some = rows[rows["strength"] * sign > 0].sort_values("strength", key=abs)
            drawn = _drawn(some, str(name), colour)
            figure.add_scatter(**drawn, mode="lines+markers", showlegend=sign > 0, marker={"size": 6})
    figure.update_xaxes(type="log", dtick="D2")  # 1, 2 and 5 of each power of ten
    figure.update_layout(legend={"orientation": "h", "y": -0.18, "yanchor": "top"})
    return styled(
        figure,
        title=f"{escape(behavior)}: effect on {n_questions} questions, and what it costs elsewhere",
        x=f"mean KL on {f'{n_neutral} ' if n_neutral else ''}neutral prompts (nats a token)",
        y=f"change of {label}",
        height=560,
    )


def _drawn(rows: pd.DataFrame, name: str, colour: str) -> dict:
    return {
        "x": rows["kl_mean"].where(rows["kl_mean"] > 0),
        "y": rows["mean"],
        "error_y": {
            "array": rows["high"] - rows["mean"],
            "arrayminus": rows["mean"] - rows["low"],
            "thickness": 1,
            "width": 2,
        },
        "customdata": rows[["strength", "low", "high"]],
        "name": name,
        "legendgroup": name,
        "line": {"color": colour},
        "hovertemplate": (
            f"{escape(name)}, strength %{{customdata[0]:g}}<br>KL %{{x:.4f}}, effect %{{y:.4f}} "
            "[%{customdata[1]:.4f}, %{customdata[2]:.4f}]<extra></extra>"
        ),
    }
