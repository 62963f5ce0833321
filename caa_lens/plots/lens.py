"""Figures of the lenses, in the common `style`: tokens in cells, ranks by layer."""

from collections.abc import Mapping, Sequence
from math import log10

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from caa_lens.plots.style import (
    CELL_INK,
    COLOURS,
    DASHES,
    DIVERGING,
    GREY,
    ORANGE,
    SEQUENTIAL,
    SYMBOLS,
    escaped,
    said,
    styled,
)

READING_LABEL = {
    "direct": "score, direct (logits per 1 / rms)",
    "normed": "score, normed (logits)",
    "in_context": "mean change of logit",
    "causal": "logit response (first order)",
    "effect": "change of log p (nats)",
}
CHANGES = ("in_context", "causal", "effect")  # whose probability is a mean change
READABLE = "readable"
BAND = "rgba(128, 128, 128, 0.18)"
ROW = 22  # pixels a layer
CELLS = 6  # of a row that two panels side by side have room for; of more, the panels stand on each other
WIDTH = 840  # pixels below which tokens in cells cannot be read
LETTER = 6.6  # pixels, about
AROUND, BETWEEN = 130, 16  # pixels beside the panels, and from one to the next


def token_heatmaps(frame: pd.DataFrame, k: int, *, vectors: str, reading: str, model: str = "") -> go.Figure:
    """The first `k` promoted and suppressed tokens side by side, layer x rank; white is a score of 0.

    Args:
        frame: columns `layer, side, rank, token, score, probability`, and perhaps `verdict`: a layer with another one
            than "readable" stands in brackets.
        k: with more than `CELLS` the suppressed tokens stand below the promoted ones.
        vectors: what they are called.
        reading: "direct", "normed", "in_context", "causal" or "effect".
    """
    frame = frame[frame["rank"] <= k]
    k = int(frame["rank"].max())
    sides = ("promoted", "suppressed")
    figure, places = _panels(sides, k, frame["layer"].nunique())
    label = "mean change of probability" if reading in CHANGES else "probability"
    for side, place in zip(sides, places, strict=True):
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
                textfont={"size": 11, "color": CELL_INK},
                xgap=1,
                ygap=1,
                hovertemplate=f"layer %{{y}}, {side} rank %{{x}}<br>%{{customdata[0]}}<br>score %{{z:.4g}}"
                f"<br>{label} %{{customdata[1]:.3g}}<extra></extra>",
            ),
            **place,
        )
    reach = max(float(frame["score"].abs().max()), 1e-9)
    styled(
        figure,
        title=f"{vectors}: the vector in tokens, by layer",
        subtitle=said(model, "in brackets: nothing to read here" if _unreadable(frame) else ""),
        x="rank (1 is the extreme)",
        y="layer (0-based block)",
        height=_height(frame["layer"].nunique(), places),
        panels=True,
        min_width=WIDTH,
    )
    figure.update_xaxes(dtick=1, tickfont={"size": 11})
    axis = {"colorscale": DIVERGING, "cmin": -reach, "cmax": reach}
    return _shared(figure, axis, READING_LABEL[reading], places)


def rank_curves(
    frame: pd.DataFrame,
    *,
    vectors: str,
    reading: str,
    d_vocab: int,
    controls: pd.DataFrame | None = None,
    model: str = "",
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
            name="median word, random directions (5 to 95 %)",
        )
    step = frame["layer"].drop_duplicates().sort_values().diff().min()
    for i, (word, rows) in enumerate(frame.groupby("word", sort=False)):
        rows = rows.sort_values("layer")
        # Where layers are missing from an even series, a line would tell of layers that were never read.
        gaps = rows["layer"].diff().gt(step).cumsum()
        shown = escaped(str(word))
        n_pieces = int(rows["pieces"].iloc[0])
        if n_pieces > 1:
            shown += f" (by {escaped(rows['token'].iloc[0])})"
        style = {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)], "width": 2}
        symbol = SYMBOLS[i % len(SYMBOLS)]
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
                marker={"size": 6, "symbol": symbol},
                hovertemplate=f"{shown}<br>layer %{{x}}<br>rank %{{y}} of {d_vocab}"
                "<br>score %{customdata:.4g}<extra></extra>",
            )
    styled(
        figure,
        title=f"{vectors}: rank of words by layer ({reading})",
        subtitle=said(model, f"of {d_vocab:,} tokens"),
        x="layer (0-based block)",
        y="rank (1 = most promoted)",
        height=540,
        legend=True,
    )
    middle = d_vocab / 2
    line = {"color": GREY, "dash": "dot", "width": 1}
    figure.add_hline(y=middle, line=line, name="middle of the vocabulary", showlegend=True)
    figure.update_layout(hovermode="closest")
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
    model: str = "",
) -> go.Figure:
    """The lens' first choice at each layer and position, unsteered and steered.

    Args:
        frame: columns `steered, layer, position, token_in, top_token, probability, unsteered_answer` and, if there is
            a steered run, `steered_answer`.
        settles_at: "unsteered" and, if there is such a run, "steered": the layer from which on its answer at the last
            position is the lens' first choice, if any.
        steered_layers, steer_start: from where on the steered run is steered.
    """
    runs = ("unsteered", "steered")[: len(settles_at)]
    where = frame.drop_duplicates("position").sort_values("position")
    ticks = [f"{pos} {escaped(token)}" for pos, token in zip(where["position"], where["token_in"], strict=True)]
    figure, places = _panels(runs, len(where), frame["layer"].nunique(), names=max(map(len, ticks)))
    for run, place in zip(runs, places, strict=True):
        rows = frame[frame["steered"] == (run == "steered")]
        figure.add_trace(
            go.Heatmap(
                z=_grid(rows, "position", "probability"),
                x=list(range(len(where))),
                y=_layers(rows),
                text=_short(rows, "position", "top_token"),
                customdata=_together([ticks] * rows["layer"].nunique(), _escaped(rows, "position", "top_token")),
                coloraxis="coloraxis",
                texttemplate="%{text}",
                textfont={"size": 11, "color": CELL_INK},
                xgap=1,
                ygap=1,
                hovertemplate="layer %{y}, after %{customdata[0]}<br>says %{customdata[1]}"
                "<br>probability %{z:.3f}<extra></extra>",
            ),
            **place,
        )
    styled(
        figure,
        title="The stream in tokens",
        subtitle=said(model, _residual_subtitle(frame, settles_at)),
        x="position and token read there",
        y="layer (0-based block)",
        height=_height(frame["layer"].nunique(), places) + 70,
        panels=True,
        min_width=WIDTH,
    )
    figure.update_xaxes(tickvals=list(range(len(where))), ticktext=ticks, tickangle=-55, tickfont={"size": 11})
    if steered_layers:
        layers = sorted(set(frame["layer"]))
        _mark_steering(figure, layers, list(where["position"]), min(steered_layers), steer_start or 0, place=places[-1])
    axis = {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1}
    return _shared(figure, axis, "probability of the token", places)


def _residual_subtitle(frame: pd.DataFrame, settles_at: Mapping[str, int | None]) -> str:
    last = frame[frame["position"] == frame["position"].max()]
    parts = []
    for run, settled in settles_at.items():
        answer = last[f"{run}_answer"].iloc[0]
        where = "not first at the layers read" if settled is None else f"first from layer {settled} on"
        parts.append(f"{run} answer {answer}: {where}")
    return "; ".join(parts)


def _mark_steering(
    figure: go.Figure,
    layers: Sequence[int],
    positions: Sequence[int],
    from_layer: int,
    from_position: int,
    *,
    place: dict[str, int],
) -> None:
    """A line around the steered part of its panel: from the first steered layer up, and position on."""
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
        line={"color": ORANGE, "width": 2},
        **place,
    )


def _panels(
    titles: Sequence[str], n_cells: int, n_layers: int, *, names: int = 3
) -> tuple[go.Figure, list[dict[str, int]]]:
    """Heat maps side by side or, where cells would be too narrow, one below the other; and each one's place.

    Args:
        n_cells: in a row.
        n_layers: rows of a panel.
        names: letters of the longest name below a panel.
    """
    if n_cells <= CELLS:
        figure = make_subplots(cols=len(titles), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=titles)
        return figure, [{"row": 1, "col": col} for col in range(1, len(titles) + 1)]
    gap = 70 + 5 * names  # pixels: a panel's names, the axis' and the next one's title
    spacing = min(gap / (len(titles) * ROW * n_layers + gap * (len(titles) - 1)), 0.4)
    figure = make_subplots(rows=len(titles), vertical_spacing=spacing, subplot_titles=titles)
    return figure, [{"row": row, "col": 1} for row in range(1, len(titles) + 1)]


def _shared(figure: go.Figure, coloraxis: dict, label: str, places: list[dict[str, int]]) -> go.Figure:
    """What the panels have in common: one colour bar, one title of the layers, categories."""
    title = {"text": label, "side": "right", "font": {"size": 12}}
    figure.update_layout(coloraxis={**coloraxis, "colorbar": {"title": title}})
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(type="category", showgrid=False)
    if len(places) > 1 and places[1]["col"] == 2:
        figure.update_yaxes(title="", col=2)
    elif len(places) > 1:
        figure.update_yaxes(title="layer")  # a panel of few layers has no room for more
    return figure


def _grid(rows: pd.DataFrame, across: str, value: str) -> list[list]:
    """Values by layer (ascending) and another column, as plain lists."""
    return rows.pivot(index="layer", columns=across, values=value).to_numpy().tolist()


def _escaped(rows: pd.DataFrame, across: str, value: str) -> list[list[str]]:
    """Plotly reads HTML in texts, so that a token `<b>` would be bold and not seen."""
    return [[escaped(token) for token in row] for row in _grid(rows, across, value)]


def _short(rows: pd.DataFrame, across: str, value: str) -> list[list[str]]:
    """Tokens cut to the width of a cell; the whole one is in the hover."""
    n = rows[across].nunique()
    panel = (WIDTH - AROUND - BETWEEN) / 2 if n <= CELLS else WIDTH - AROUND
    n_letters = max(2, int((panel / n - 2) / LETTER))
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


def _height(n_layers: int, places: list[dict[str, int]]) -> int:
    """Of panels side by side, or below each other."""
    rows = places[-1]["row"]
    return max(320, 160 + rows * ROW * n_layers + 90 * (rows - 1))
