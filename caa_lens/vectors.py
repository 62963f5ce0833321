"""Steering vectors: directions in the residual stream, with arithmetic and with their history.

Pure tensors: nothing here knows a model. A vector remembers where it belongs (model, hook point, layer) and how it
was made; arithmetic refuses to mix vectors that do not belong together, and a derived vector can print the
expression that made it::

    refined = (v - v_style.onto(v)).normalized(to=v.norm)
    refined.provenance.expression    # '...'

Layers are 0-based blocks and the hook point is a block's output: layer 13 is `blocks.13.hook_resid_post`, which is
Hugging Face's `hidden_states[14]`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

HOOK_POINT = "hook_resid_post"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a vector was computed from, and by which expression.

    `details` holds whatever else identifies the computation (dataset hash, number of pairs, library versions, ...),
    as strings, so that it can be stored beside the tensor.
    """

    model: str = "unknown"
    behavior: str = "unnamed"
    method: str = "given"
    prompt_format: str = ""
    token_position: str = ""
    n_pairs: int = 0
    dataset_hash: str = ""
    normalisation: str = "none"
    expression: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


def hook_name_of(layer: int) -> str:
    """Full TransformerLens name of the hook point of a layer's vector."""
    return f"blocks.{layer}.{HOOK_POINT}"


def _check_direction(direction: Tensor, dims: int, what: str) -> None:
    if direction.ndim != dims:
        raise ValueError(f"{what} needs a {dims}-dimensional tensor, got shape {tuple(direction.shape)}")
    if not direction.is_floating_point():
        raise ValueError(f"{what} needs floating-point numbers, got {direction.dtype}: call .float() on it first")
    if not bool(torch.isfinite(direction).all()):
        bad = int((~torch.isfinite(direction)).sum())
        raise ValueError(
            f"{what} has {bad} NaN or infinite components of {direction.numel()}: extract it again in float32"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringVector:
    """One direction at one layer's `resid_post`.

    Attributes:
        direction: the vector, in units of the residual stream, `[d_model]`.
        layer: the 0-based block whose output it was read from and is added to.
        provenance: what it was computed from.

    Raises:
        ValueError: for a tensor that is not one-dimensional, not floating-point or not finite, or a negative layer.
    """

    direction: Float[Tensor, " d_model"]
    layer: int
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        _check_direction(self.direction, 1, "a steering vector")
        if self.layer < 0:
            raise ValueError(
                f"layer must be a 0-based block number, got {self.layer}: count layers from the first block"
            )

    @classmethod
    def from_direction(
        cls,
        direction: Float[Tensor, " d_model"],
        layer: int,
        *,
        behavior: str = "by hand",
        model: str = "unknown",
    ) -> "SteeringVector":
        """A vector built by hand, e.g. from a probe's weights or an unembedding direction."""
        return cls(
            direction=direction.detach().clone(),
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
        """Euclidean norm, in units of the residual stream, computed in float32."""
        return float(self.direction.float().norm())

    # ---- arithmetic -------------------------------------------------------------------------------------------

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        self._check_compatible(other)
        return self._derived(self.direction + other.direction.to(self.direction), f"{self._text} + {other._text}")

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        self._check_compatible(other)
        return self._derived(self.direction - other.direction.to(self.direction), f"{self._text} - {other._factor}")

    def __neg__(self) -> "SteeringVector":
        return self._derived(-self.direction, f"-{self._factor}")

    def __mul__(self, scale: float | int) -> "SteeringVector":
        if not isinstance(scale, int | float):
            return NotImplemented
        return self._derived(self.direction * scale, f"{scale:g} * {self._factor}")

    __rmul__ = __mul__

    def __truediv__(self, scale: float | int) -> "SteeringVector":
        if scale == 0:
            raise ValueError("a steering vector cannot be divided by 0")
        return self._derived(self.direction / scale, f"{self._factor} / {scale:g}")

    def __matmul__(self, other: "SteeringVector") -> float:
        """Dot product, in float32."""
        self._check_compatible(other)
        return float(self.direction.float() @ other.direction.to(self.direction.device).float())

    def cosine(self, other: "SteeringVector") -> float:
        """Cosine similarity with another vector of the same width (layers and models may differ)."""
        if self.d_model != other.d_model:
            raise ValueError(
                f"cosine of vectors of different width: d_model={self.d_model} and d_model={other.d_model}"
            )
        other_direction = other.direction.to(self.direction.device).float()
        return float(torch.cosine_similarity(self.direction.float(), other_direction, dim=0))

    def normalized(self, to: float | int = 1.0) -> "SteeringVector":
        """The same direction with Euclidean norm `to`."""
        if self.norm == 0:
            raise ValueError("the zero vector has no direction to normalise")
        return self._derived(self.direction * (to / self.norm), f"{self._factor}.normalized(to={to:g})")

    def onto(self, other: "SteeringVector") -> "SteeringVector":
        """The projection of this vector onto another one: (v . w / w . w) w."""
        self._check_compatible(other)
        w = other.direction.to(self.direction.device).float()
        if not bool(w.any()):
            raise ValueError("cannot project onto the zero vector")
        projected = (self.direction.float() @ w) / (w @ w) * w
        return self._derived(projected.to(self.direction), f"{self._factor}.onto({other._text})")

    def without(self, other: "SteeringVector") -> "SteeringVector":
        """This vector with its component along another one removed."""
        return self._derived(self.direction - self.onto(other).direction, f"{self._factor}.without({other._text})")

    def at_layer(self, layer: int) -> "SteeringVector":
        """The same direction declared to belong to another layer, on purpose; the expression records the move."""
        moved = self._derived(self.direction, f"{self._factor}.at_layer({layer})")
        return replace(moved, layer=layer)

    def to(self, target: torch.device | str | torch.dtype) -> "SteeringVector":
        """The same vector on another device or in another dtype."""
        return replace(self, direction=self.direction.to(target))

    # ---- in a model -------------------------------------------------------------------------------------------

    def hook(
        self,
        *,
        multiplier: float | int | Tensor = 1.0,
        start: "int | Tensor | None" = None,
        operator: str = "add",
    ) -> tuple:
        """A `(name, function)` pair for TransformerLens' own `fwd_hooks=[...]`; see `caa_lens.hooks`."""
        from caa_lens.hooks import (
            Intervention,
        )  # hooks stands above vectors; imported here so this reads well

        return Intervention(vector=self, multiplier=multiplier, start=start, operator=operator).hook()

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    @property
    def _text(self) -> str:
        return self.provenance.expression or f"{self.provenance.behavior}[{self.layer}]"

    @property
    def _factor(self) -> str:
        text = self._text
        return f"({text})" if any(sign in text for sign in (" + ", " - ", " * ", " / ", "-")) else text

    def _derived(self, direction: Tensor, expression: str) -> "SteeringVector":
        return replace(self, direction=direction, provenance=replace(self.provenance, expression=expression))

    def _check_compatible(self, other: "SteeringVector") -> None:
        if not isinstance(other, SteeringVector):
            raise TypeError(f"expected a SteeringVector, got {type(other).__name__}")
        if self.d_model != other.d_model:
            raise ValueError(
                f"cannot combine vectors of d_model={self.d_model} and d_model={other.d_model}: "
                "both must come from models of the same width"
            )
        if self.layer != other.layer:
            raise ValueError(
                f"cannot combine vectors of layer {self.layer} and layer {other.layer}: "
                f"move one on purpose with .at_layer({self.layer})"
            )
        models = {self.provenance.model, other.provenance.model} - {"unknown"}
        if len(models) > 1:
            raise ValueError(
                f"cannot combine vectors of different models, {' and '.join(sorted(models))}: their residual streams "
                "have different bases"
            )

    def __repr__(self) -> str:
        return (
            f"SteeringVector({self._text}, layer={self.layer}, d_model={self.d_model}, norm={self.norm:.3g}, "
            f"model={self.provenance.model!r}, {str(self.direction.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringVectors:
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
        _check_direction(self.directions, 2, "steering vectors")
        if len(self.layers) != self.directions.shape[0]:
            raise ValueError(f"{self.directions.shape[0]} directions for {len(self.layers)} layers")
        if list(self.layers) != sorted(set(self.layers)) or (self.layers and self.layers[0] < 0):
            raise ValueError(f"layers must be distinct 0-based block numbers in order, got {self.layers}")

    @classmethod
    def from_vectors(cls, vectors: Iterable[SteeringVector]) -> "SteeringVectors":
        """Collect vectors of different layers of one model into a set."""
        ordered = sorted(vectors, key=lambda vector: vector.layer)
        if not ordered:
            raise ValueError("cannot make a set of no vectors")
        for vector in ordered[1:]:
            ordered[0]._check_compatible(vector.at_layer(ordered[0].layer))
        first = ordered[0].direction
        # What one behavior's vectors at several layers have in common; else every vector's own expression.
        expressions = {vector._text.replace(f"[{vector.layer}]", "") for vector in ordered}
        together = "{" + ", ".join(vector._text for vector in ordered) + "}"
        return cls(
            directions=torch.stack([vector.direction.to(first) for vector in ordered]),
            layers=tuple(vector.layer for vector in ordered),
            provenance=replace(
                ordered[0].provenance,
                expression=expressions.pop() if len(expressions) == 1 else together,
            ),
        )

    def __getitem__(self, layer: int) -> SteeringVector:
        if layer not in self.layers:
            raise IndexError(
                f"no vector for layer {layer}: this set has layers {_ranges(self.layers)} (0-based blocks)"
            )
        row = self.layers.index(layer)
        expression = f"{self.provenance.expression or self.provenance.behavior}[{layer}]"
        return SteeringVector(
            direction=self.directions[row],
            layer=layer,
            provenance=replace(self.provenance, expression=expression),
        )

    def __iter__(self) -> Iterator[SteeringVector]:
        return (self[layer] for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def at(self, layers: Iterable[int]) -> "SteeringVectors":
        """The subset for some layers."""
        chosen = tuple(sorted(set(layers)))
        return replace(self, directions=torch.stack([self[layer].direction for layer in chosen]), layers=chosen)

    def to(self, target: torch.device | str | torch.dtype) -> "SteeringVectors":
        """The same vectors on another device or in another dtype."""
        return replace(self, directions=self.directions.to(target))

    @property
    def d_model(self) -> int:
        return self.directions.shape[1]

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """Euclidean norm of each layer's vector, in float32."""
        return self.directions.float().norm(dim=-1)

    @property
    def behavior(self) -> str:
        return self.provenance.behavior

    def save(self, path: str | Path) -> Path:
        """Write one self-describing safetensors file, atomically; see `caa_lens.storage`."""
        from caa_lens.storage import save_vectors  # storage stands above vectors

        return save_vectors(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVectors":
        """Read a file that `save` wrote; see `caa_lens.storage` for the errors."""
        from caa_lens.storage import load_vectors  # storage stands above vectors

        return load_vectors(path)

    def __repr__(self) -> str:
        p = self.provenance
        return (
            f"SteeringVectors({p.expression or p.behavior}, layers={_ranges(self.layers)}, d_model={self.d_model}, "
            f"model={p.model!r}, method={p.method!r}, pairs={p.n_pairs})"
        )


def normalize_across_behaviors(sets: Mapping[str, SteeringVectors]) -> dict[str, SteeringVectors]:
    """Rescale every behavior's vector, layer by layer, to the mean norm of all behaviors' vectors at that layer.

    ||v_b[l]|| becomes mean_b' ||v_b'[l]||, so that one multiplier means one size for all behaviors. Norms still differ
    across layers. Source: paper section 3 (all its evaluations use normalised vectors).

    Raises:
        ValueError: if the sets have different layers or models, or a vector is zero.
    """
    if not sets:
        raise ValueError("normalize_across_behaviors needs at least one set of vectors")
    first = next(iter(sets.values()))
    for name, vectors in sets.items():
        if vectors.layers != first.layers or vectors.provenance.model != first.provenance.model:
            raise ValueError(
                f"{name!r} has layers {_ranges(vectors.layers)} of {vectors.provenance.model}, expected "
                f"{_ranges(first.layers)} of {first.provenance.model}: extract all behaviors from one model and layers"
            )
        if not bool((vectors.norms > 0).all()):
            raise ValueError(f"{name!r} has a zero vector, which cannot be rescaled")
    mean_norm = torch.stack([vectors.norms for vectors in sets.values()]).mean(0)  # [layer]
    return {
        name: replace(
            vectors,
            directions=vectors.directions * (mean_norm / vectors.norms).to(vectors.directions)[:, None],
            provenance=replace(vectors.provenance, normalisation=f"across behaviors: {', '.join(sorted(sets))}"),
        )
        for name, vectors in sets.items()
    }


def _ranges(layers: Iterable[int]) -> str:
    """`0-29` for a run, `3, 7-9` otherwise."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
