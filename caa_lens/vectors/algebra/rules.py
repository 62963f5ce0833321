"""Which vectors may meet, and in what numbers they are computed: the rules under `arithmetic`."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from caa_lens.provenance import UNKNOWN, Provenance, layer_ranges, one_model
from caa_lens.vectors.algebra import expressions as write


@runtime_checkable
class Column(Protocol):
    """Numbers of numpy or pandas."""

    def __array__(self, dtype: Any = None) -> np.ndarray: ...


Size = float | int | Sequence[float | int] | Tensor | Column  # one number, or for a set one number a layer


@runtime_checkable
class Vectors(Protocol):
    """One vector, whose rows are `[d_model]`, or a set, whose rows are `[layer d_model]`."""

    @property
    def provenance(self) -> Provenance: ...
    @property
    def _rows(self) -> Tensor: ...
    @property
    def _layers(self) -> tuple[int, ...]: ...
    @property
    def _text(self) -> str: ...


# ---- belonging --------------------------------------------------------------------------------------------------


def check_compatible(one: Vectors, *others: Any) -> None:
    """Refuse what does not belong together.

    Raises:
        TypeError: for anything but vectors of the same class.
        ValueError: for another width, other layers, or another model, as `provenance.one_model` has it.
    """
    for other in others:
        check_kind(one, other)
        check_layers(one, other)
    models = sorted({each.provenance.model for each in (one, *others)} - {UNKNOWN})
    if one_model(models) is None:
        raise ValueError(
            f"cannot combine vectors of different models, {' and '.join(models)}: their residual streams have "
            "different bases"
        )


def check_kind(one: Vectors, other: Any) -> None:
    """Refuse another class or width."""
    if type(other) is not type(one):
        raise TypeError(f"expected {type(one).__name__}, got {type(other).__name__}")
    if one._rows.shape[-1] != other._rows.shape[-1]:
        raise ValueError(
            f"cannot combine vectors of d_model={one._rows.shape[-1]} and d_model={other._rows.shape[-1]}: both must "
            "come from models of the same width"
        )


def check_layers(one: Vectors, other: Vectors) -> None:
    """Refuse other layers."""
    if one._layers != other._layers:
        move = f"move one on purpose with .at_layer({one._layers[0]})"
        remedy = move if one._rows.ndim == 1 else "choose the same ones with .at([...])"
        raise ValueError(f"cannot combine vectors of {_where(one)} and {_where(other)}: {remedy}")


def check_nonzero(*every: Vectors) -> None:
    """Refuse vectors that have no direction."""
    for one in every:
        if not bool(wide(one._rows).any(dim=-1).all()):
            raise ValueError(f"{one._text} is the zero vector somewhere in {_where(one)}: it has no direction there")


def _where(one: Vectors) -> str:
    return f"layer{'' if one._rows.ndim == 1 else 's'} {layer_ranges(one._layers)}"


def check_rows(rows: Tensor, dims: int, what: str) -> None:
    """Refuse what is no direction: another shape, whole numbers, NaN."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{what} needs a tensor, got {type(rows).__name__}: torch.as_tensor(...) makes one")
    if rows.ndim != dims or not rows.numel():
        raise ValueError(f"{what} needs a {dims}-dimensional tensor with components, got shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"{what} needs floating-point numbers, got {rows.dtype}: call .float() on it first")
    bad = int((~torch.isfinite(rows if rows.dtype.itemsize > 1 else rows.float())).sum())  # float8 has no isfinite
    if bad:
        raise ValueError(f"{what} has {bad} NaN or infinite components of {rows.numel()}: extract it again in float32")


def check_layers_of_rows(rows: Tensor, layers: Sequence[int]) -> None:
    """Refuse a set whose rows are no directions, or do not go with distinct layers in order."""
    check_rows(rows, 2, "steering vectors")
    if len(layers) != rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} directions for {len(layers)} layers")
    if list(layers) != sorted(set(layers)) or (layers and layers[0] < 0):
        raise ValueError(f"layers must be distinct 0-based block numbers in order, got {tuple(layers)}")


# ---- numbers ----------------------------------------------------------------------------------------------------


def wide(rows: Tensor) -> Tensor:
    """As arithmetic sees them: float64 on the CPU."""
    return rows.cpu().double()


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype.

    Raises:
        ValueError: if a component is larger than the dtype can hold; some dtypes make it infinite, some clamp it.
    """
    largest = float(wide(rows.detach()).abs().max())
    if torch.finfo(dtype).max < largest < math.inf:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"a component of {largest:.3g} does not fit into {name}: use .to(torch.float32) first")
    return rows.to(dtype)


def precision(*every: Vectors) -> float:
    """Below this share of a vector a difference is rounding: the coarsest dtype's epsilon, or float64's own losses."""
    return max(1e-14, *(torch.finfo(one._rows.dtype).eps for one in every))


def finite(value: SupportsFloat, what: str) -> float:
    """A number as a float, also of a tensor or an array that holds just one.

    Raises:
        TypeError: for a tensor of several numbers, or one that gradients are to reach.
        ValueError: if it is NaN or infinite.
    """
    if isinstance(value, Tensor | np.ndarray):
        if math.prod(value.shape) != 1:
            raise TypeError(
                f"{what} is one number, got a tensor of shape {tuple(value.shape)}: multiply the layers one by one"
            )
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{what} is a number, and gradients would not reach a tensor: give it as multiplier= where it acts, or "
                "take .item()"
            )
        value = value.item()
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{what} must be finite, got {number}")
    return number


def size(one: Vectors, value: Size, what: str) -> tuple[Tensor, str]:
    """A norm, or one a layer, as a factor of the rows and as text; refused if negative or not finite.

    A series of pandas that says which layers it is of has to be of the set's.
    """
    index = getattr(value, "index", None)
    if getattr(index, "name", None) == "layer" and tuple(index) != one._layers:  # type: ignore[arg-type]
        raise ValueError(
            f"{what} is given for layers {layer_ranges(index)}, and these vectors are of layers "  # type: ignore[arg-type]
            f"{layer_ranges(one._layers)}: choose the same ones"
        )
    try:
        sizes = wide(value) if isinstance(value, Tensor) else torch.tensor(np.asarray(value, dtype=float))
    except OverflowError:
        raise ValueError(f"{what} must be finite, got a number of more than 300 digits") from None
    if sizes.shape not in ((), one._rows.shape[:-1]):
        raise ValueError(f"{what} is one number, or one for each layer of a set, got shape {tuple(sizes.shape)}")
    if not bool((torch.isfinite(sizes) & (sizes >= 0)).all()):
        raise ValueError(f"{what} must be finite and not negative, got {value}")
    text = write.numbers(sizes.tolist()) if sizes.ndim else write.number(float(sizes))
    return sizes.unsqueeze(-1), text
