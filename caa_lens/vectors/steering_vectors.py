"""Steering vectors: directions in the residual stream, with arithmetic and with their history.

Pure tensors: nothing here knows a model. A vector remembers where it belongs (model, hook point, layer) and how it
was made. `caa_lens.vectors.algebra.arithmetic` has the arithmetic and its rules.

Layers are 0-based blocks and the hook point is a block's output: layer 13 is `blocks.13.hook_resid_post`, which is
Hugging Face's `hidden_states[14]`.
"""

import numbers
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import check_list, describe
from caa_lens.engine.edits import Edit
from caa_lens.engine.positions import Positions
from caa_lens.provenance import Provenance, hook_name_of, layer_ranges
from caa_lens.vectors import shown
from caa_lens.vectors.algebra import expressions as write
from caa_lens.vectors.algebra import rules, subspaces
from caa_lens.vectors.algebra.arithmetic import VectorAlgebra
from caa_lens.vectors.storage import Parts, load_parts, save_parts

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringVector(VectorAlgebra):
    """One direction at one layer's `resid_post`.

    Attributes:
        direction: the vector, in units of the residual stream, `[d_model]`; clone it before changing it in place.
        layer: the 0-based block whose output it was read from and is added to.
        provenance: what it was computed from.

    Raises:
        ValueError: for a tensor that is empty, not one-dimensional, not floating-point or not finite; a negative layer.
    """

    direction: Float[Tensor, " d_model"]
    layer: int
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        rules.check_rows(self.direction, 1, "a steering vector")
        if isinstance(self.layer, bool) or not isinstance(self.layer, numbers.Integral):
            raise TypeError(f"layer must be a whole number, the 0-based block, got {self.layer!r}")
        if self.layer < 0:
            raise ValueError(
                f"layer must be a 0-based block number, got {self.layer}: count layers from the first block"
            )

    @classmethod
    def from_direction(
        cls,
        direction: Float[Tensor, " d_model"] | Float[np.ndarray, " d_model"],
        layer: int,
        *,
        behavior: str = "by hand",
        model: str = "unknown",
    ) -> "SteeringVector":
        """A vector built by hand, e.g. from a probe's weights or an unembedding direction.

        The tensor or array is copied, unless it requires grad: then it is kept itself, so that gradients reach it and
        what an optimiser does to it changes the vector; a probe that goes on being trained is given as
        `weight.detach()`.

        Raises:
            TypeError: for anything but a tensor or an array of numpy.
        """
        if isinstance(direction, np.ndarray):
            direction = torch.tensor(direction)
        if not isinstance(direction, torch.Tensor):
            raise TypeError(
                f"got a {type(direction).__name__}, expected a tensor or an array [d_model]: "
                "torch.as_tensor(...) makes one"
            )
        return cls(
            direction=direction if direction.requires_grad else direction.clone(),
            layer=layer,
            provenance=Provenance(model=model, behavior=behavior, expression=f"{behavior}[{layer}]"),
        )

    @property
    def hook_name(self) -> str:
        """Full TransformerLens hook name, `blocks.{layer}.hook_resid_post`."""
        return hook_name_of(self.layer)

    @property
    def d_model(self) -> int:
        return self.direction.shape[0]

    @property
    def norm(self) -> float:
        """Euclidean norm, in units of the residual stream."""
        return float(subspaces.length(self._wide.detach()))

    def at_layer(self, layer: int) -> "SteeringVector":
        """The same direction declared to belong to another layer, on purpose; the expression records the move."""
        expression = write.method(self._text, "at_layer", str(layer))
        provenance = replace(self.provenance, expression=expression)
        return SteeringVector(direction=self.direction.clone(), layer=layer, provenance=provenance)

    def save(self, path: str | Path) -> Path:
        """Write a file that holds a set of this one vector; see `SteeringVectors.save`."""
        return SteeringVectors.from_vectors([self]).save(path)

    # ---- in a model -------------------------------------------------------------------------------------------

    def hook(
        self,
        *,
        multiplier: float | int | Tensor = 1.0,
        start: "int | Tensor | None" = None,
        operator: str = "add",
        positions: Positions | None = None,
    ) -> tuple:
        """A `(name, function)` pair for TransformerLens' own `fwd_hooks=[...]`; see `caa_lens.Intervention`.

        Raises:
            ValueError: unless just one of `start` and `positions` is given; `start=0` is every position.
        """
        edit = Edit.of(
            self.direction, self.layer, multiplier=multiplier, operator=operator, start=start, positions=positions
        )
        return edit.hook()

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> Float[Tensor, " d_model"]:
        return self.direction

    @property
    def _layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def _text(self) -> str:
        return self.provenance.expression or write.indexed(self.provenance.behavior, self.layer)

    def _with(self, rows: Float[Tensor, " d_model"], provenance: Provenance) -> "SteeringVector":
        return replace(self, direction=rows, provenance=provenance)

    def __repr__(self) -> str:
        return (
            f"SteeringVector({self._text}, layer={self.layer}, d_model={self.d_model}, norm={self.norm:.3g}, "
            f"model={self.provenance.model!r}, {str(self.direction.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringVectors(VectorAlgebra):
    """One behavior's vectors at several layers. Indexing is by block id, never by list position.

    Attributes:
        directions: one row a layer, `[layer d_model]`.
        layers: the 0-based blocks the rows belong to, ascending.
        provenance: what they were computed from.
    """

    directions: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        rules.check_layers_of_rows(self.directions, self.layers)

    @classmethod
    def from_vectors(cls, vectors: Iterable[SteeringVector]) -> "SteeringVectors":
        """Collect vectors of different layers of one model into a set."""
        if isinstance(vectors, SteeringVector):
            raise TypeError("expected a list of SteeringVector, got one: put it into a list")
        ordered = sorted(vectors, key=lambda vector: vector.layer)
        if not ordered:
            raise ValueError("cannot make a set of no vectors")
        rules.check_compatible(*(vector.at_layer(0) for vector in ordered))
        first, device = ordered[0], ordered[0].direction.device
        # What one behavior's vectors at several layers have in common; else every vector's own expression.
        common = {re.sub(rf"(?<=[\w)\]}}])\[{vector.layer}\]", "", vector._text) for vector in ordered}
        together = "{" + ", ".join(vector._text for vector in ordered) + "}"
        return cls(
            directions=torch.stack([one.to(first.direction.dtype).direction.to(device) for one in ordered]),
            layers=tuple(vector.layer for vector in ordered),
            provenance=replace(
                first.provenance.merged(*(vector.provenance for vector in ordered[1:])),
                expression=common.pop() if len(common) == 1 else together,
            ),
        )

    def __getitem__(self, layer: int) -> SteeringVector:
        whole = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
        if not whole or layer not in self.layers:
            remedy = ""
            if isinstance(layer, slice | list | tuple):
                remedy = "; several are chosen with .at([...])"
            elif isinstance(layer, float) and layer in self.layers:
                remedy = f"; int({layer!r}) makes a layer of it"
            has = f"this set has layers {layer_ranges(self.layers)} (0-based blocks)"
            raise IndexError(f"no vector for layer {layer!r}: {has}{remedy}")
        layer = operator.index(layer)
        row = self.layers.index(layer)
        provenance = replace(self.provenance, expression=write.indexed(self._text, layer))
        return SteeringVector(direction=self.directions[row], layer=layer, provenance=provenance)

    def __iter__(self) -> Iterator[SteeringVector]:
        return (self[layer] for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def at(self, layers: Iterable[int]) -> "SteeringVectors":
        """The subset for some layers."""
        if not isinstance(layers, Iterable):
            shown = repr(layers) if len(repr(layers)) < 60 else describe(layers)
            raise TypeError(
                f"expected a list of layers, got {shown}: write .at([{shown}]), or [{shown}] for the vector"
            )
        chosen = tuple(sorted(set(check_list("layers", layers, int))))
        if not chosen:
            raise ValueError("no layers given: expected at least one")
        return replace(self, directions=torch.stack([self[layer].direction for layer in chosen]), layers=chosen)

    @property
    def d_model(self) -> int:
        return self.directions.shape[1]

    @property
    def norms(self) -> "pd.Series":
        """Euclidean norm of each layer's vector, a pandas series by layer; gradients go through `directions`."""
        return self._by_layer(subspaces.length(self._wide), "norm")

    @property
    def behavior(self) -> str:
        return self.provenance.behavior

    def by_layer(self) -> "pd.DataFrame":
        """Columns `layer`, `norm` (units of the residual stream) and `cosine_before`, with the layer before it."""
        return shown.by_layer(self._wide, self.layers)

    def plot(self) -> "go.Figure":
        """Each layer's norm, and its cosine with the layer before."""
        return shown.drawn(self.by_layer(), self.provenance)

    def _repr_html_(self) -> str:
        """In Jupyter a set shows its layers."""
        return shown.written(self.by_layer(), self.provenance, self.d_model)

    def save(self, path: str | Path) -> Path:
        """Write one self-describing safetensors file, atomically; see `caa_lens.vectors.storage`."""
        return save_parts(Parts(self.directions, self.layers, self.provenance), path)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVectors":
        """Read a file that `save` wrote; see `caa_lens.vectors.storage` for the errors."""
        directions, layers, provenance = load_parts(path)
        return cls(directions=directions, layers=layers, provenance=provenance)

    @property
    def _rows(self) -> Float[Tensor, "layer d_model"]:
        return self.directions

    @property
    def _layers(self) -> tuple[int, ...]:
        return self.layers

    @property
    def _text(self) -> str:
        return self.provenance.expression or self.provenance.behavior

    def _with(self, rows: Float[Tensor, "layer d_model"], provenance: Provenance) -> "SteeringVectors":
        return replace(self, directions=rows, provenance=provenance)

    def __repr__(self) -> str:
        p = self.provenance
        return (
            f"SteeringVectors({self._text}, layers={layer_ranges(self.layers)}, d_model={self.d_model}, "
            f"model={p.model!r}, method={p.method!r}, pairs={p.n_pairs or 'unknown'})"
        )
