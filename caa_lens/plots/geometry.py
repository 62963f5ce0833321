"""Figures of the geometry of vectors and of pair activations.

`of` says whose they are, for the title: `sentiment of SmolLM2`.
"""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from caa_lens.plots.style import (
    BLUE,
    FAINT_BLUE,
    GREEN,
    GREY,
    GRID,
    NARROW,
    ORANGE,
    SYMBOLS,
    escaped,
    framed_heatmap,
    interval_texts,
    said,
    styled,
    width_of_written,
)

SIDE_COLOUR = {"positive": BLUE, "negative": ORANGE}
LAYER = "layer (0-based block)"
FEW, COLUMNS = 4, 4  # so many panels stand two in a row, which a phone has room for; more stand four in a row


def cosine_heatmap(frame: pd.DataFrame, *, of: str, sets: tuple[str, str] | None = None) -> go.Figure:
    """Layer x layer; same layer with same layer is framed.

    Args:
        frame: columns `layer, other_layer, cosine`.
        sets: what the rows' and the columns' vectors are called, where they are of two sets.
    """
    table = frame.pivot(index="layer", columns="other_layer", values="cosine")
    own, others = (LAYER, LAYER) if sets is None else (f"layer of {escaped(name)}" for name in sets)
    figure = _square_cells(table, "layer %{y} with layer %{x}<br>cosine %{z:.4f}<extra></extra>")
    return styled(
        figure,
        title=f"{of}: cosine by layer",
        x=others,
        y=own,
        height=max(380, min(760, 160 + 18 * len(table))),
    )


def behavior_heatmap(frame: pd.DataFrame, *, models: Sequence[str]) -> go.Figure:
    """Behavior x behavior at one layer, with the cosines written in; the unit diagonal is framed.

    Args:
        frame: columns `behavior, other_behavior, layer, cosine`.
        models: whose vectors they are.
    """
    names = list(dict.fromkeys(frame["behavior"]))
    table = frame.pivot(index="behavior", columns="other_behavior", values="cosine").loc[names, names]
    figure = _square_cells(table, "%{y} with %{x}<br>cosine %{z:.4f}<extra></extra>", written=".2f")
    figure.update_yaxes(autorange="reversed", automargin=True)  # read as a table, from the top
    figure.update_xaxes(automargin=True)
    return styled(
        figure,
        title=f"cosine of behaviors at layer {frame['layer'].iloc[0]}",
        subtitle=said(*sorted(set(models))),
        x="behavior",
        y="behavior",
        height=max(420, 180 + 50 * len(table)),
        min_width=width_of_written(table),
    )


def cosine_curve(frame: pd.DataFrame, *, of: str, by_chance: float) -> go.Figure:
    """Cosine by layer, and the band in which 95 % of random directions lie.

    Args:
        frame: columns `layer, cosine`.
        by_chance: half the band's height.
    """
    curve = _curve(frame, "cosine", BLUE, "same layer of both", "cosine")
    figure = go.Figure(curve.update(showlegend=True))
    band = "95 % of random directions"
    figure.add_hrect(y0=-by_chance, y1=by_chance, fillcolor=GRID, line_width=0, name=band, showlegend=True)
    figure.update_yaxes(range=[min(-0.1, float(frame["cosine"].min()) - 0.05), 1.05])
    return styled(figure, title=f"{of}: cosine of vectors", x=LAYER, y="cosine", height=460, legend=True)


def vector_curves(frame: pd.DataFrame, *, of: str, model: str = "") -> go.Figure:
    """Each layer's norm above; below its cosine with the vector of the layer before, where that is there too.

    Args:
        frame: columns `layer, norm, cosine_before`.
    """
    figure = _two_panels()
    figure.add_trace(_curve(frame, "norm", BLUE, "norm", "norm"), row=1, col=1)
    figure.add_trace(_curve(frame, "cosine_before", GREEN, "cosine", "cosine with the layer before"), row=2, col=1)
    styled(figure, title=f"{of}: norms and neighbours", subtitle=said(model), x=LAYER, y="", height=520)
    figure.update_xaxes(title="", row=1, col=1)
    figure.update_yaxes(title="norm (units of the stream)", rangemode="tozero", row=1, col=1)
    lowest = frame["cosine_before"].min()
    figure.update_yaxes(
        title="cosine with the one before",
        range=[min(0.0, lowest if lowest == lowest else 0.0) - 0.05, 1.05],
        row=2,
        col=1,
    )
    return figure.update_layout(showlegend=False)


def norm_curves(frame: pd.DataFrame, *, of: str, n_pairs: int, read_at: str) -> go.Figure:
    """Norms of vectors and of the residual stream on a logarithmic axis, and their ratio below.

    Args:
        frame: columns `layer, vector, residual_positive, residual_negative, ratio`.
        n_pairs, read_at: of how many pairs the stream was read, and at which tokens.
    """
    figure = _two_panels()
    for column, name, colour in (
        ("residual_positive", "residual stream, positive side", BLUE),
        ("residual_negative", "residual stream, negative side", ORANGE),
        ("vector", "steering vector", GREEN),
    ):
        figure.add_trace(_curve(frame, column, colour, name, f"norm of the {name}"), row=1, col=1)
    figure.data[1].line.dash = "dot"  # the sides' norms are close: let both be seen
    ratio = _curve(frame, "ratio", GREEN, "ratio", "vector / residual")
    figure.add_trace(ratio.update(showlegend=False), row=2, col=1)
    subtitle = f"{n_pairs} pair{'s' if n_pairs > 1 else ''}, {read_at}"
    styled(figure, title=f"{of}: norms", subtitle=subtitle, x=LAYER, y="", height=560, legend=True)
    figure.update_xaxes(title="", row=1, col=1)
    figure.update_yaxes(title="norm (units of the stream)", type="log", dtick=1, row=1, col=1)
    return figure.update_yaxes(title="vector / residual", rangemode="tozero", row=2, col=1)


def pca_panels(frame: pd.DataFrame, *, of: str, n_pairs: int, read_at: str) -> go.Figure:
    """One panel a layer: pc1 and pc2, colour for the side, the marker's shape for the letter.

    Args:
        frame: columns `layer, pair, side, letter, pc1, pc2, explained_pc1, explained_pc2`.
        n_pairs, read_at: of how many pairs the stream was read, and at which tokens.
    """
    layers = sorted(set(frame["layer"]))
    letters = sorted(set(frame["letter"]))
    n_columns = min(2 if len(layers) <= FEW else COLUMNS, len(layers))
    n_rows = -(-len(layers) // n_columns)
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=[f"layer {layer}" for layer in layers],
        horizontal_spacing=0.3 / n_columns,
        vertical_spacing=0.3 / n_rows,
    )
    styled(
        figure,
        title=f"{of}: two principal components",
        subtitle=f"activations of {n_pairs} pairs, {read_at}",
        x="",
        y="",
        height=150 + 300 * n_rows,
        legend=True,
        panels=True,
        min_width=200 * n_columns if n_columns > 2 else NARROW,
    )
    for panel, layer in enumerate(layers):
        place = {"row": panel // n_columns + 1, "col": panel % n_columns + 1}
        rows = frame[frame["layer"] == layer]
        for (side, letter), group in rows.groupby(["side", "letter"], sort=False):
            name = f"{side} ({escaped(letter)})" if letter else side
            figure.add_trace(
                go.Scatter(
                    x=group["pc1"],
                    y=group["pc2"],
                    customdata=group["pair"],
                    mode="markers",
                    name=name,
                    legendgroup=name,
                    showlegend=panel == 0,
                    marker={
                        "color": SIDE_COLOUR[side],
                        "symbol": SYMBOLS[letters.index(letter) % len(SYMBOLS)],
                        "size": 7,
                    },
                    hovertemplate=f"pair %{{customdata}}, {name}<br>PC1 %{{x:.4g}}, PC2 %{{y:.4g}}<extra></extra>",
                ),
                **place,
            )
        figure.update_xaxes(title=f"PC1 ({rows['explained_pc1'].iloc[0]:.0%} of var.)", **place)
        figure.update_yaxes(title=f"PC2 ({rows['explained_pc2'].iloc[0]:.0%})", **place)
    figure.update_xaxes(title_standoff=4, nticks=4)
    return figure.update_yaxes(title_standoff=2, nticks=5)


def separability_curves(
    frame: pd.DataFrame, *, of: str, n_pairs: int, emergence: int | None, chance: float
) -> go.Figure:
    """Held-out accuracy with its interval above; explained share and silhouette below; emergence across both.

    Args:
        frame: columns `layer, accuracy, low, high, explained, silhouette`.
        emergence: a layer to mark, if any.
        chance: an accuracy to mark.
    """
    layers = frame["layer"]
    figure = _two_panels()
    figure.add_trace(
        go.Scatter(
            x=[*layers, *layers[::-1]],
            y=[*frame["high"], *frame["low"][::-1]],
            mode="lines",
            fill="toself",
            fillcolor=FAINT_BLUE,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    accuracy = _curve(frame, "accuracy", BLUE, "held-out accuracy", "accuracy", interval=True)
    figure.add_trace(accuracy, row=1, col=1)
    explained = _curve(frame, "explained", GREEN, "variance between the sides", "share of variance")
    silhouette = _curve(frame, "silhouette", ORANGE, "silhouette", "silhouette")
    figure.add_traces([explained, silhouette], rows=[2, 2], cols=[1, 1])
    figure.add_hline(y=chance, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=1)
    if emergence is not None:
        figure.add_vline(x=emergence, line={"color": GREY, "dash": "dash", "width": 1.5}, row="all", col=1)
        figure.add_annotation(
            x=emergence,
            y=1,
            xref="x",
            yref="y domain",
            text=f"emerges at layer {emergence}",
            showarrow=False,
            xanchor="left" if emergence <= layers.mean() else "right",
            yanchor="bottom",
            font={"size": 12},
        )
    styled(
        figure,
        title=f"{of}: how the sides part",
        subtitle=f"{n_pairs} pairs, 95 % interval",
        x=LAYER,
        y="",
        height=560,
        legend=True,
        panels=True,
    )
    figure.update_xaxes(title="", row=1, col=1)
    figure.update_yaxes(title=f"held-out accuracy (chance {chance:.2g})", row=1, col=1)
    return figure.update_yaxes(title="share; silhouette (−1 to 1)", row=2, col=1)


def _square_cells(table: pd.DataFrame, hover: str, written: str | None = None) -> go.Figure:
    figure = framed_heatmap(table, limit=1, bar="cosine", hover=hover, written=written)
    figure.update_xaxes(constrain="domain")
    return figure.update_yaxes(constrain="domain", scaleanchor="x")


def _two_panels() -> go.Figure:
    return make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)


def _curve(
    frame: pd.DataFrame, column: str, colour: str, name: str, what: str, *, interval: bool = False
) -> go.Scatter:
    """A column against the layer; hover shows the value and, if asked, the columns `low` and `high`."""
    shown = " %{customdata[0]}" if interval else ""
    return go.Scatter(
        x=frame["layer"],
        y=frame[column],
        customdata=interval_texts(frame) if interval else None,
        mode="lines+markers",
        line={"color": colour},
        marker={"size": 6},
        name=name,
        hovertemplate=f"layer %{{x}}<br>{what} %{{y:.4g}}{shown}<extra></extra>",
    )
