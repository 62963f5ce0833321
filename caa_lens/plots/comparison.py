"""The figure of a comparison of methods: effect against cost."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import COLOURS, DASHES, GREY, SYMBOLS, escaped, interval_text, said, styled


def effect_against_cost(
    curves: pd.DataFrame,
    *,
    behavior: str,
    label: str,
    n_questions: int,
    n_neutral: int = 0,
    points: Sequence[str] = (),
    model: str = "",
) -> go.Figure:
    """Mean effect by mean divergence, a curve a method and sign; bars are 95 % intervals over questions.

    Args:
        curves: columns `method, strength, mean, low, high, kl_mean`.
        label: what an effect is a change of.
        n_neutral: how many prompts divergences are of; 0 leaves it unsaid.
        points: methods without strengths, which are drawn as single points.
    """
    figure, i = go.Figure(), 0
    for name in dict.fromkeys(curves["method"]):
        rows = curves[curves["method"] == name]
        if name in points:
            symbol = ("x", "cross")[list(points).index(name) % 2]
            figure.add_scatter(**_drawn(rows, str(name), GREY), mode="markers", marker={"symbol": symbol, "size": 9})
            continue
        colour, dash, symbol = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % 3], SYMBOLS[i % len(SYMBOLS)]
        if name == "random":
            colour, dash, symbol = GREY, "dash", "circle-open"
        else:
            i += 1
        for sign in (1, -1):
            some = rows[rows["strength"] * sign > 0].sort_values("strength", key=abs)
            drawn = _drawn(some, str(name), colour, dash)
            marker = {"size": 7, "symbol": symbol}
            figure.add_scatter(**drawn, mode="lines+markers", showlegend=sign > 0, marker=marker)
    figure.update_xaxes(type="log", dtick="D2")  # 1, 2 and 5 of each power of ten
    many = n_questions > 1
    return styled(
        figure,
        title=f"{behavior}: effect on {n_questions} question{'s' if many else ''}, and what it costs elsewhere",
        subtitle=said(model, "95 % intervals" if many else ""),
        x=f"mean KL on {f'{n_neutral} ' if n_neutral else ''}neutral prompts (nats a token)",
        y=f"change of {label}",
        height=600,
        legend=True,
    )


def _drawn(rows: pd.DataFrame, name: str, colour: str, dash: str = "solid") -> dict:
    return {
        "x": rows["kl_mean"].where(rows["kl_mean"] > 0),
        "y": rows["mean"],
        "error_y": {
            "array": rows["high"] - rows["mean"],
            "arrayminus": rows["mean"] - rows["low"],
            "thickness": 1,
            "width": 2,
        },
        "customdata": [
            [strength, interval_text(low, high)]
            for strength, low, high in zip(rows["strength"], rows["low"], rows["high"], strict=True)
        ],
        "name": escaped(name),
        "legendgroup": name,
        "line": {"color": colour, "dash": dash},
        "hovertemplate": (
            f"{escaped(name)}, strength %{{customdata[0]:g}}<br>KL %{{x:.4f}}, effect %{{y:.4f}} "
            "%{customdata[1]}<extra></extra>"
        ),
    }
