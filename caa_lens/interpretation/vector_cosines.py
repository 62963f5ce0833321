"""How steering vectors lie to each other: cosines across layers, behaviors and models.

Raw cosines of the vectors as they are, v . w / (||v|| ||w||), neither centred nor rescaled, in float64. Rows and
columns carry layer ids or behaviors, never list positions. Source: the paper's figures 7 and 9.

A cosine compares coordinates, so vectors of two models can be compared only where the models share a basis: a base
model and its finetuned versions do, two models of one width trained apart do not, and nothing here can tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import check_count, describe
from caa_lens.plots.geometry import behavior_heatmap, cosine_curve, cosine_heatmap
from caa_lens.provenance import Provenance, label, what_differs
from caa_lens.results import Result
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cosines(Result):
    """Cosines of vectors: of layers with layers, of the same layer of two sets, or of behaviors at one layer.

    Attributes:
        frame: columns `layer, other_layer, cosine` of layers with layers (`layer` is of the first set, `other_layer` of
            the other one); `layer, cosine` of the same layer of two sets; `behavior, other_behavior, layer, cosine` of
            behaviors.
        d_model: the vectors' width.
        provenance: `vectors`, and `other` where there are two sets; of behaviors, by their names.
    """

    d_model: int

    @property
    def by_chance(self) -> float:
        """19 in 20 pairs of random directions have a smaller absolute cosine: 1.96 / sqrt(d_model)."""
        return 1.96 / self.d_model**0.5

    def summary(self) -> pd.DataFrame:
        """The matrix, one row a layer or behavior in the order given; of the same layer of both, one column."""
        if "other_layer" in self.frame:
            return self.frame.pivot(index="layer", columns="other_layer", values="cosine")
        if "behavior" in self.frame:
            names = list(dict.fromkeys(self.frame["behavior"]))
            return self.frame.pivot(index="behavior", columns="other_behavior", values="cosine").loc[names, names]
        return self.frame.set_index("layer")

    def plot(self) -> go.Figure:
        """Heat map, in which what is compared with itself is framed; or a curve by layer, with the band of chance."""
        if "behavior" in self.frame:
            return behavior_heatmap(self.frame, models=[one.model for one in self.provenance.values()])
        own, other = self._sets()
        if "other_layer" in self.frame:
            sets = None if other is None else what_differs(own, other)
            return cosine_heatmap(self.frame, of=label(own, other), sets=sets)
        return cosine_curve(self.frame, of=label(own, other), by_chance=self.by_chance)

    def _sets(self) -> tuple[Provenance, Provenance | None]:
        return self.provenance["vectors"], self.provenance.get("other")

    def __repr__(self) -> str:
        if "behavior" in self.frame:
            return f"Cosines(layer {self.frame['layer'].iloc[0]})\n{self.summary().round(3).to_string()}"
        own, other = self._sets()
        sets = label(own) + (f" with {label(other)}" if other else "")
        if "other_layer" in self.frame:
            table, off = self.summary(), self.frame[self.frame["layer"] != self.frame["other_layer"]]["cosine"]
            spread = f", between different layers {off.min():.3f} to {off.max():.3f}" if len(off) else ""
            return f"Cosines({sets}, {table.shape[0]} x {table.shape[1]} layers{spread})"
        ordered = self.frame.sort_values("cosine")
        (low, high), (first, last) = ordered["cosine"].iloc[[0, -1]], ordered["layer"].iloc[[0, -1]]
        return (
            f"Cosines({sets}, the same layer of both, {len(ordered)} layers, "
            f"{low:.3f} at layer {first} to {high:.3f} at layer {last})"
        )


def cosines(
    vectors: SteeringVectors | Mapping[str, SteeringVectors],
    other: SteeringVectors | None = None,
    *,
    same_layer: bool = False,
    layer: int | None = None,
) -> Cosines:
    """Cosines of vectors with each other.

        cosines(vectors)                            every layer with every layer
        cosines(vectors, other)                     every layer with every layer of another set
        cosines(vectors, other, same_layer=True)    the same layer of both, at the layers that both have
        cosines({"a": va, "b": vb}, layer=14)       all behaviors with each other at one layer

    Args:
        vectors: a set, or sets by the behavior's name, which is what frame and figure call it.
        other: vectors of the same width, e.g. of a finetuned model, of another method or of other data.
        same_layer: leave different layers out.
        layer: the 0-based block at which sets by name are compared.

    Raises:
        TypeError: for anything but sets of vectors.
        ValueError: if the widths differ, a vector is zero, there is no layer in common, a set has no vector for the
            layer, or an argument does not go with the others.
    """
    if not isinstance(same_layer, bool):
        raise TypeError(f"same_layer must be True or False, got {describe(same_layer)}")
    if isinstance(vectors, Mapping):
        if other is not None or same_layer:
            raise ValueError("sets by name are compared with each other at one layer: leave out other and same_layer")
        if layer is None:
            raise ValueError("sets by name are compared at one layer: give it, as in layer=14")
        return _of_behaviors(vectors, check_count("layer", layer, least=0))
    if layer is not None:
        raise ValueError(
            f"got layer={layer!r} for {describe(vectors)}: it is for sets by the behavior's name, {{name: vectors}}; "
            "choose layers by vectors.at([...])"
        )
    if same_layer and other is None:
        raise ValueError("same_layer=True compares two sets: give the other one as well")
    _check_sets(vectors, *(() if other is None else (other,)))
    against = vectors if other is None else other
    _check_width(vectors, against)
    if same_layer:
        frame = _of_same_layers(vectors, against)
    else:
        frame = _tidy(
            _unit(vectors, vectors.layers) @ _unit(against, against.layers).T,
            ("layer", vectors.layers),
            ("other_layer", against.layers),
        )
    provenance = {"vectors": vectors.provenance} | ({} if other is None else {"other": other.provenance})
    return Cosines(frame=frame, d_model=vectors.d_model, provenance=provenance)


def _of_same_layers(vectors: SteeringVectors, other: SteeringVectors) -> pd.DataFrame:
    layers = tuple(layer for layer in vectors.layers if layer in other)
    if not layers:
        raise ValueError(
            f"no layer in common: the sets have layers {_listed(vectors.layers)} and {_listed(other.layers)}; "
            "extract both at the same ones, or compare all with all, without same_layer"
        )
    found = (_unit(vectors, layers) * _unit(other, layers)).sum(-1)
    return pd.DataFrame({"layer": layers, "cosine": found.clamp(-1, 1).numpy()})


def _of_behaviors(sets: Mapping[str, SteeringVectors], layer: int) -> Cosines:
    _check_sets(*sets.values())
    if not sets:
        raise ValueError("cosines needs at least one set of vectors")
    first = next(iter(sets.values()))
    for name, vectors in sets.items():
        if layer not in vectors:
            raise ValueError(f"{name!r} has no vector for layer {layer}, but for {_listed(vectors.layers)}: extract it")
        _check_width(first, vectors)
    units = torch.cat([_unit(vectors, (layer,)) for vectors in sets.values()])  # [behavior d_model]
    frame = _tidy(units @ units.T, ("behavior", tuple(sets)), ("other_behavior", tuple(sets)))
    frame.insert(2, "layer", layer)
    provenance = {name: vectors.provenance for name, vectors in sets.items()}
    return Cosines(frame=frame, d_model=first.d_model, provenance=provenance)


def _check_sets(*sets: object) -> None:
    for one in sets:
        if not isinstance(one, SteeringVectors):
            remedy = "give the whole set" if isinstance(one, SteeringVector) else "extract them, or load a file"
            raise TypeError(f"expected SteeringVectors, got {describe(one)}: {remedy}")


def _check_width(vectors: SteeringVectors, other: SteeringVectors) -> None:
    if vectors.d_model != other.d_model:
        raise ValueError(
            f"vectors of different width: {label(vectors.provenance)} has d_model={vectors.d_model}, "
            f"{label(other.provenance)} has d_model={other.d_model}: compare vectors of one model, or of models that "
            "share their residual stream's basis"
        )


def _unit(vectors: SteeringVectors, layers: Sequence[int]) -> Float[Tensor, "layer d_model"]:
    """The layers' vectors with norm 1, in float64 on the CPU."""
    rows = torch.stack([vectors[layer].direction.detach().cpu().double() for layer in layers])
    norms = rows.norm(dim=-1, keepdim=True)
    for layer, norm in zip(layers, norms.flatten().tolist(), strict=True):
        if norm == 0:
            raise ValueError(f"the vector of {label(vectors.provenance)} at layer {layer} is zero: it has no direction")
    return rows / norms


def _tidy(
    table: Float[Tensor, "row column"], rows: tuple[str, Sequence[object]], columns: tuple[str, Sequence[object]]
) -> pd.DataFrame:
    """One row a cell, with the names of its row and of its column."""
    names = [(row, column) for row in rows[1] for column in columns[1]]
    frame = pd.DataFrame(names, columns=[rows[0], columns[0]])
    frame["cosine"] = table.clamp(-1, 1).flatten().numpy()  # rounding can pass 1 by 1e-16
    return frame


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
