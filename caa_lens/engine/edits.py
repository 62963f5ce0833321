"""What steering does to the residual stream: pure operators, and the hook functions that carry them.

Three operators, each a function of the residual stream h at one position, a direction v and a multiplier m:

    add      h + m v                                (the paper's)
    ablate   h - m (h . u) u,   u = v / ||v||       (m = 1 removes the direction)
    set      h + (m ||v|| - h . u) u                (the component along v becomes m v)

A hook knows the absolute position of the tokens in front of it, also when a KV cache feeds the model one token at a
time. The attention pattern of the same block has shape `[batch head query key]`, and `key - query` tokens are already
behind. So one `(name, function)` pair listens at two hook points of its block: the pattern, where it learns the offset,
and `resid_post`, where it uses it. A block's pattern always comes first, so nothing old is ever used. A bridge's cache
may hold fewer keys than there were tokens (a sliding window), or have room for more; there the offset is what the cache
itself says (`models.adapters.watch`), of every bridge that this library has met.
"""

import numbers
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float
from caa_lens.engine.positions import Positions, check_positions, chosen, per_row
from caa_lens.models.adapters.watch import watch_at
from caa_lens.provenance import hook_name_of

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


def check_edit(*, multiplier: Any, operator: str, start: int | Tensor | None, positions: Positions | None) -> Any:
    """The multiplier, after all that a user may say of an edit was looked at.

    Raises:
        TypeError, ValueError: for an unknown operator, a multiplier that is not finite or not a number or `[batch]`,
            positions that are none, or both `start` and `positions`.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}: expected one of {', '.join(OPERATORS)}")
    # Any real number: those of numpy and pandas are neither `int` nor `float`.
    if not isinstance(multiplier, numbers.Real | Tensor) or isinstance(multiplier, bool):
        kind = type(multiplier).__name__
        remedy = "; torch.tensor(...) makes one" if hasattr(multiplier, "__len__") else ""
        raise TypeError(f"multiplier must be a number or a tensor [batch], got the {kind} {multiplier!r}{remedy}")
    if not isinstance(start, numbers.Integral | Tensor | None) or isinstance(start, bool):
        raise TypeError(f"start must be a whole number or a tensor [batch], got {start!r}")
    if isinstance(multiplier, int) and abs(multiplier) >= 2**63:  # too large for an integer of torch
        multiplier = as_float("multiplier", multiplier)
    as_tensor = torch.as_tensor(multiplier)
    if as_tensor.ndim > 1:
        raise ValueError(f"multiplier must be a number or [batch], got shape {tuple(as_tensor.shape)}")
    if not bool(torch.isfinite(as_tensor).all()):
        raise ValueError(f"multiplier must be finite, got {multiplier}")
    if isinstance(start, numbers.Integral) and start < 0:
        raise ValueError(f"start must be a position counted from 0, got {start}")
    if positions is not None:
        if start is not None:
            raise ValueError("give either start or positions: positions=(first, None) is start=first")
        check_positions(positions)
    return multiplier


def said(start: int | Tensor | None, positions: Positions | None) -> Positions:
    """Where steering acts, from the two ways to say it. Raises `ValueError` where it is said in neither."""
    if start is not None:
        return start, None
    if positions is None:
        raise ValueError(
            "it is not said where steering starts, and a hook knows no prompt: give start=0 for every "
            "position, start=Prompt.of(model, question).steer_start for the end of the instruction, or positions=..."
        )
    return positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """What is done to the stream behind one block, and exactly where.

    Attributes:
        direction: in units of the residual stream, `[d_model]`.
        layer: the 0-based block whose output is changed.
        positions: a span `(first, stop)` or a bool mask `[batch pos]`; see `positions`.
        multiplier: a number, or one number a row of the batch, `[batch]`.
        operator: "add", "ablate" or "set".

    Positions that are not chosen stay untouched, bit for bit; with `add` and `ablate` so does the whole stream where
    the multiplier is 0, unless the multiplier is a tensor that requires grad: then its gradient is that of the formula.

    Its fields are taken as they are; `of` checks them.
    """

    direction: Float[Tensor, " d_model"]
    layer: int
    positions: Positions
    multiplier: float | int | Tensor = 1.0
    operator: str = "add"

    @classmethod
    def of(
        cls,
        direction: Float[Tensor, " d_model"],
        layer: int,
        *,
        multiplier: float | int | Tensor,
        operator: str,
        start: int | Tensor | None,
        positions: Positions | None,
    ) -> "Edit":
        """From what a user says; each part is checked.

        Raises:
            TypeError, ValueError: for an unknown operator, a multiplier that is not finite or not a number or
                `[batch]`, positions that are none, and unless just one of `start` and `positions` is given.
        """
        multiplier = check_edit(multiplier=multiplier, operator=operator, start=start, positions=positions)
        where = said(start, positions)
        return cls(direction=direction, layer=layer, positions=where, multiplier=multiplier, operator=operator)

    def apply(self, resid: Float[Tensor, "batch pos d_model"], offset: int) -> Float[Tensor, "batch pos d_model"]:
        """The steered stream, as a new tensor; `offset` tokens are already behind `resid`'s first position."""
        n_rows, n_pos, d_model = resid.shape
        if len(self.direction) != d_model:
            raise ValueError(
                f"vector has d_model={len(self.direction)}, but the model has d_model={d_model}: "
                "extract it from this model"
            )
        # [batch or 1, 1, 1]
        multiplier = per_row("multiplier", self.multiplier, n_rows, resid.device)[:, None, None]
        steered = OPERATORS[self.operator](resid, self.direction.to(resid.device), multiplier)
        changed = torch.ones_like(multiplier, dtype=torch.bool)
        # A multiplier that is trained from 0 gets the gradient of the formula there, not of the stream left alone.
        if self.operator != "set" and not multiplier.requires_grad:
            changed = multiplier != 0
        here = chosen(self.positions, behind=offset, n_rows=n_rows, n_pos=n_pos, device=resid.device)
        return torch.where(changed & here[..., None], steered, resid)

    def to(self, device: torch.device) -> "Edit":
        """The same with all its numbers as tensors on a device, so that `apply` moves nothing."""
        positions = self.positions
        if isinstance(positions, tuple):
            first, stop = positions
            moved = None if stop is None else torch.as_tensor(stop, device=device)
            positions = (torch.as_tensor(first, device=device), moved)
        else:
            positions = positions.to(device)
        return replace(
            self,
            direction=self.direction.to(device),
            multiplier=torch.as_tensor(self.multiplier, device=device),
            positions=positions,
        )

    def hook(self) -> "tuple[_BlockHookNames, Callable[..., Tensor | None]]":
        """A `(name, function)` pair for TransformerLens' `fwd_hooks=[...]`, aware of the KV cache.

        Numbers are moved once to each device that the hook meets, except those that require grad: they are read anew
        in every forward, so that what an optimiser does to them is felt.
        """
        pattern, *_ = names = _names_of(self.layer)
        # Of each thread's latest pattern: the tokens behind, its keys, and whether it went on from the one before.
        patterns: dict[int, tuple[int, int, bool]] = {}
        placed: dict[torch.device, tuple[list, Edit]] = {}

        def steer_hook(activation: Tensor, hook: Any) -> Tensor | None:
            thread = threading.get_ident()
            if hook.name == pattern:
                n_queries, n_keys = activation.shape[-2:]
                behind = n_keys - n_queries
                _, until, _ = patterns.get(thread, (0, 0, True))
                patterns[thread] = behind, n_keys, behind in (0, until)
                return None
            if (watch := watch_at(hook)) is not None:
                behind = watch.behind
            elif thread not in patterns:
                raise RuntimeError(f"{hook.name} ran without {pattern}, so positions are unknown")
            else:  # kept, so that the pair may be registered twice
                behind, _, goes_on = patterns[thread]
                if hook.name != hook_name_of(self.layer) and not goes_on:
                    raise RuntimeError(_UNMET.format(hook.name, behind))
            device, versions = activation.device, self._versions()
            if versions is None:
                return self.apply(activation, behind)
            if device not in placed or placed[device][0] != versions:
                placed[device] = versions, self.to(device)
            return placed[device][1].apply(activation, behind)

        return _BlockHookNames(self.layer, names), steer_hook

    def _versions(self) -> list[tuple[int, int]] | None:
        """What tells that a tensor was changed in place; None where a copy must not be kept at all."""
        ends = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        numbers_of = (self.direction, self.multiplier, *ends)
        tensors = [one for one in numbers_of if isinstance(one, Tensor)]
        if any(one.requires_grad or one.is_inference() for one in tensors):
            return None
        return [(one._version, one.data_ptr()) for one in tensors]


_UNMET = (
    "{} was given tokens behind a key-value cache that were not counted from its beginning: it holds {} keys, but a "
    "sliding window holds fewer than there are tokens, and a cache of fixed size more. Call "
    "caa_lens.models.check_model(model) once after the model was made: then positions are known from the cache itself"
)


def _names_of(layer: int) -> tuple[str, ...]:
    """The pattern, and the stream after the block by either kind's own name.

    A bridge knows `hook_resid_post` as another name of `hook_out`, which comes after all of its own.
    """
    return f"blocks.{layer}.attn.hook_pattern", hook_name_of(layer), f"blocks.{layer}.hook_out"


class _BlockHookNames:
    """Names a hook's points for TransformerLens, and refuses a model that lacks them.

    TransformerLens asks a callable name about every hook point of the model, blocks first and the unembedding last. A
    vector of a layer that the model does not have would match nothing without a word; here it is an error.
    """

    def __init__(self, layer: int, names: tuple[str, ...]) -> None:
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
            pattern, *streams = self.names
            if self.layer > last_block:
                raise ValueError(
                    f"the vector is for layer {self.layer}, but the model has layers 0 to {last_block}: "
                    "extract it from this model"
                )
            # A bridge's own cache tells positions, so it may do without the pattern.
            if found.isdisjoint(streams) or (pattern not in found and streams[0] in found):
                missing = streams[0] if found.isdisjoint(streams) else pattern
                raise ValueError(
                    f"the model has no hook point {missing!r}: if another module was put in its place (an SAE), "
                    "take it away (reset_saes), or steer at another layer; and a model has to be one of "
                    "TransformerLens', as caa_lens.load_model gives"
                )
        return False

    def __repr__(self) -> str:
        return f"<hook points {' and '.join(self.names[:2])}>"
