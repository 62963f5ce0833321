"""What may be done to the stream at one position: a family of formulas, which a function of yours can join.

Each is a function `(stream, parameters, strength) -> stream`. Below, h is the stream at a position, s the strength, v a
direction with u = v / ||v||, and the other letters are parameters by their names::

    add                 h + s v                                             the paper's
    ablate              h - s (h . u) u                                     s = 1 removes the direction
    set                 h + (s ||v|| - h . u) u                             the component along v becomes s v
    pull                h + s (target - h . u) u                            s = 1 makes the component the target
    add_if_projection   h + s v   where h . gate / ||gate|| > threshold     else h
    add_if_cosine       h + s v   where cos(h, gate) > threshold            else h
    add_keep_norm       (h + s v) ||h|| / ||h + s v||
    rotate              h turned by the angle s * angle in the plane of v and `toward`, from v towards it
    affine              (1 - s) h + s (scale * h + shift)                   by coordinate; only where low < h < high
    scale               h (1 + s factor)                                    by coordinate

A strength of 0 leaves the stream as it is, to the bit, in all of them but `set`, whose strength is where it sets to.

Parameters are tensors by name: of the stream's width, or of one number. Formulas broadcast: a parameter may have
leading axes, and a strength may be one number a row, `[batch 1 1]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Parameters = Mapping[str, Tensor]
Formula = Callable[[Float[Tensor, "*batch width"], Parameters, Tensor], Float[Tensor, "*batch width"]]


def add(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h + s v. The product is formed in float32 and rounded once to the stream's dtype."""
    return stream + (strength.float() * parameters["direction"].float()).to(stream.dtype)


def ablate(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h - s (h . u) u: with s = 1 nothing of the direction is left."""
    unit = torch.nn.functional.normalize(parameters["direction"].float(), dim=-1)
    along = (stream.float() * unit).sum(-1, keepdim=True)
    return (stream.float() - strength.float() * along * unit).to(stream.dtype)


def set_projection(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h + (s ||v|| - h . u) u: the component along v becomes exactly s v, whatever it was."""
    norm, unit = _norm_and_unit(parameters["direction"].float())
    along = (stream.float() * unit).sum(-1, keepdim=True)
    return (stream.float() + (strength.float() * norm - along) * unit).to(stream.dtype)


def pull(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h + s (target - h . u) u: the component along v goes the share s of its way to the target."""
    h = _wide(stream)
    _, unit = _norm_and_unit(parameters["direction"].to(h.dtype))
    along = (h * unit).sum(-1, keepdim=True)
    return (h + strength.to(h.dtype) * (parameters["target"].to(h.dtype) - along) * unit).to(stream.dtype)


def add_if_projection(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h + s v where the projection of h on `gate` is above `threshold`, in units of the stream; else h."""
    h = _wide(stream)
    _, gate = _norm_and_unit(parameters["gate"].to(h.dtype))
    is_open = (h * gate).sum(-1, keepdim=True) > parameters["threshold"].to(h.dtype)
    return torch.where(is_open, add(stream, parameters, strength), stream)


def add_if_cosine(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h + s v where the cosine of h and `gate` is above `threshold`; else h."""
    h = _wide(stream)
    _, gate = _norm_and_unit(parameters["gate"].to(h.dtype))
    norm = h.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    is_open = (h / norm * gate).sum(-1, keepdim=True) > parameters["threshold"].to(h.dtype)
    return torch.where(is_open, add(stream, parameters, strength), stream)


def add_keep_norm(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """(h + s v) ||h|| / ||h + s v||: the direction of the sum, the length of the stream."""
    h = _wide(stream)
    moved = h + strength.to(h.dtype) * parameters["direction"].to(h.dtype)
    length = moved.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    return (moved * (h.norm(dim=-1, keepdim=True) / length)).to(stream.dtype)


def rotate(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h turned by the angle s * angle (in radians, 1 by default) in the plane of v and `toward`, from v towards it.

    What is orthogonal to the plane stays, and so does the norm.
    """
    h = _wide(stream)
    _, first = _norm_and_unit(parameters["direction"].to(h.dtype))
    toward = parameters["toward"].to(h.dtype)
    _, second = _norm_and_unit(toward - (toward * first).sum(-1, keepdim=True) * first)
    angle = strength.to(h.dtype) * parameters.get("angle", torch.ones(())).to(h)
    along, across = ((h * axis).sum(-1, keepdim=True) for axis in (first, second))
    turned = (along * angle.cos() - across * angle.sin(), along * angle.sin() + across * angle.cos())
    return (h + (turned[0] - along) * first + (turned[1] - across) * second).to(stream.dtype)


def affine(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """(1 - s) h + s (scale * h + shift), by coordinate; with `low` and `high` only where low < h < high.

    Source: Linear-AcT, arXiv 2410.23054, section 3, where s is called lambda.
    """
    h = _wide(stream)
    mapped = parameters["scale"].to(h.dtype) * h + parameters["shift"].to(h.dtype)
    moved = (h + strength.to(h.dtype) * (mapped - h)).to(stream.dtype)
    if "low" not in parameters:
        return moved
    inside = (h > parameters["low"].to(h.dtype)) & (h < parameters["high"].to(h.dtype))
    return torch.where(inside, moved, stream)


def scale(stream: Float[Tensor, "*batch width"], parameters: Parameters, strength: Tensor) -> Tensor:
    """h (1 + s factor), by coordinate: what is there is made larger or smaller, and nothing else is added."""
    h = _wide(stream)
    return (h * (1 + strength.to(h.dtype) * parameters["factor"].to(h.dtype))).to(stream.dtype)


@dataclass(frozen=True, slots=True)
class Operator:
    """A formula of the family, and the parameters that it takes.

    Attributes:
        formula: `(stream, parameters, strength) -> stream`, which changes none of them.
        needs: names of the parameters that it cannot do without.
        may_have: of those that it can.
    """

    formula: Formula
    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ()

    def __call__(self, stream: Tensor, parameters: Parameters, strength: Tensor) -> Tensor:
        return self.formula(stream, parameters, strength)


OPERATORS: dict[str, Operator] = {
    "add": Operator(add, ("direction",)),
    "ablate": Operator(ablate, ("direction",)),
    "set": Operator(set_projection, ("direction",)),
    "pull": Operator(pull, ("direction", "target")),
    "add_if_projection": Operator(add_if_projection, ("direction", "gate", "threshold")),
    "add_if_cosine": Operator(add_if_cosine, ("direction", "gate", "threshold")),
    "add_keep_norm": Operator(add_keep_norm, ("direction",)),
    "rotate": Operator(rotate, ("direction", "toward"), ("angle",)),
    "affine": Operator(affine, ("scale", "shift"), ("low", "high")),
    "scale": Operator(scale, ("factor",)),
}


def formula_of(operator: str | Formula) -> Formula:
    """The function that an operator's name stands for; a function stands for itself."""
    return OPERATORS[operator].formula if isinstance(operator, str) else operator


def name_of(operator: str | Formula) -> str:
    """What an operator is called in messages."""
    return operator if isinstance(operator, str) else getattr(operator, "__name__", type(operator).__name__)


def check_operator(operator: object) -> None:
    """Raises `ValueError` for a name that is none, `TypeError` for what is neither a name nor a function."""
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise ValueError(f"unknown operator {operator!r}: expected one of {', '.join(OPERATORS)}, or a function")
    elif not callable(operator):
        raise TypeError(f"operator must be one of {', '.join(OPERATORS)}, or a function, got {type(operator).__name__}")


def check_parameters(operator: str | Formula, parameters: Parameters, by_position: frozenset[str]) -> None:
    """Refuses parameters that an operator does not take, or that are no finite tensors, and asks for missing ones.

    Raises:
        TypeError: for what is no floating-point or bool tensor.
        ValueError: for missing, unknown or not finite ones, of more axes than the stream's width (with one for
            positions: than two), or of unequal widths.
    """
    name = name_of(operator)
    if isinstance(operator, str):
        known = OPERATORS[operator]
        if missing := [one for one in known.needs if one not in parameters]:
            what = "a vector" if missing == ["direction"] else f"parameters={{{missing[0]!r}: a tensor}}"
            raise ValueError(
                f"{name} needs {' and '.join(known.needs)}, got no {' and no '.join(missing)}: give {what}"
            )
        if unknown := sorted(set(parameters) - {*known.needs, *known.may_have}):
            takes = ", ".join((*known.needs, *known.may_have))
            raise ValueError(f"{name} takes no parameter {unknown[0]!r}: it takes {takes}")
        if ("low" in parameters) != ("high" in parameters):
            raise ValueError(f"{name} has one end of its support: give both low and high, or neither")
    widths: dict[str, int] = {}
    for key, tensor in parameters.items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise TypeError(f"parameter {key!r} of {name} must be a tensor of numbers, got {type(tensor).__name__}")
        axes = 2 if key in by_position else 1
        if tensor.ndim > axes or (key in by_position and tensor.ndim != 2):
            shape = "[pos, width], or [pos, 1]" if axes == 2 else "[width], or one number"
            raise ValueError(f"parameter {key!r} of {name} has shape {tuple(tensor.shape)}, expected {shape}")
        # What requires grad is trained, and looked at by who trains it.
        if not tensor.requires_grad and not bool(torch.isfinite(tensor).all()):
            if key in ("low", "high"):
                continue
            raise ValueError(f"parameter {key!r} of {name} must be finite, got NaN or infinite numbers in it")
        if tensor.ndim and tensor.shape[-1] != 1:
            widths[key] = tensor.shape[-1]
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{key} {width}" for key, width in widths.items())
        raise ValueError(f"the parameters of {name} have unequal widths ({found}): all are of one stream")


def _wide(stream: Tensor) -> Tensor:
    """In float32; a float64 stream keeps its own type."""
    return stream if stream.dtype == torch.float64 else stream.float()


def _norm_and_unit(direction: Tensor) -> tuple[Tensor, Tensor]:
    norm = direction.norm(dim=-1, keepdim=True)
    return norm, direction / norm.clamp_min(torch.finfo(direction.dtype).tiny)
