"""How steering vectors lie to each other: cosines across layers, behaviors and models; and how clouds of points part.

Raw cosines of the vectors as they are, v . w / (||v|| ||w||), neither centred nor rescaled, in float64. Rows and
columns carry layer ids or behaviors, never list positions. Source: the paper's figures 7 and 9.

A cosine compares coordinates, so vectors of two models can be compared only where the models share a basis: a base
model and its finetuned versions do, two models of one width trained apart do not, and nothing here can tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import check_count, describe
from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CosineMap:
    """Cosine of every layer's vector with every layer's vector.

    Attributes:
        frame: columns `layer, other_layer, cosine`; `layer` is of `vectors`, `other_layer` of `other`.
        vectors: provenance of the vectors.
        other: provenance of the other vectors, None where the map is of one set with itself.
    """

    frame: "pd.DataFrame"
    vectors: Provenance
    other: Provenance | None = None

    def table(self) -> "pd.DataFrame":
        """The matrix: one row a `layer`, one column an `other_layer`."""
        return self.frame.pivot(index="layer", columns="other_layer", values="cosine")

    def plot(self) -> "go.Figure":
        """Heat map; the cells of a layer with the same layer are framed."""
        from caa_lens.plots.geometry import cosine_heatmap  # plotly takes a second to import

        return cosine_heatmap(self)

    def __repr__(self) -> str:
        table, off = self.table(), self.frame[self.frame["layer"] != self.frame["other_layer"]]["cosine"]
        spread = f", between different layers {off.min():.3f} to {off.max():.3f}" if len(off) else ""
        against = f" with {_label(self.other)}" if self.other else ""
        return f"CosineMap({_label(self.vectors)}{against}, {table.shape[0]} x {table.shape[1]} layers{spread})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        return self.plot()._repr_mimebundle_(include, exclude)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BehaviorCosines:
    """Cosine of every behavior's vector with every other's, at one layer.

    Attributes:
        frame: columns `behavior, other_behavior, layer, cosine`.
        layer: the 0-based block.
        vectors: provenance by behavior.
    """

    frame: "pd.DataFrame"
    layer: int
    vectors: Mapping[str, Provenance]

    def table(self) -> "pd.DataFrame":
        """The matrix, behaviors in the order they were given."""
        names = list(self.vectors)
        return self.frame.pivot(index="behavior", columns="other_behavior", values="cosine").loc[names, names]

    def plot(self) -> "go.Figure":
        """Heat map with the cosines written in; the unit diagonal is framed."""
        from caa_lens.plots.geometry import behavior_heatmap

        return behavior_heatmap(self)

    def __repr__(self) -> str:
        return f"BehaviorCosines(layer={self.layer})\n{self.table().round(3).to_string()}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        return self.plot()._repr_mimebundle_(include, exclude)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelCosines:
    """Cosine of two sets' vectors, the same layer of both, by layer.

    Attributes:
        frame: columns `layer, cosine`.
        d_model: the vectors' width.
        vectors: provenance of both sets.
    """

    frame: "pd.DataFrame"
    d_model: int
    vectors: tuple[Provenance, Provenance]

    @property
    def by_chance(self) -> float:
        """19 in 20 pairs of random directions have a smaller absolute cosine: 1.96 / sqrt(d_model)."""
        return 1.96 / self.d_model**0.5

    def plot(self) -> "go.Figure":
        """Curve by layer, with the band in which random directions lie."""
        from caa_lens.plots.geometry import model_curve

        return model_curve(self)

    def __repr__(self) -> str:
        ordered = self.frame.sort_values("cosine")
        (low, high), (first, last) = ordered["cosine"].iloc[[0, -1]], ordered["layer"].iloc[[0, -1]]
        return (
            f"ModelCosines({_label(self.vectors[0])} with {_label(self.vectors[1])}, {len(ordered)} layers, "
            f"{low:.3f} at layer {first} to {high:.3f} at layer {last})"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        return self.plot()._repr_mimebundle_(include, exclude)


def cosine_map(vectors: SteeringVectors, other: SteeringVectors | None = None) -> CosineMap:
    """Cosines of all layers with all layers: of one set with itself, or of two sets.

    Args:
        other: vectors of the same width, of any layers; `vectors` themselves by default.

    Raises:
        ValueError: if the widths differ, or a vector is zero.
    """
    _check_sets(vectors, *(() if other is None else (other,)))
    against = vectors if other is None else other
    _check_width(vectors, against)
    cosines = _unit(vectors, vectors.layers) @ _unit(against, against.layers).T
    frame = _tidy(cosines, "layer", vectors.layers, "other_layer", against.layers)
    return CosineMap(frame=frame, vectors=vectors.provenance, other=None if other is None else other.provenance)


def behavior_cosines(sets: Mapping[str, SteeringVectors], layer: int) -> BehaviorCosines:
    """Cosines of all behaviors' vectors with each other at one layer.

    Args:
        sets: vectors by the behavior's name, which is what frame and figure call it.

    Raises:
        ValueError: if there are no sets, one has no vector for the layer, the widths differ, or a vector is zero.
    """
    if not isinstance(sets, Mapping):
        raise TypeError(
            f"expected sets of vectors by the behavior's name, got {describe(sets)}: write {{name: vectors}}"
        )
    _check_sets(*sets.values())
    layer = check_count("layer", layer, least=0)
    if not sets:
        raise ValueError("behavior_cosines needs at least one set of vectors")
    for name, vectors in sets.items():
        if layer not in vectors:
            raise ValueError(f"{name!r} has no vector for layer {layer}, but for {_listed(vectors.layers)}: extract it")
        _check_width(next(iter(sets.values())), vectors)
    units = torch.cat([_unit(vectors, (layer,)) for vectors in sets.values()])  # [behavior d_model]
    frame = _tidy(units @ units.T, "behavior", tuple(sets), "other_behavior", tuple(sets))
    frame.insert(2, "layer", layer)
    provenances = {name: vectors.provenance for name, vectors in sets.items()}
    return BehaviorCosines(frame=frame, layer=layer, vectors=provenances)


def model_cosines(vectors_a: SteeringVectors, vectors_b: SteeringVectors) -> ModelCosines:
    """Cosine of the same layer's vectors of two models (or methods, or data sets), at the layers that both sets have.

    Raises:
        ValueError: if the widths differ, the sets have no layer in common, or a vector is zero.
    """
    import pandas as pd

    _check_sets(vectors_a, vectors_b)
    _check_width(vectors_a, vectors_b)
    layers = tuple(layer for layer in vectors_a.layers if layer in vectors_b)
    if not layers:
        raise ValueError(
            f"no layer in common: the sets have layers {_listed(vectors_a.layers)} and {_listed(vectors_b.layers)}; "
            "extract both at the same ones, or compare all with all by cosine_map"
        )
    cosines = (_unit(vectors_a, layers) * _unit(vectors_b, layers)).sum(-1)
    return ModelCosines(
        frame=pd.DataFrame({"layer": layers, "cosine": cosines.clamp(-1, 1).numpy()}),
        d_model=vectors_a.d_model,
        vectors=(vectors_a.provenance, vectors_b.provenance),
    )


def _check_sets(*sets: object) -> None:
    for one in sets:
        if not isinstance(one, SteeringVectors):
            remedy = "give the whole set" if isinstance(one, SteeringVector) else "extract them, or load a file"
            raise TypeError(f"expected SteeringVectors, got {describe(one)}: {remedy}")


def _check_width(vectors: SteeringVectors, other: SteeringVectors) -> None:
    if vectors.d_model != other.d_model:
        raise ValueError(
            f"vectors of different width: {_label(vectors.provenance)} has d_model={vectors.d_model}, "
            f"{_label(other.provenance)} has d_model={other.d_model}: compare vectors of one model, or of models that "
            "share their residual stream's basis"
        )


def _unit(vectors: SteeringVectors, layers: Sequence[int]) -> Float[Tensor, "layer d_model"]:
    """The layers' vectors with norm 1, in float64 on the CPU."""
    rows = torch.stack([vectors[layer].direction.detach().cpu().double() for layer in layers])
    norms = rows.norm(dim=-1, keepdim=True)
    for layer, norm in zip(layers, norms.flatten().tolist(), strict=True):
        if norm == 0:
            raise ValueError(
                f"the vector of {_label(vectors.provenance)} at layer {layer} is zero: it has no direction"
            )
    return rows / norms


def _tidy(
    cosines: Float[Tensor, "row column"], row: str, rows: Sequence[object], column: str, columns: Sequence[object]
) -> "pd.DataFrame":
    import pandas as pd

    names = [(r, c) for r in rows for c in columns]
    frame = pd.DataFrame(names, columns=[row, column])
    frame["cosine"] = cosines.clamp(-1, 1).flatten().numpy()  # rounding can pass 1 by 1e-16
    return frame


def _label(provenance: Provenance) -> str:
    return f"{provenance.expression or provenance.behavior} of {provenance.model}"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
