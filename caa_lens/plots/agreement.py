"""Figures of what contrast pairs agree on, and of what single questions do under steering."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from caa_lens.plots.style import BLUE, GREEN, GREY, ORANGE, banded_curve, interval_texts, said, styled

LAYER = "layer (0-based block)"
VERDICT = {
    "consistent": (GREEN, "circle"),
    "weak": (ORANGE, "diamond"),
    "nothing to steer with": (GREY, "x"),
}


def agreement_curves(frame: pd.DataFrame, *, of: str, n_pairs: int) -> go.Figure:
    """Split-half cosine with its interval, a marker's colour its verdict; agreement and pairs against; d' below.

    Args:
        frame: columns `layer, verdict, because, split_half, low, high, agreement, against, d_prime`.
    """
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, row_heights=[0.5, 0.3, 0.2], vertical_spacing=0.05)
    hover = "layer %{x}<br>%{y:.3f} %{customdata[0]}<extra></extra>"
    rows = frame.rename(columns={"split_half": "mean"})
    band, curve = banded_curve(rows, "layer", colour=BLUE, name="split-half cosine", hover=hover)
    figure.add_traces(
        [band, curve.update(mode="lines", hoverinfo="skip", hovertemplate=None)], rows=[1, 1], cols=[1, 1]
    )
    for verdict, (colour, symbol) in VERDICT.items():
        some = frame[frame["verdict"] == verdict]
        if len(some):
            figure.add_scatter(
                x=some["layer"],
                y=some["split_half"],
                customdata=some[["because"]],
                mode="markers",
                marker={"color": colour, "size": 9, "symbol": symbol},
                name=verdict,
                hovertemplate=f"layer %{{x}}: {verdict}<br>%{{customdata[0]}}<extra></extra>",
                row=1,
                col=1,
            )
    panels = (
        ("agreement", "mean cosine of two pairs", GREEN, "solid", 2),
        ("against", "share of pairs against", ORANGE, "dash", 2),
        ("d_prime", "d′ of held-out pairs", BLUE, "solid", 3),
    )
    for column, name, colour, dash, row in panels:
        figure.add_scatter(
            x=frame["layer"],
            y=frame[column],
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"size": 5},
            name=name,
            showlegend=row == 2,
            hovertemplate=f"layer %{{x}}<br>{name} %{{y:.3f}}<extra></extra>",
            row=row,
            col=1,
        )
    for row, level in ((1, 0), (2, 0.5), (3, 0)):
        figure.add_hline(y=level, line={"color": GREY, "dash": "dot", "width": 1}, row=row, col=1)
    title = f"{of}: what {n_pairs} pairs agree on"
    styled(figure, title=title, subtitle="95 % interval", x="", y="", height=680, legend=True)
    figure.update_xaxes(title=LAYER, row=3, col=1)
    for row, name in enumerate(("split-half cosine", "two pairs", "d′"), start=1):
        figure.update_yaxes(title=name, row=row, col=1)
    return figure


def sorted_pairs(frame: pd.DataFrame, *, of: str, layer: int) -> go.Figure:
    """Each pair's cosine with the vector of the others, sorted; those against in another colour.

    Args:
        frame: columns `pair, cosine, influence`.
    """
    rows = frame.sort_values("cosine")
    against = rows["cosine"] < 0
    figure = go.Figure(
        go.Bar(
            x=[str(pair) for pair in rows["pair"]],
            y=rows["cosine"],
            customdata=rows[["influence"]],
            marker={"color": [ORANGE if one else BLUE for one in against]},
            hovertemplate="pair %{x}<br>cosine %{y:.3f}<br>the vector turns by %{customdata[0]:.1f}° without it"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    title = f"{of} at layer {layer}: {int(against.sum())} of {len(rows)} pairs are against the others"
    return styled(figure, title=title, x="pair", y="cosine with the vector of the others")


def learning_curves(frame: pd.DataFrame, *, of: str, layer: int, n_pairs: int) -> go.Figure:
    """Cosine of two vectors by how many pairs each is of, with its interval; beyond the dotted line it is foretold.

    Args:
        frame: columns `n_pairs, cosine, low, high, measured`.
    """
    hover = "%{x} pairs each<br>cosine %{y:.3f} %{customdata[0]}<extra></extra>"
    rows = frame.rename(columns={"cosine": "mean"})
    figure = go.Figure(banded_curve(rows, "n_pairs", colour=BLUE, name="cosine", hover=hover))
    figure.add_vline(x=n_pairs / 2, line={"color": GREY, "dash": "dot", "width": 1})
    figure.add_hline(y=0.95, line={"color": GREY, "dash": "dash", "width": 1})
    figure.update_xaxes(type="log", dtick="D2")
    figure.update_yaxes(range=[-0.02, 1.02])
    figure.update_layout(showlegend=False)
    title = f"{of} at layer {layer}: two vectors from other pairs"
    return styled(figure, title=title, subtitle="95 % interval", x="pairs of each vector", y="cosine")


def sorted_slopes(
    frame: pd.DataFrame, *, behavior: str, layer: int, unit: str, steepest: bool = False, model: str = ""
) -> go.Figure:
    """Each question's slope with its interval, sorted; those that move the wrong way in another colour.

    Args:
        frame: columns `question, slope, low, high`; no bars where the interval is NaN.
        unit: what a slope is the change of, by one multiplier.
        steepest: whether these slopes chose the layer, which flatters them.
    """
    rows = frame.sort_values("slope", kind="stable")
    wrong = rows["slope"] < 0
    figure = go.Figure(
        go.Scatter(
            x=[str(question) for question in rows["question"]],
            y=rows["slope"],
            error_y={
                "array": rows["high"] - rows["slope"],
                "arrayminus": rows["slope"] - rows["low"],
                "thickness": 1,
                "width": 0,
                "color": GREY,
            },
            customdata=interval_texts(rows),
            mode="markers",
            marker={"color": [ORANGE if one else BLUE for one in wrong], "size": 7},
            hovertemplate="question %{x}<br>slope %{y:.4f} %{customdata[0]}<extra></extra>",
        )
    )
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(type="category")
    chosen = "this layer is the steepest of these questions" if steepest else ""
    return styled(
        figure,
        title=f"{behavior} at layer {layer}: {int(wrong.sum())} of {len(rows)} questions move the wrong way",
        subtitle=said(model, chosen),
        x="question (sorted)",
        y=f"slope: {unit}",
    )
