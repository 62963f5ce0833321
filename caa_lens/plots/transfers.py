"""Figures of transfer.

`cells` are a transfer's summary: one row a `source` and `target`, with `mean, low, high, cosine`. `table` is the same
means as a matrix of sources by targets.
"""

import itertools
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import (
    BLUE,
    GREEN,
    GREY,
    NARROW,
    ORANGE,
    banded_curve,
    escaped,
    framed_heatmap,
    interval_text,
    said,
    styled,
    width_of_written,
)

LAYER = "layer (0-based block)"
MOST_WRITTEN = 12  # columns of a heat map that still have room for numbers
ENDS = "%{customdata[0]}"
MARGIN_CHANGE = "change of margin (nats per token)"


def layer_heatmap(
    cells: pd.DataFrame,
    table: pd.DataFrame,
    *,
    behavior: str,
    label: str,
    unit: str,
    unsteered: float,
    model: str = "",
) -> go.Figure:
    """Effect by source and target layer; own layers are framed, white is no effect.

    Args:
        label: what is measured.
        unit: what an effect is per unit of.
        unsteered: the level without steering.
    """
    figure = _effects(cells, table, _per(unit), "layer %{y}'s vector at layer %{x}")
    return styled(
        figure,
        title=f"{behavior}: change of {label}",
        subtitle=said(model, f"per unit of {unit}; unsteered {unsteered:.3f}"),
        x=f"added at {LAYER}",
        y="vector of layer",
        height=max(380, min(760, 160 + 18 * len(table))),
        min_width=width_of_written(table) if len(table.columns) <= MOST_WRITTEN else NARROW,
    )


def decay_curves(
    cells: pd.DataFrame, decay: pd.DataFrame, *, behavior: str, unit: str, unsteered: float, model: str = ""
) -> go.Figure:
    """Effect against target - source: a thin line a source layer, and the mean of all with its interval.

    Args:
        decay: the mean of all, `distance, mean, low, high`.
    """
    figure = go.Figure()
    for source in sorted(set(cells["source"])):
        rows = cells[cells["source"] == source]
        figure.add_scatter(
            x=rows["target"] - source,
            y=rows["mean"],
            customdata=_with_interval(rows, "target"),
            mode="lines",
            line={"color": GREY, "width": 0.7},
            showlegend=False,
            hovertemplate=f"layer {source}'s vector at layer %{{customdata[1]}}<br>%{{y:.4f}} {ENDS}<extra></extra>",
        )
    hover = f"%{{x}} layers away<br>mean %{{y:.4f}} {ENDS}<extra></extra>"
    figure.add_traces(banded_curve(decay, "distance", colour=BLUE, name="mean of all source layers", hover=hover))
    figure.add_vline(x=0, line={"color": GREY, "dash": "dot", "width": 1})
    return styled(
        figure,
        title=f"{behavior}: how far a vector carries",
        subtitle=said(model, f"unsteered {unsteered:.3f}"),
        x="distance: target layer - source layer",
        y=_per(unit),
        height=460,
        legend=True,
    )


def layers_by_cosine(
    cells: pd.DataFrame, *, behavior: str, unit: str, correlation: float, model: str = ""
) -> go.Figure:
    """Effect of a vector at another layer against its cosine with that layer's own vector."""
    figure = _scatter(cells, "layer %{customdata[1]}'s vector at layer %{customdata[2]}")
    return styled(
        figure,
        title=f"{behavior}: does cosine predict transfer? r = {correlation:.2f}",
        subtitle=said(model),
        x="cosine of the two layers' vectors",
        y=_per(unit),
    )


def grid_heatmap(
    cells: pd.DataFrame, table: pd.DataFrame, *, layer: int, unsteered: Mapping[str, float], model: str = ""
) -> go.Figure:
    """Effect by vector and test set, read as a table from the top; own test sets are framed.

    Args:
        unsteered: the level without steering, by test set.
    """
    figure = _effects(cells, table, MARGIN_CHANGE, "vector of %{y} on test set of %{x}")
    levels = ", ".join(f"{name} {level:.2f}" for name, level in unsteered.items())
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(automargin=True)
    return styled(
        figure,
        title=f"change of log-probability margin, vectors at layer {layer}",
        subtitle=said(model, f"nats per token; unsteered: {levels}"),
        x="test set",
        y="vector",
        height=max(420, 200 + 50 * len(table)),
        min_width=width_of_written(table) if len(table.columns) <= MOST_WRITTEN else NARROW,
    )


def grid_by_cosine(cells: pd.DataFrame, *, layer: int, model: str = "") -> go.Figure:
    """Effect of a vector on another's test set against the cosine of the two vectors."""
    figure = _scatter(cells[cells["cosine"].notna()], "vector of %{customdata[1]} on test set of %{customdata[2]}")
    return styled(
        figure,
        title=f"does cosine predict transfer? layer {layer}",
        subtitle=said(model),
        x="cosine of the two vectors",
        y=MARGIN_CHANGE,
    )


def model_effects(
    scores: pd.DataFrame, *, behavior: str, own: str, foreign: str, label: str, unsteered: float
) -> go.Figure:
    """Score by layer: own vectors dotted, foreign ones solid, one colour a multiplier, the unsteered level dashed.

    Args:
        scores: one row a `vectors` ("own" or "foreign"), `layer` and `multiplier`, with `mean, low, high`.
        own, foreign: the models' names.
        label: what is measured.
    """
    figure = go.Figure()
    names = {"own": "own vectors", "foreign": f"vectors of {escaped(foreign)}" if foreign != own else "foreign vectors"}
    multipliers = sorted(set(scores["multiplier"]))
    for origin, m in itertools.product(("own", "foreign"), multipliers):
        rows = scores[(scores["vectors"] == origin) & (scores["multiplier"] == m)]
        colour = (ORANGE, BLUE)[m > 0] if len(multipliers) <= 2 else (BLUE, ORANGE, GREEN)[multipliers.index(m) % 3]
        hover = f"{names[origin]}, multiplier {m:g}, layer %{{x}}<br>%{{y:.4f}} {ENDS}<extra></extra>"
        name = f"{names[origin]}, multiplier {m:g}"
        dash = "dot" if origin == "own" else "solid"
        figure.add_traces(banded_curve(rows, "layer", colour=colour, name=name, hover=hover, dash=dash))
    figure.add_hline(y=unsteered, line={"color": GREY, "dash": "dash", "width": 1})
    title, level = f"{behavior}: vectors of {foreign} in {own}", f"unsteered {unsteered:.3f}"
    return styled(figure, title=title, subtitle=level, x=LAYER, y=label, height=500, legend=True)


def map_quality(frame: pd.DataFrame, *, source: str, target: str) -> go.Figure:
    """Held-out R^2 by layer, plain and weighted by variance.

    Args:
        frame: columns `layer, source_layer, r2, r2_weighted, n_held_out`.
        source, target: the models' names.
    """
    figure = go.Figure()
    for column, colour, dash, name in (
        ("r2", BLUE, "solid", "mean over dimensions"),
        ("r2_weighted", GREEN, "dash", "weighted by variance"),
    ):
        figure.add_scatter(
            x=frame["layer"],
            y=frame[column],
            customdata=frame[["source_layer"]],
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            name=name,
            hovertemplate="layer %{x} from layer %{customdata[0]}<br>R² %{y:.3f}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    title, of = f"map from {source} to {target}", f"R² on {frame['n_held_out'].iloc[0]} held-out pairs"
    return styled(figure, title=title, subtitle=of, x=f"target {LAYER}", y="held-out R²", legend=True)


def _effects(cells: pd.DataFrame, table: pd.DataFrame, bar: str, what: str) -> go.Figure:
    low, high = (
        cells.pivot(index="source", columns="target", values=end).loc[table.index, table.columns]
        for end in ("low", "high")
    )
    return framed_heatmap(
        table,
        limit=None,
        bar=bar,
        hover=f"{what}<br>%{{z:.4f}} %{{customdata}}<extra></extra>",
        low=low,
        high=high,
        written=".2f" if len(table.columns) <= MOST_WRITTEN else None,
    )


def _scatter(cells: pd.DataFrame, what: str) -> go.Figure:
    off = cells[cells["source"] != cells["target"]]
    return go.Figure(
        go.Scatter(
            x=off["cosine"],
            y=off["mean"],
            mode="markers",
            marker={"color": BLUE, "size": 6},
            customdata=_with_interval(off, "source", "target"),
            hovertemplate=f"{what}<br>cosine %{{x:.3f}}<br>effect %{{y:.4f}} {ENDS}<extra></extra>",
        )
    )


def _with_interval(rows: pd.DataFrame, *columns: str) -> list[list]:
    """For the hover text: the interval, then other columns."""
    ends = [interval_text(low, high) for low, high in zip(rows["low"], rows["high"], strict=True)]
    others = rows[list(columns)].astype(object).to_numpy().tolist()
    return [
        [end, *(escaped(one) if isinstance(one, str) else one for one in row)]
        for end, row in zip(ends, others, strict=True)
    ]


def _per(unit: str) -> str:
    return f"effect per unit of {unit}"
