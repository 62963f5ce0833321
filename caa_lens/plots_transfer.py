"""Plotly figures of transfer; each takes a finished result."""

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from caa_lens.plots import BLUE, GREY, styled
from caa_lens.sweeps import METRIC_LABEL

if TYPE_CHECKING:
    from caa_lens.layer_transfer import LayerTransfer


def transfer_heatmap(result: "LayerTransfer") -> go.Figure:
    """Effect by source and target layer; own layers are framed, white is no effect."""
    cells = result.summary()
    table = cells.pivot(index="source", columns="target", values="mean")
    low = cells.pivot(index="source", columns="target", values="low").to_numpy()
    high = cells.pivot(index="source", columns="target", values="high").to_numpy()
    reach = max(float(abs(table.to_numpy()).max()), 1e-9)
    intervals = [[f"[{a:.4f}, {b:.4f}]" for a, b in zip(*rows, strict=True)] for rows in zip(low, high, strict=True)]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[str(layer) for layer in table.columns],
            y=[str(layer) for layer in table.index],
            customdata=intervals,
            colorscale="RdBu",
            zmin=-reach,
            zmax=reach,
            colorbar={"title": {"text": "effect per unit of multiplier", "side": "right"}},
            hovertemplate="layer %{y}'s vector at layer %{x}<br>%{z:.4f} %{customdata}<extra></extra>",
        )
    )
    for row, source in enumerate(table.index):
        if source in table.columns:
            column = list(table.columns).index(source)
            figure.add_shape(
                type="rect",
                x0=column - 0.5,
                x1=column + 0.5,
                y0=row - 0.5,
                y1=row + 0.5,
                line={"color": GREY, "width": 1},
            )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return styled(
        figure,
        title=f"{escape(result.vectors.behavior)}: change of {METRIC_LABEL[result.metric]}, "
        f"unsteered {result.unsteered:.3f}",
        x="added at layer (0-based block)",
        y="vector of layer",
        height=max(380, min(760, 160 + 18 * len(table))),
    )


def effect_by_cosine(result: "LayerTransfer") -> go.Figure:
    """Effect of a vector at another layer against its cosine with that layer's own vector."""
    cells = result.summary()
    off = cells[cells["source"] != cells["target"]]
    figure = go.Figure(
        go.Scatter(
            x=off["cosine"],
            y=off["mean"],
            mode="markers",
            marker={"color": BLUE, "size": 6, "opacity": 0.6},
            customdata=off[["source", "target", "low", "high"]],
            hovertemplate="layer %{customdata[0]}'s vector at layer %{customdata[1]}<br>cosine %{x:.3f}<br>"
            "effect %{y:.4f} [%{customdata[2]:.4f}, %{customdata[3]:.4f}]<extra></extra>",
        )
    )
    return styled(
        figure,
        title=f"{escape(result.vectors.behavior)}: does cosine predict transfer? r = {result.cosine_correlation():.2f}",
        x="cosine of the two layers' vectors",
        y="effect per unit of multiplier",
    )
