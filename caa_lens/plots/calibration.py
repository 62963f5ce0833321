"""The figure of a calibration: effect against divergence of every candidate, the budget, and what was chosen."""

import math

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import BLUE, GREY, ORANGE, said, styled


def effect_within_budget(
    frame: pd.DataFrame, *, budget: float, behavior: str, label: str, cross_fitted: bool, model: str = ""
) -> go.Figure:
    """A point a candidate, those over the budget in grey; the chosen layer's are joined.

    Args:
        frame: columns `layer, multiplier, swept, validation, effect, low, high, kl_mean, kl_tokens, within, chosen`.
        label: what effects are a change of.
        cross_fitted: points are effects on the questions that chose, as there are no others; the chosen one's is not.
    """
    column = "validation" if cross_fitted else "effect"
    chosen = frame[frame["chosen"]]
    drawn = frame[frame["swept"] & ~frame["chosen"]]
    hover = (
        "layer %{customdata[0]}, multiplier ±%{customdata[1]:g}<br>effect %{y:.3f}, KL %{x:.3g} on %{customdata[2]} "
        "tokens<extra></extra>"
    )
    figure = go.Figure()
    for within, name, colour, symbol in ((False, "over the budget", GREY, "x"), (True, "within", BLUE, "circle")):
        some = drawn[drawn["within"] == within]
        figure.add_scatter(
            x=some["kl_mean"].clip(lower=1e-6),
            y=some[column],
            customdata=some[["layer", "multiplier", "kl_tokens"]],
            mode="markers",
            marker={"color": colour, "size": 7 if within else 5, "symbol": symbol},
            name=name,
            hovertemplate=hover,
        )
    for one in chosen.to_dict("records"):
        curve = frame[(frame["layer"] == one["layer"]) & (frame["swept"] | frame["chosen"])].sort_values("multiplier")
        figure.add_scatter(
            x=curve["kl_mean"].clip(lower=1e-6),
            y=curve[column].where(~curve["chosen"], curve["effect"]),
            mode="lines",
            line={"color": ORANGE, "width": 1.5, "dash": "dot"},
            name=f"layer {one['layer']}",
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=[one["kl_mean"]],
            y=[one["effect"]],
            error_y={
                "array": [one["high"] - one["effect"]],
                "arrayminus": [one["effect"] - one["low"]],
                "thickness": 2,
                "width": 5,
                "color": ORANGE,
            },
            customdata=[[one["layer"], one["multiplier"], one["kl_tokens"]]],
            mode="markers",
            marker={"color": ORANGE, "size": 15, "symbol": "star"},
            name=f"chosen: ±{one['multiplier']:.3g}",
            hovertemplate=hover,
        )
    figure.add_vline(x=budget, line={"color": GREY, "dash": "dash"})
    figure.add_annotation(
        x=math.log10(budget),
        y=1,
        yref="paper",
        text=f"budget {budget:g}",
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
    )
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(type="log", dtick=1)
    return styled(
        figure,
        title=f"{behavior}: effect of ±m, and its cost elsewhere",
        subtitle=said(model),
        x="mean KL on neutral prompts (nats a token)",
        y=f"effect: {label}",
        height=520,
        legend=True,
        panels=True,
    )
