"""Plotly figures of transfer; each takes a finished result."""

import itertools
from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from caa_lens.measures.sweeps import METRIC_LABEL
from caa_lens.plots.style import BLUE, GREEN, GREY, GRID, ORANGE, banded_curve, framed_heatmap, styled

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.transfers.grids import TransferGrid
    from caa_lens.transfers.layers import LayerTransfer
    from caa_lens.transfers.models import ModelTransfer
    from caa_lens.transfers.residual_map import ResidualMap

LAYER = "layer (0-based block)"
MOST_WRITTEN = 12  # columns of a heat map that still have room for numbers
ENDS = "[%{customdata[0]:.4f}, %{customdata[1]:.4f}]"
LEGEND_BELOW = {"orientation": "h", "y": -0.2, "yanchor": "top"}


def transfer_heatmap(result: "LayerTransfer") -> go.Figure:
    """Effect by source and target layer; own layers are framed, white is no effect."""
    figure, table = _effects(result.summary(), result.matrix(), _unit(result), "layer %{y}'s vector at layer %{x}")
    return styled(
        figure,
        title=f"{escape(result.vectors.behavior)}: change of {METRIC_LABEL[result.metric]}, "
        f"unsteered {result.unsteered:.3f}",
        x=f"added at {LAYER}",
        y="vector of layer",
        height=max(380, min(760, 160 + 18 * len(table))),
    )


def decay_curves(result: "LayerTransfer") -> go.Figure:
    """Effect against target - source: a thin line a source layer, and the mean of all with its interval."""
    figure = go.Figure()
    cells = result.summary()
    for source in sorted(set(cells["source"])):
        rows = cells[cells["source"] == source]
        figure.add_scatter(
            x=rows["target"] - source,
            y=rows["mean"],
            customdata=rows[["low", "high", "target"]],
            mode="lines",
            line={"color": GREY, "width": 1},
            opacity=0.45,
            showlegend=False,
            hovertemplate=f"layer {source}'s vector at layer %{{customdata[2]}}<br>%{{y:.4f}} {ENDS}<extra></extra>",
        )
    hover = f"%{{x}} layers away<br>mean %{{y:.4f}} {ENDS}<extra></extra>"
    curve = banded_curve(result.decay(), "distance", colour=BLUE, name="mean of all source layers", hover=hover)
    figure.add_traces(curve)
    figure.add_vline(x=0, line={"color": GREY, "dash": "dot", "width": 1})
    styled(
        figure,
        title=f"{escape(result.vectors.behavior)}: how far a vector carries, unsteered {result.unsteered:.3f}",
        x="distance: target layer - source layer",
        y=_unit(result),
        height=460,
    )
    return figure.update_layout(legend=LEGEND_BELOW)


def effect_by_cosine(result: "LayerTransfer") -> go.Figure:
    """Effect of a vector at another layer against its cosine with that layer's own vector."""
    figure = _scatter(result.summary(), "layer %{customdata[0]}'s vector at layer %{customdata[1]}")
    return styled(
        figure,
        title=f"{escape(result.vectors.behavior)}: does cosine predict transfer? r = {result.cosine_correlation():.2f}",
        x="cosine of the two layers' vectors",
        y=_unit(result),
    )


def grid_heatmap(result: "TransferGrid") -> go.Figure:
    """Effect by vector and test set, read as a table from the top; own test sets are framed."""
    unit = "change of margin (nats per token)"
    figure, table = _effects(result.summary(), result.matrix(), unit, "vector of %{y} on test set of %{x}")
    levels = ", ".join(f"{escape(name)} {level:.2f}" for name, level in result.unsteered.items())
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(automargin=True)
    return styled(
        figure,
        title=f"change of log-probability margin, vectors at layer {result.layer}<br>"
        f"<span style='font-size:12px'>unsteered: {levels}</span>",
        x="test set",
        y="vector",
        height=max(420, 200 + 50 * len(table)),
    )


def grid_by_cosine(result: "TransferGrid") -> go.Figure:
    """Effect of a vector on another's test set against the cosine of the two vectors."""
    cells = result.summary()
    figure = _scatter(cells[cells["cosine"].notna()], "vector of %{customdata[0]} on test set of %{customdata[1]}")
    return styled(
        figure,
        title=f"does cosine predict transfer? layer {result.layer}",
        x="cosine of the two vectors",
        y="change of margin (nats per token)",
    )


def model_effects(result: "ModelTransfer") -> go.Figure:
    """Score by layer: own vectors dotted, foreign ones solid, one colour a multiplier, the unsteered level dashed."""
    cells = result.summary("score")
    figure = go.Figure()
    foreign, own = (escape(result.cosines.provenance[name].model) for name in ("other", "vectors"))
    names = {"own": "own vectors", "foreign": f"vectors of {foreign}" if foreign != own else "foreign vectors"}
    multipliers = sorted(set(cells["multiplier"]))
    for origin, m in itertools.product(("own", "foreign"), multipliers):
        rows = cells[(cells["vectors"] == origin) & (cells["multiplier"] == m)]
        colour = (ORANGE, BLUE)[m > 0] if len(multipliers) <= 2 else (BLUE, ORANGE, GREEN)[multipliers.index(m) % 3]
        hover = f"{names[origin]}, multiplier {m:g}, layer %{{x}}<br>%{{y:.4f}} {ENDS}<extra></extra>"
        name = f"{names[origin]}, multiplier {m:g}"
        dash = "dot" if origin == "own" else "solid"
        figure.add_traces(banded_curve(rows, "layer", colour=colour, name=name, hover=hover, dash=dash))
    figure.add_hline(y=result.unsteered, line={"color": GREY, "dash": "dash", "width": 1})
    behavior = escape(str(result.frame["behavior"].iloc[0]))
    styled(
        figure,
        title=f"{behavior}: vectors of {foreign} in {own}, unsteered {result.unsteered:.3f}",
        x=LAYER,
        y=METRIC_LABEL[result.metric],
        height=500,
    )
    return figure.update_layout(legend=LEGEND_BELOW)


def map_quality(result: "ResidualMap") -> go.Figure:
    """Held-out R^2 by layer, plain and weighted by variance."""
    figure = go.Figure()
    for column, colour, name in (("r2", BLUE, "mean over dimensions"), ("r2_weighted", GREEN, "weighted by variance")):
        figure.add_scatter(
            x=result.frame["layer"],
            y=result.frame[column],
            customdata=result.frame[["source_layer"]],
            mode="lines+markers",
            line={"color": colour},
            name=name,
            hovertemplate="layer %{x} from layer %{customdata[0]}<br>R² %{y:.3f}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": GRID, "width": 1})
    source, target = escape(result.source.model), escape(result.target.model)
    title = f"map from {source} to {target}: R² on {result.frame['n_held_out'].iloc[0]} held-out pairs"
    styled(figure, title=title, x=f"target {LAYER}", y="held-out R²")
    return figure.update_layout(legend=LEGEND_BELOW)


def _effects(cells: "pd.DataFrame", matrix: "pd.DataFrame", bar: str, what: str) -> "tuple[go.Figure, pd.DataFrame]":
    low, high = (
        cells.pivot(index="source", columns="target", values=end).loc[matrix.index, matrix.columns]
        for end in ("low", "high")
    )
    figure = framed_heatmap(
        matrix,
        limit=None,
        bar=bar,
        hover=f"{what}<br>%{{z:.4f}} %{{customdata}}<extra></extra>",
        low=low,
        high=high,
        written=".2f" if len(matrix.columns) <= MOST_WRITTEN else None,
    )
    return figure, matrix


def _scatter(cells: "pd.DataFrame", what: str) -> go.Figure:
    off = cells[cells["source"] != cells["target"]]
    return go.Figure(
        go.Scatter(
            x=off["cosine"],
            y=off["mean"],
            mode="markers",
            marker={"color": BLUE, "size": 6, "opacity": 0.6},
            customdata=off[["source", "target", "low", "high"]],
            hovertemplate=f"{what}<br>cosine %{{x:.3f}}<br>"
            "effect %{y:.4f} [%{customdata[2]:.4f}, %{customdata[3]:.4f}]<extra></extra>",
        )
    )


def _unit(result: "LayerTransfer") -> str:
    return f"effect per unit of {result.settings.get('per', 'multiplier')}"
