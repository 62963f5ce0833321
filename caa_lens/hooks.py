"""What steering does to the residual stream: pure operators, and the hook functions that carry them.

Three operators, each a function of the residual stream h at one position, a direction v and a multiplier m:

    add      h + m v                                (the paper's)
    ablate   h - m (h . u) u,   u = v / ||v||       (m = 1 removes the direction)
    set      h + (m ||v|| - h . u) u                (the component along v becomes m v)

A hook knows the absolute position of the tokens in front of it, also when a KV cache feeds the model one token at a
time: the attention pattern of the same block has shape `[batch head query key]`, and `key - query` tokens are already
behind. So one `(name, function)` pair listens at two hook points of its block: the pattern, where it learns the offset,
and `resid_post`, where it uses it. A block's pattern always comes first, so nothing old is ever used.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.number_checks import as_float
from caa_lens.vectors import SteeringVector

Operator = Callable[
    [Float[Tensor, "*batch d_model"], Float[Tensor, " d_model"], Tensor], Float[Tensor, "*batch d_model"]
]


def add(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], multiplier: Tensor
) -> Float[Tensor, "*batch d_model"]:
    """h + m v. The product is formed in float32 and rounded once to the stream's dtype."""
    return resid + (multiplier.float() * direction.float()).to(resid.dtype)


def ablate(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], multiplier: Tensor
) -> Float[Tensor, "*batch d_model"]:
    """h - m (h . u) u: with m = 1 nothing of the direction is left."""
    unit = torch.nn.functional.normalize(direction.float(), dim=-1)
    along = (resid.float() * unit).sum(-1, keepdim=True)
    return (resid.float() - multiplier.float() * along * unit).to(resid.dtype)


def set_projection(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], multiplier: Tensor
) -> Float[Tensor, "*batch d_model"]:
    """h + (m ||v|| - h . u) u: the component along v becomes exactly m v, whatever it was."""
    norm = direction.float().norm()
    unit = direction.float() / norm.clamp_min(torch.finfo(torch.float32).tiny)
    along = (resid.float() * unit).sum(-1, keepdim=True)
    return (resid.float() + (multiplier.float() * norm - along) * unit).to(resid.dtype)


OPERATORS: dict[str, Operator] = {"add": add, "ablate": ablate, "set": set_projection}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intervention:
    """A vector, what is done with it, how much of it, and from where on.

    Attributes:
        vector: the steering vector; its layer says where.
        multiplier: a number, or one number a row of the batch, `[batch]`.
        start: first steered position in padded coordinates of the first forward, a number or `[batch]`;
            None steers every position.
        operator: "add", "ablate" or "set".

    With `add` and `ablate`, multiplier 0 leaves the stream untouched, bit for bit.

    Raises:
        ValueError: for an unknown operator, a multiplier that is not finite or not a number or `[batch]`.
    """

    vector: SteeringVector
    multiplier: float | int | Tensor = 1.0
    start: int | Tensor | None = None
    operator: str = "add"

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"unknown operator {self.operator!r}: expected one of {', '.join(OPERATORS)}")
        if not isinstance(self.vector, SteeringVector):
            kind = type(self.vector).__name__
            raise TypeError(f"expected a SteeringVector, got {kind}: of a set choose a layer, as in vectors[13]")
        # Any real number: those of numpy and pandas are neither `int` nor `float`.
        if not isinstance(self.multiplier, numbers.Real | Tensor) or isinstance(self.multiplier, bool):
            kind = type(self.multiplier).__name__
            remedy = "; torch.tensor(...) makes one" if hasattr(self.multiplier, "__len__") else ""
            raise TypeError(
                f"multiplier must be a number or a tensor [batch], got the {kind} {self.multiplier!r}{remedy}"
            )
        if not isinstance(self.start, numbers.Integral | Tensor | None) or isinstance(self.start, bool):
            raise TypeError(f"start must be a whole number or a tensor [batch], got {self.start!r}")
        if isinstance(self.multiplier, int) and abs(self.multiplier) >= 2**63:  # too large for an integer of torch
            object.__setattr__(self, "multiplier", as_float("multiplier", self.multiplier))
        multiplier = torch.as_tensor(self.multiplier)
        if multiplier.ndim > 1:
            raise ValueError(f"multiplier must be a number or [batch], got shape {tuple(multiplier.shape)}")
        if not bool(torch.isfinite(multiplier).all()):
            raise ValueError(f"multiplier must be finite, got {self.multiplier}")
        if isinstance(self.start, numbers.Integral) and self.start < 0:
            raise ValueError(f"start must be a position counted from 0, got {self.start}")

    def apply(self, resid: Float[Tensor, "batch pos d_model"], offset: int) -> Float[Tensor, "batch pos d_model"]:
        """The steered stream, as a new tensor; `offset` tokens are already behind `resid`'s first position."""
        batch, n_pos, d_model = resid.shape
        if self.vector.d_model != d_model:
            raise ValueError(
                f"vector has d_model={self.vector.d_model}, but the model has d_model={d_model}: "
                "extract it from this model"
            )
        multiplier = _per_row("multiplier", self.multiplier, batch, resid.device)  # [batch or 1, 1, 1]
        direction = self.vector.direction.to(resid.device)
        steered = OPERATORS[self.operator](resid, direction, multiplier)
        changed = torch.ones_like(multiplier, dtype=torch.bool)
        if self.operator != "set":
            changed = multiplier != 0
        if self.start is not None:
            start = _per_row("start", self.start, batch, resid.device)
            position = offset + torch.arange(n_pos, device=resid.device)[None, :, None]
            changed = changed & (position >= start)
        return torch.where(changed, steered, resid)

    def to(self, device: torch.device) -> "Intervention":
        """The same with all its numbers as tensors on a device, so that `apply` moves nothing."""
        return replace(
            self,
            vector=self.vector.to(device),
            multiplier=torch.as_tensor(self.multiplier, device=device),
            start=None if self.start is None else torch.as_tensor(self.start, device=device),
        )

    def hook(self) -> "tuple[_BlockHookNames, Callable[[Tensor, Any], Tensor | None]]":
        """A `(name, function)` pair for TransformerLens' `fwd_hooks=[...]`, aware of the KV cache."""
        resid_post = self.vector.hook_name
        pattern = f"blocks.{self.vector.layer}.attn.hook_pattern"
        offsets: list[int] = []  # the latest pattern's; kept, so that the pair may be registered twice
        placed: dict[torch.device, Intervention] = {}  # moved once to each device it meets

        def steer_hook(activation: Tensor, hook: Any) -> Tensor | None:
            if hook.name == pattern:
                offsets[:] = [activation.shape[-1] - activation.shape[-2]]
                return None
            if not offsets:
                raise RuntimeError(f"{resid_post} ran without {pattern}, so positions are unknown")
            device = activation.device
            if device not in placed:
                placed[device] = self.to(device)
            return placed[device].apply(activation, offsets[0])

        return _BlockHookNames(self.vector.layer, (pattern, resid_post)), steer_hook


class _BlockHookNames:
    """Names a hook's two points for TransformerLens, and refuses a model that lacks them.

    TransformerLens asks a callable name about every hook point of the model, blocks first and the unembedding last. A
    vector of a layer that the model does not have would match nothing without a word; here it is an error.
    """

    def __init__(self, layer: int, names: tuple[str, str]) -> None:
        self.layer = layer
        self.names = names
        self._last_block = -1
        self._found: set[str] = set()

    def __call__(self, name: str) -> bool:
        if name.startswith("blocks."):
            self._last_block = int(name.split(".")[1])
        if name in self.names:
            self._found.add(name)
            return True
        if name.startswith("unembed.") and self._last_block >= 0:
            last_block, found = self._last_block, self._found
            self._last_block, self._found = -1, set()
            if len(found) != len(self.names):
                if self.layer <= last_block:
                    raise ValueError(
                        f"the model has no hook points {' and '.join(self.names)}: expected a HookedTransformer, as "
                        "caa_lens.load_model gives (a TransformerBridge is not supported yet)"
                    )
                raise ValueError(
                    f"the vector is for layer {self.layer}, but the model has layers 0 to {last_block}: "
                    "extract it from this model"
                )
        return False

    def __repr__(self) -> str:
        return f"<hook points {' and '.join(self.names)}>"


def _per_row(name: str, value: int | float | Tensor, batch: int, device: torch.device) -> Tensor:
    """A number or `[batch]` as `[1, 1, 1]` or `[batch, 1, 1]`."""
    tensor = torch.as_tensor(value, device=device)
    if tensor.ndim == 1 and tensor.shape[0] != batch:
        raise ValueError(f"{name} has {tensor.shape[0]} entries for a batch of {batch}: give one number, or one a row")
    return tensor.reshape(-1, 1, 1)
