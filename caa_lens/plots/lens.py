"""Figures of the lenses, in the common `style`: tokens in cells, ranks by layer."""

from collections.abc import Mapping, Sequence
from math import log10

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from caa_lens.plots.style import GREY, escaped, styled

READING_LABEL = {
    "direct": "score, direct (logits per unit of 1 / rms)",
    "normed": "score, normed (logits)",
    "in_context": "mean change of logit",
    "causal": "response of the logit, to first order",
    "effect": "change of log p (nats)",
}
CHANGES = ("in_context", "causal", "effect")  # whose probability is a mean change
READABLE = "readable"
# Legible on white and on black, and apart for most colour-blind readers.
LINES = ("#3b7dd8", "#e07b39", "#2e9e6b", "#c0509f", "#c9a227", "#7a6ff0", "#d6455d", "#17a2b8")
DASHES = ("solid", "dash", "dot")
BAND = "rgba(128, 128, 128, 0.18)"
ROW = 22  # pixels a layer
PANEL = 390  # pixels a panel has in a page of 1000
LETTER = 6.2  # pixels, about


def token_heatmaps(frame: pd.DataFrame, k: int, *, vectors: str, reading: str) -> go.Figure:
    """The first `k` promoted and suppressed tokens side by side, layer x rank; white is a score of 0.

    Args:
        frame: columns `layer, side, rank, token, score, probability`, and perhaps `verdict`: a layer with another one
            than "readable" stands in brackets.
        vectors: what they are called.
        reading: "direct", "normed", "in_context", "causal" or "effect".
    """
    frame = frame[frame["rank"] <= k]
    k = int(frame["rank"].max())
    figure = make_subplots(
        cols=2, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=["promoted", "suppressed"]
    )
    label = "mean change of probability" if reading in CHANGES else "probability"
    for col, side in enumerate(("promoted", "suppressed"), start=1):
        rows = frame[frame["side"] == side]
        figure.add_trace(
            go.Heatmap(
                z=_grid(rows, "rank", "score"),
                x=[str(rank) for rank in range(1, k + 1)],
                y=_judged_layers(rows),
                text=_short(rows, "rank", "token"),
                customdata=_together(_escaped(rows, "rank", "token"), _grid(rows, "rank", "probability")),
                coloraxis="coloraxis",
                texttemplate="%{text}",
                textfont={"size": 11},
                xgap=1,
                ygap=1,
                hovertemplate=f"layer %{{y}}, {side} rank %{{x}}<br>%{{customdata[0]}}<br>score %{{z:.4g}}"
                f"<br>{label} %{{customdata[1]:.3g}}<extra></extra>",
            ),
            row=1,
            col=col,
        )
    reach = max(float(frame["score"].abs().max()), 1e-9)
    styled(
        figure,
        title=f"{escaped(vectors)}: the vector in tokens, by layer"
        + (" (in brackets: nothing to read here)" if _unreadable(frame) else ""),
        x="rank (1 is the extreme)",
        y="layer (0-based block)",
        height=_height(frame["layer"].nunique()),
    )
    return _two_panels(figure, {"colorscale": "RdBu", "cmin": -reach, "cmax": reach}, READING_LABEL[reading])


def rank_curves(
    frame: pd.DataFrame, *, vectors: str, reading: str, d_vocab: int, controls: pd.DataFrame | None = None
) -> go.Figure:
    """Rank of each word by layer, most promoted on top.

    Args:
        frame: columns `layer, word, token, pieces, rank, score`.
        vectors: what they are called.
        reading: "direct", "normed", "in_context", "causal" or "effect".
        d_vocab: the rank of the most suppressed token.
        controls: columns `layer, control_low, control_high`, the band of the words' median rank under the controls.
    """
    figure = go.Figure()
    if controls is not None:
        figure.add_scatter(
            x=[*controls["layer"], *controls["layer"][::-1]],
            y=[*controls["control_high"], *controls["control_low"][::-1]],
            mode="lines",
            fill="toself",
            fillcolor=BAND,
            line={"width": 0},
            hoverinfo="skip",
            name="median word under random directions, 5 to 95 %",
        )
    for i, (word, rows) in enumerate(frame.groupby("word", sort=False)):
        rows = rows.sort_values("layer")
        # A line between two layers that are not neighbours would tell of layers that were never read.
        gaps = rows["layer"].diff().gt(1).cumsum()
        shown = escaped(str(word))
        n_pieces = int(rows["pieces"].iloc[0])
        if n_pieces > 1:
            shown += f" (by {escaped(rows['token'].iloc[0])})"
        style = {"color": LINES[i % len(LINES)], "dash": DASHES[i // len(LINES) % len(DASHES)], "width": 2}
        for j, (_, part) in enumerate(rows.groupby(gaps)):
            figure.add_scatter(
                x=part["layer"],
                y=part["rank"],
                customdata=part["score"],
                name=shown,
                legendgroup=str(i),
                showlegend=j == 0,
                mode="lines+markers",
                line=style,
                marker={"size": 6},
                hovertemplate=f"{shown}<br>layer %{{x}}<br>rank %{{y}} of {d_vocab}"
                "<br>score %{customdata:.4g}<extra></extra>",
            )
    styled(
        figure,
        title=f"{escaped(vectors)}: rank of words by layer ({reading})",
        x="layer (0-based block)",
        y=f"rank among {d_vocab} tokens (1 = most promoted)",
        height=460,
    )
    middle = d_vocab / 2
    figure.add_hline(y=middle, line={"color": GREY, "dash": "dot", "width": 1})
    figure.add_annotation(
        text="middle of the vocabulary",
        font={"size": 11},
        showarrow=False,
        x=1,
        xref="x domain",
        xanchor="right",
        y=log10(middle),  # annotations, unlike lines, take a logarithmic axis' own units
        yanchor="bottom",
    )
    figure.update_layout(hovermode="closest", legend={"title": {"text": "word"}})
    tens = [10**i for i in range(len(str(d_vocab))) if 10**i <= d_vocab]
    figure.update_yaxes(
        type="log", range=[log10(d_vocab) + 0.1, -0.1], tickvals=tens, ticktext=[f"{ten:,}" for ten in tens]
    )
    return figure


def residual_heatmaps(
    frame: pd.DataFrame,
    *,
    settles_at: Mapping[str, int | None],
    steered_layers: Sequence[int] = (),
    steer_start: int | None = None,
) -> go.Figure:
    """The lens' first choice at each layer and position, unsteered and steered.

    Args:
        frame: columns `steered, layer, position, token_in, top_token, probability, unsteered_answer` and, if there is
            a steered run, `steered_answer`.
        settles_at: "unsteered" and, if there is such a run, "steered": the layer from which on its answer at the last
            position is the lens' first choice, if any.
        steered_layers, steer_start: from where on the steered run is steered.
    """
    runs = [False, True][: len(settles_at)]
    figure = make_subplots(
        cols=len(runs), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=["unsteered", "steered"][: len(runs)]
    )
    where = frame.drop_duplicates("position").sort_values("position")
    ticks = [f"{pos} {escaped(token)}" for pos, token in zip(where["position"], where["token_in"], strict=True)]
    for col, steered in enumerate(runs, start=1):
        rows = frame[frame["steered"] == steered]
        figure.add_trace(
            go.Heatmap(
                z=_grid(rows, "position", "probability"),
                x=list(range(len(where))),
                y=_layers(rows),
                text=_short(rows, "position", "top_token"),
                customdata=_together([ticks] * rows["layer"].nunique(), _escaped(rows, "position", "top_token")),
                coloraxis="coloraxis",
                texttemplate="%{text}",
                textfont={"size": 10},
                xgap=1,
                ygap=1,
                hovertemplate="layer %{y}, after %{customdata[0]}<br>says %{customdata[1]}"
                "<br>probability %{z:.3f}<extra></extra>",
            ),
            row=1,
            col=col,
        )
    styled(
        figure,
        title=_residual_title(frame, settles_at),
        x="position and token read there",
        y="layer (0-based block)",
        height=_height(frame["layer"].nunique()) + 70,
    )
    figure.update_xaxes(tickvals=list(range(len(where))), ticktext=ticks, tickangle=-55)
    if steered_layers:
        layers = sorted(set(frame["layer"]))
        _mark_steering(figure, layers, list(where["position"]), min(steered_layers), steer_start or 0)
    return _two_panels(figure, {"colorscale": "Blues", "cmin": 0, "cmax": 1}, "probability of the token")


def _residual_title(frame: pd.DataFrame, settles_at: Mapping[str, int | None]) -> str:
    last = frame[frame["position"] == frame["position"].max()]
    parts = []
    for run, settled in settles_at.items():
        answer = escaped(last[f"{run}_answer"].iloc[0])
        where = "not first at the layers read" if settled is None else f"first from layer {settled} on"
        parts.append(f"{run} answer {answer}: {where}")
    return "The stream in tokens<br><span style='font-size: 12px'>" + "; ".join(parts) + "</span>"


def _mark_steering(
    figure: go.Figure, layers: Sequence[int], positions: Sequence[int], from_layer: int, from_position: int
) -> None:
    """A line around the steered part of the right panel: from the first steered layer up, and position on."""
    first_layer = sum(layer < from_layer for layer in layers)
    first_position = sum(position < from_position for position in positions)
    if first_layer == len(layers) or first_position == len(positions):
        return
    figure.add_shape(
        type="rect",
        x0=first_position - 0.5,
        x1=len(positions) - 0.5,
        y0=first_layer - 0.5,
        y1=len(layers) - 0.5,
        line={"color": "#e07b39", "width": 2},
        row=1,
        col=2,
    )


def _two_panels(figure: go.Figure, coloraxis: dict, label: str) -> go.Figure:
    """What heat maps side by side share: one colour bar, one title of the layers, categories."""
    title = {"text": label, "side": "right", "font": {"size": 12}}
    colorbar = {"title": title, "thickness": 14, "tickfont": {"size": 11}}
    figure.update_layout(coloraxis={**coloraxis, "colorbar": colorbar})
    figure.update_layout(margin={"t": 85, "r": 90})
    figure.update_annotations(font={"size": 13}, yshift=2)  # the panels' titles
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="", col=2)
    return figure


def _grid(rows: pd.DataFrame, across: str, value: str) -> list[list]:
    """Values by layer (ascending) and another column, as plain lists."""
    return rows.pivot(index="layer", columns=across, values=value).to_numpy().tolist()


def _escaped(rows: pd.DataFrame, across: str, value: str) -> list[list[str]]:
    """Plotly reads HTML in texts, so that a token `<b>` would be bold and not seen."""
    return [[escaped(token) for token in row] for row in _grid(rows, across, value)]


def _short(rows: pd.DataFrame, across: str, value: str) -> list[list[str]]:
    """Tokens cut to the width of a cell; the whole one is in the hover."""
    n_letters = max(3, int(PANEL / rows[across].nunique() / LETTER))
    cut = rows.assign(cut=[t if len(t) <= n_letters else t[: n_letters - 1] + "…" for t in rows[value]])
    return _escaped(cut, across, "cut")


def _together(*tables: list[list]) -> list[list[tuple]]:
    """Several tables' values of each cell."""
    return [list(zip(*rows, strict=True)) for rows in zip(*tables, strict=True)]


def _unreadable(rows: pd.DataFrame) -> set[int]:
    return set(rows.loc[rows["verdict"] != READABLE, "layer"]) if "verdict" in rows else set()


def _judged_layers(rows: pd.DataFrame) -> list[str]:
    unreadable = _unreadable(rows)
    return [f"({layer})" if layer in unreadable else str(layer) for layer in sorted(set(rows["layer"]))]


def _layers(rows: pd.DataFrame) -> list[str]:
    return [str(layer) for layer in sorted(set(rows["layer"]))]


def _height(n_layers: int) -> int:
    return max(320, 150 + ROW * n_layers)
