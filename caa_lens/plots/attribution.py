"""Figures of token similarity and of downstream attribution, in the common `style`; strings are escaped."""

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import BLUE, GREY, escaped, styled

KIND_COLOUR = {"vector": "#c8453b", "attn": BLUE, "mlp": "#e0a030", "norm scale": GREY}
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
            customdata=rows[["low", "high"]],
            name=f"{KIND_LABEL[kind]}: {rows['mean'].sum():+.3g}",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x}<br>%{y:+.4f} logits [%{customdata[0]:.4f}, %{customdata[1]:.4f}]<extra></extra>",
        )
    figure.update_xaxes(
        type="category",
        showgrid=False,
        categoryorder="array",
        categoryarray=list(summary["component"]),
        tickmode="array",
        tickvals=list(summary["component"]),
        tickangle=-90,
        tickfont={"size": 11},
    )
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}, bargap=0.25)
    low, high = interval
    shown = f"{total:+.3g}" + ("" if low != low else f" [{low:+.3g}, {high:+.3g}]")
    # A share of what may as well be nothing would mean nothing.
    share = "" if low <= 0 <= high or not total else f", {direct_share:.0%} of it direct"
    title = (
        f"{escaped(behavior)} at layer {layer}, multiplier {multiplier:g}: logit difference {shown}{share}"
        f'<br><span style="font-size: 12px">mean of {n_questions} question{"s" if n_questions > 1 else ""}, '
        f"95 % intervals; the components sum to {summed:+.3g}</span>"
    )
    figure = styled(figure, title=title, x="component, by depth (0-based block)", y="contribution (logits)", height=500)
    return figure.update_layout(margin={"t": 110})


def similarity_heatmap(frame: pd.DataFrame, measure: str, *, behavior: str, reach: float) -> go.Figure:
    """One measure, layer x token; colours are symmetric about 0.

    Args:
        frame: columns `position, token, layer` and the measure's, position by position within a layer.
        measure: "cosine" or "dot".
        reach: the value with full colour.
    """
    table = frame.pivot(index="position", columns="layer", values=measure)
    tokens = [escaped(token) for token in frame["token"][: len(table)]]
    label = {"cosine": "cosine", "dot": "dot product"}[measure]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy().T,
            x=list(table.index),
            y=[str(layer) for layer in table.columns],
            customdata=[tokens] * len(table.columns),
            colorscale="RdBu",
            zmin=-reach,
            zmax=reach,
            colorbar={"title": {"text": label, "side": "right"}},
            hovertemplate="layer %{y}, position %{x}: %{customdata}<br>%{z:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(tickmode="array", tickvals=list(table.index), ticktext=tokens, tickangle=-90)
    figure.update_xaxes(tickfont={"size": 11})
    figure.update_yaxes(type="category")
    figure = styled(
        figure,
        title=f"{escaped(behavior)}: {label} of each token's resid_post with the vector",
        x="token",
        y="layer (0-based block)",
        height=max(380, 200 + 18 * len(table.columns)),
    )
    # Every token keeps its label: long texts make a wide figure that scrolls.
    return figure.update_layout(width=130 + 15 * len(table)) if len(table) > 50 else figure
