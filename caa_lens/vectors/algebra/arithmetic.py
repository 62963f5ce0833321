"""Arithmetic on steering vectors that reads like the formulas, for one vector and for a set, layer by layer::

    refined = (v - style.onto(v)).normalized(to=v.norm)
    refined.provenance.expression       # '(v[13] - style[13].onto(v[13])).normalized(to=4.25)'

One rule of numbers: everything is computed in float64 on the CPU and rounded once, to the left operand's dtype, on the
left operand's device. What is no vector (norms, dot products, cosines, angles) is not rounded: a `float` for a vector,
a pandas series in float64 by layer for a set. So results do not depend on the device, and no input ever changes.

One rule of belonging: operands have the same width and layers, and one model; only "unknown" goes with any. All live at
one hook point, a block's output, because vectors of another can be neither made nor loaded.
"""

import math
from dataclasses import replace
from numbers import Real
from typing import Any, SupportsFloat, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.provenance import Provenance
from caa_lens.vectors.algebra import expressions as write
from caa_lens.vectors.algebra import rules, subspaces
from caa_lens.vectors.algebra.rules import Size

V = TypeVar("V", bound="VectorAlgebra")


class VectorAlgebra:
    """What `SteeringVector` and `SteeringVectors` can both do. A layer is a row, and rows are independent."""

    __slots__ = ()
    __array_ufunc__ = None  # numpy's numbers leave `2 * v` to v, instead of iterating over it
    __pandas_priority__ = 10_000  # and so do pandas' series
    provenance: Provenance

    # ---- what each of the two brings ------------------------------------------------------------------------------

    @property
    def _rows(self) -> Float[Tensor, "*layer d_model"]:
        raise NotImplementedError

    @property
    def _layers(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def _text(self) -> str:
        raise NotImplementedError

    def _with(self: V, rows: Float[Tensor, "*layer d_model"], provenance: Provenance) -> V:
        raise NotImplementedError

    # ---- linear ---------------------------------------------------------------------------------------------------

    def __add__(self: V, other: V) -> V:
        w = self._operand(other)
        return self._derived(self._wide + w, write.infix(self._text, "+", other._text), other)

    def __sub__(self: V, other: V) -> V:
        w = self._operand(other)
        return self._derived(self._wide - w, write.infix(self._text, "-", other._text), other)

    def __radd__(self: V, other: object) -> V:
        """`sum([v, w])` begins with the number 0, the only one that a vector can be added to."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __neg__(self: V) -> V:
        return self._derived(-self._wide, write.negated(self._text))

    def __mul__(self: V, scale: SupportsFloat) -> V:
        if not isinstance(scale, Real | Tensor | np.ndarray):
            return NotImplemented
        by = rules.finite(scale, "a scale")
        return self._derived(self._wide * by, write.infix(write.number(by), "*", self._text))

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`tensor * v` is asked of the tensor first, which leaves it to v; nothing else of torch takes a vector."""
        if function in (Tensor.mul, Tensor.__mul__, torch.mul) and isinstance(args[1], VectorAlgebra):
            return args[1] * args[0]
        return NotImplemented

    def __truediv__(self: V, scale: SupportsFloat) -> V:
        if not isinstance(scale, Real | Tensor | np.ndarray):
            return NotImplemented
        by = rules.finite(scale, "a divisor")
        if by == 0:
            raise ValueError("a steering vector cannot be divided by 0")
        return self._derived(self._wide / by, write.infix(self._text, "/", write.number(by)))

    def lerp(self: V, other: V, t: float | int) -> V:
        """(1 - t) v + t w: v at t = 0, w at t = 1."""
        w, t = self._operand(other), rules.finite(t, "t")
        expression = write.method(self._text, "lerp", other._text, write.number(t))
        return self._derived((1 - t) * self._wide + t * w, expression, other)

    # ---- lengths and angles ---------------------------------------------------------------------------------------

    def __matmul__(self: V, other: V) -> Any:
        """v . w, a number; of a set a pandas series by layer, as `cosine` and `angle` are."""
        w = self._operand(other)
        return self._by_layer(subspaces.dot(self._wide, w), "dot product")

    def cosine(self: V, other: V) -> Any:
        """v . w / (||v|| ||w||), a number; of a set a pandas series by layer.

        Models may differ, and layers of single vectors too: only coordinates are compared.

        Raises:
            ValueError: for different widths, sets of different layers, or a zero vector.
        """
        v, w = self._comparable(other)
        return self._by_layer(subspaces.dot(subspaces.unit(v), subspaces.unit(w)).clamp(-1, 1), "cosine")

    def angle(self: V, other: V) -> Any:
        """The angle between v and w in radians, 0 to pi; compares what `cosine` compares."""
        return self._by_layer(subspaces.angle(*self._comparable(other)), "angle")

    def normalized(self: V, to: Size = 1.0) -> V:
        """to v / ||v||: the same direction with Euclidean norm `to`, in units of the residual stream.

        Raises:
            ValueError: for a zero vector, or a norm that is negative or not finite.
        """
        size, text = rules.size(self, to, "a norm")
        rules.check_nonzero(self)
        return self._derived(subspaces.unit(self._wide) * size, write.method(self._text, "normalized", f"to={text}"))

    def scaled_to(self: V, share: float | int, *, of: Size) -> V:
        """share N v / ||v||: the norm becomes a share of the residual stream's norm N.

        Args:
            share: 0.1 makes the vector a tenth as long as the stream is.
            of: N at the vector's layer, measured by the caller (see
                `caa_lens.interpretation.vector_norms`); for a set one number a layer, or
                one for all.

        Raises:
            ValueError: for a zero vector, or sizes that are negative or not finite.
        """
        part, share_text = rules.size(self, share, "a share")
        norm, text = rules.size(self, of, "a residual norm")
        rules.check_nonzero(self)
        expression = write.method(self._text, "scaled_to", share_text, f"of={text}")
        return self._derived(subspaces.unit(self._wide) * (part * norm), expression)

    # ---- subspaces ------------------------------------------------------------------------------------------------

    def onto(self: V, *others: V) -> V:
        """The projection of v onto w, (v . w / w . w) w; of several, onto the subspace that they span.

        Vectors that depend linearly on each other, up to the rounding of their dtype, count once.

        Raises:
            ValueError: for no vector, a zero vector, or vectors that do not belong together.
        """
        rows = subspaces.project(self._wide, self._basis(others))
        return self._derived(rows, write.method(self._text, "onto", *(o._text for o in others)), *others)

    def without(self: V, *others: V) -> V:
        """v - v.onto(w, ...): nothing along the others is left. A remainder that is mere rounding becomes 0."""
        rows = subspaces.remove(self._wide, self._basis(others), rules.precision(self, *others))
        return self._derived(rows, write.method(self._text, "without", *(o._text for o in others)), *others)

    def onto_pca(self: V, points: Float[Tensor, "point *layer d_model"], k: int) -> V:
        """The projection onto the first k principal components of centred points, e.g. of activations.

        Args:
            points: `[point d_model]`; for a set `[point layer d_model]`, in the order of its layers.
            k: how many components.

        Raises:
            ValueError: for another shape, or points that vary along fewer than k directions.
        """
        if points.shape[1:] != self._rows.shape or not len(points):
            expected = ", ".join(map(str, self._rows.shape))
            raise ValueError(f"got points of shape {tuple(points.shape)}, expected (points, {expected})")
        self._check_k(k)
        rows = subspaces.project(self._wide, subspaces.principal_components(rules.wide(points), k))
        return self._derived(rows, write.method(self._text, "onto_pca", "points", str(k)))

    def top_k(self: V, k: int) -> V:
        """Only the k components of largest absolute value, the others 0; of equals, the first."""
        self._check_k(k)
        return self._derived(subspaces.largest_components(self._wide, k), write.method(self._text, "top_k", str(k)))

    # ---- rotation -------------------------------------------------------------------------------------------------

    def rotated(self: V, toward: V, angle: float | int) -> V:
        """v turned by an angle in radians within its plane with another vector; the norm stays.

        `v.rotated(w, v.angle(w))` arrives at w's direction.

        Raises:
            ValueError: if the two are parallel, so that they span no plane, or one is zero.
        """
        w, between = self._plane(toward)
        angle = rules.finite(angle, "an angle")
        parallel = torch.minimum(between, math.pi - between) <= rules.precision(self, toward)
        if angle != 0 and bool(parallel.any()):
            raise ValueError(f"{self._text} and {toward._text} are parallel: they span no plane to rotate in")
        rows = subspaces.rotate(self._wide, w, torch.full_like(between, angle))
        return self._derived(rows, write.method(self._text, "rotated", toward._text, write.number(angle)), toward)

    def slerp(self: V, other: V, t: float | int) -> V:
        """Spherical interpolation, t from 0 to 1: the direction turns from v's to w's evenly, the norm grows evenly.

        Raises:
            ValueError: for another t, if the two are opposite, so that no arc is the shortest, or one is zero.
        """
        w, between = self._plane(other)
        if not 0 <= t <= 1:
            raise ValueError(f"slerp needs t from 0 to 1, got {t}: turn further with .rotated")
        if bool((math.pi - between <= rules.precision(self, other)).any()):
            raise ValueError(f"{self._text} and {other._text} are opposite: no arc between them is the shortest")
        norm = (1 - t) * subspaces.length(self._wide) + t * subspaces.length(w)
        rows = norm * subspaces.unit(subspaces.rotate(self._wide, w, t * between))
        return self._derived(rows, write.method(self._text, "slerp", other._text, write.number(t)), other)

    # ---- numbers -------------------------------------------------------------------------------------------------

    def to(self: V, target: torch.device | str | torch.dtype) -> V:
        """The same on another device, or in another dtype, where it must fit; names such as "bfloat16" will do."""
        named = getattr(torch, target, None) if isinstance(target, str) else None
        target = named if isinstance(named, torch.dtype) else target
        rows = rules.rounded(self._rows, target) if isinstance(target, torch.dtype) else self._rows.to(target)
        return self._with(rows, self.provenance)

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """The same numbers in the same dtype at the same layers, and the same history."""
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, VectorAlgebra)
        same = (self._layers, self.provenance) == (other._layers, other.provenance)
        same_kind = self._rows.dtype == other._rows.dtype and self._rows.shape == other._rows.shape
        return same and same_kind and bool((self._wide == other._wide).all())

    def __hash__(self) -> int:
        return hash((type(self), self._layers, self.provenance.expression))

    @property
    def _wide(self) -> Float[Tensor, "*layer d_model"]:
        return rules.wide(self._rows)

    def _derived(self: V, rows: Float[Tensor, "*layer d_model"], expression: str, *others: V) -> V:
        provenance = self.provenance.merged(*(other.provenance for other in others))
        rows = rules.rounded(rows, self._rows.dtype).to(self._rows.device)
        return self._with(rows, replace(provenance, expression=expression))

    def _operand(self, other: Any) -> Tensor:
        rules.check_compatible(self, other)
        return other._wide

    def _basis(self, others: tuple[Any, ...]) -> Tensor:
        if not others:
            raise ValueError("onto or without which vectors? give at least one")
        rules.check_compatible(self, *others)
        rules.check_nonzero(*others)
        return subspaces.orthonormal_basis(torch.stack([one._wide for one in others], dim=-2), rules.precision(*others))

    def _plane(self, other: Any) -> tuple[Tensor, Tensor]:
        rules.check_compatible(self, other)
        rules.check_nonzero(self, other)
        return other._wide, subspaces.angle(self._wide, other._wide)

    def _comparable(self, other: Any) -> tuple[Tensor, Tensor]:
        rules.check_kind(self, other)
        if self._rows.ndim > 1:
            rules.check_layers(self, other)
        rules.check_nonzero(self, other)
        return self._wide, other._wide

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self._rows.shape[-1]:
            raise ValueError(f"k must be from 1 to d_model={self._rows.shape[-1]}, got {k}")

    def _by_layer(self, values: Float[Tensor, "*layer 1"], name: str) -> Any:
        """A number, or of a set a series that says which layer each is of: `cosine[14]`."""
        if values.ndim == 1:
            return float(values.detach())
        import pandas as pd  # takes a second to import

        layers = pd.Index(self._layers, name="layer")
        return pd.Series(values.detach().squeeze(-1).cpu().numpy(), index=layers, name=name)
