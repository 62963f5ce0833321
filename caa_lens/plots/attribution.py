"""Figures of token similarity and of downstream attribution, in the common `style`; strings are escaped."""

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    ORANGE,
    escaped,
    interval_texts,
    mean_of,
    said,
    styled,
)

KIND_COLOUR = {"vector": GREEN, "attn": BLUE, "mlp": ORANGE, "norm scale": GREY}
LONGEST_TOKEN = 18  # letters beside a row
KIND_LABEL = {
    "vector": "the vector's direct path",
    "attn": "later attention",
    "mlp": "later MLPs",
    "norm scale": "final norm's scale",
}


def contribution_bars(
    summary: pd.DataFrame,
    *,
    behavior: str,
    layer: int,
    multiplier: float,
    n_questions: int,
    total: float,
    interval: tuple[float, float],
    direct_share: float,
    summed: float,
    model: str = "",
) -> go.Figure:
    """Mean contribution of each component with its 95 % interval, in the order of depth.

    Args:
        summary: columns `component, layer, kind, mean, low, high`, by depth.
        total, interval: mean of the measured change of the logit difference; NaN where there is no interval.
        direct_share: the vector's own path as a share of it.
        summed: mean sum of all components.
    """
    figure = go.Figure()
    for kind, colour in KIND_COLOUR.items():
        rows = summary[summary["kind"] == kind]
        if rows.empty:
            continue
        figure.add_bar(
            x=rows["component"],
            y=rows["mean"],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": rows["high"] - rows["mean"],
                "arrayminus": rows["mean"] - rows["low"],
                "thickness": 1,
                "width": 2,
                "color": GREY,
            },
            customdata=interval_texts(rows),
            name=f"{KIND_LABEL[kind]}: {rows['mean'].sum():+.3g}",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x}<br>%{y:+.4f} logits %{customdata[0]}<extra></extra>",
        )
    figure.update_xaxes(
        type="category",
        showgrid=False,
        categoryorder="array",
        categoryarray=list(summary["component"]),
        tickangle=-90,
        tickfont={"size": 11},
    )
    figure.update_layout(bargap=0.25)
    low, high = interval
    shown = f"{total:+.3g}" + ("" if low != low else f" [{low:+.3g}, {high:+.3g}]")
    # A share of what may as well be nothing would mean nothing.
    share = "" if low <= 0 <= high or not total else f", {direct_share:.0%} of it direct"
    return styled(
        figure,
        title=f"{behavior} at layer {layer}, multiplier {multiplier:g}",
        subtitle=f"logit difference {shown}{share}; "
        + said(model, mean_of(n_questions), f"the components sum to {summed:+.3g}"),
        x="component, by depth (0-based block)",
        y="contribution (logits)",
        height=540,
        legend=True,
    )


def similarity_heatmap(frame: pd.DataFrame, measure: str, *, behavior: str, reach: float, model: str = "") -> go.Figure:
    """One measure, a row a token, from the top as it is read, and a column a layer; colours are symmetric about 0.

    Args:
        frame: columns `position, token, layer` and the measure's, position by position within a layer.
        measure: "cosine" or "dot".
        reach: the value with full colour.
    """
    table = frame.pivot(index="position", columns="layer", values=measure)
    whole = list(frame["token"][: len(table)])
    tokens = [escaped(token) for token in whole]
    short = [t if len(t) <= LONGEST_TOKEN else t[: LONGEST_TOKEN - 1] + "…" for t in whole]
    label = {"cosine": "cosine", "dot": "dot product"}[measure]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[str(layer) for layer in table.columns],
            y=list(table.index),
            customdata=[[token] * len(table.columns) for token in tokens],
            colorscale=DIVERGING,
            zmin=-reach,
            zmax=reach,
            colorbar={"title": {"text": label, "side": "right"}},
            hovertemplate="layer %{x}, position %{y}: %{customdata}<br>%{z:.4g}<extra></extra>",
        )
    )
    styled(
        figure,
        title=f"{behavior}: {label} of each token's resid_post with the vector",
        subtitle=said(model),
        x="layer (0-based block)",
        y="",
        height=max(280, 120 + 17 * len(table)),  # the colour bar needs as much
    )
    figure.update_xaxes(type="category", showgrid=False)
    ticks = {"tickmode": "array", "tickvals": list(table.index), "ticktext": [escaped(token) for token in short]}
    return figure.update_yaxes(**ticks, tickfont={"size": 11}, autorange="reversed", showgrid=False, zeroline=False)
