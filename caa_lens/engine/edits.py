"""Edits of the stream: which operator acts where, how strongly, and the hook function that carries it.

The formulas are in `operators`. A hook knows the absolute position of the tokens in front of it, also when a KV cache
feeds the model one token at a time. The attention pattern of the same block has shape `[batch head query key]`, and
`key - query` tokens are already behind. So one `(name, function)` pair listens at two hook points of its block: the
pattern, where it learns the offset, and the edit's own site, where it uses it. A block's pattern always comes first, so
nothing old is ever used. A bridge's cache may hold fewer keys than there were tokens (a sliding window), or have room
for more; there the offset is what the cache itself says (`models.adapters.watch`), of every bridge that this library
has met.
"""

import numbers
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float
from caa_lens.engine.operators import Formula, check_operator, formula_of
from caa_lens.engine.positions import Positions, check_positions, chosen, per_row
from caa_lens.models.adapters.watch import watch_at
from caa_lens.provenance import HOOK_POINT

# Where a block may be edited: hook points behind its attention pattern, which tells the positions.
SITES = (HOOK_POINT, "attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")


def inside_blocks(edits: "Sequence[Edit]") -> str | None:
    """Why the engine, which sees the stream between blocks only, cannot do some edits; None if it can."""
    sites = sorted({one.site for one in edits} - {HOOK_POINT})
    return f"{' and '.join(sites)} {'is' if len(sites) == 1 else 'are'} inside of a block" if sites else None


def check_edit(
    *, multiplier: Any, operator: str | Formula, start: int | Tensor | None, positions: Positions | None
) -> Any:
    """The multiplier, after all that a user may say of an edit was looked at.

    Raises:
        TypeError, ValueError: for an unknown operator, a multiplier that is not finite or not a number or `[batch]`,
            positions that are none, or both `start` and `positions`.
    """
    check_operator(operator)
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
    """What is done to the stream behind one block, or inside it, and exactly where.

    Attributes:
        layer: the 0-based block whose output is changed, or in which the site is.
        positions: a span `(first, stop)` or a bool mask `[batch pos]`; see `positions`.
        direction: in units of the stream, `[d_model]`; None for an operator without one.
        multiplier: the operator's strength: a number, or one number a row of the batch, `[batch]`.
        operator: a name in `operators.OPERATORS`, or a function `(stream, parameters, strength) -> stream`.
        parameters: what the operator takes beside the direction, by name: `[width]`, or one number.
        by_position: names of parameters (the direction may be one) that have a number or a row for each position,
            `[pos width]` or `[pos 1]`, counted from the first of `positions`. Behind their last nothing is changed.
        site: the hook point of the block; of other sites than its output several heads count as one width.

    Positions that are not chosen stay untouched, bit for bit; but with `set` so does the whole stream where the
    multiplier is 0, unless the multiplier is a tensor that requires grad: then its gradient is that of the formula.

    Its fields are taken as they are; `of` checks them.
    """

    layer: int
    positions: Positions
    direction: Float[Tensor, "*pos d_model"] | None = None
    multiplier: float | int | Tensor = 1.0
    operator: str | Formula = "add"
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    by_position: frozenset[str] = frozenset()
    site: str = HOOK_POINT

    @classmethod
    def of(
        cls,
        direction: Float[Tensor, " d_model"],
        layer: int,
        *,
        multiplier: float | int | Tensor,
        operator: str | Formula,
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

    @property
    def all_parameters(self) -> dict[str, Tensor]:
        """What the operator's formula is given: the parameters, and the direction among them."""
        return dict(self.parameters) if self.direction is None else {"direction": self.direction, **self.parameters}

    def apply(self, resid: Float[Tensor, "batch pos *width"], offset: int) -> Float[Tensor, "batch pos *width"]:
        """The steered stream, as a new tensor; `offset` tokens are already behind `resid`'s first position."""
        stream = resid.flatten(2)  # several heads are one width
        n_rows, n_pos, width = stream.shape
        self._check_width(width)
        # [batch or 1, 1, 1]
        multiplier = per_row("multiplier", self.multiplier, n_rows, resid.device)[:, None, None]
        here = chosen(self.positions, behind=offset, n_rows=n_rows, n_pos=n_pos, device=resid.device)
        parameters = {name: one.to(resid.device) for name, one in self.all_parameters.items()}
        if self.by_position:
            parameters, told = self._at_positions(parameters, offset, n_rows, n_pos)
            here = here & told
        steered = formula_of(self.operator)(stream, parameters, multiplier)
        if steered.shape != stream.shape:
            raise ValueError(
                f"the operator made shape {tuple(steered.shape)} of a stream {tuple(stream.shape)}: a function "
                "(stream, parameters, strength) gives a stream of the same shape"
            )
        changed = torch.ones_like(multiplier, dtype=torch.bool)
        # A multiplier that is trained from 0 gets the gradient of the formula there, not of the stream left alone.
        if self.operator != "set" and not multiplier.requires_grad:
            changed = multiplier != 0
        return torch.where(changed & here[..., None], steered, stream).reshape(resid.shape)

    def _check_width(self, width: int) -> None:
        for name, tensor in self.all_parameters.items():
            its = tensor.shape[-1] if tensor.ndim else 1
            if its in (1, width):
                continue
            if name == "direction" and self.site == HOOK_POINT:
                raise ValueError(
                    f"vector has d_model={its}, but the model has d_model={width}: extract it from this model"
                )
            raise ValueError(
                f"{name} has {its} numbers, but {self.site} of the model has {width}: fit it at this site of this model"
            )

    def _at_positions(
        self, parameters: dict[str, Tensor], offset: int, n_rows: int, n_pos: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters with their row for each position of a pass, and which positions have one, `[batch or 1, pos]`."""
        if isinstance(self.positions, Tensor):
            raise ValueError(
                f"{' and '.join(sorted(self.by_position))} differ by position, and a mask does not say from where they "
                "count: give a span (first, stop)"
            )
        some = next(iter(parameters.values())).device
        first = per_row("start", self.positions[0], n_rows, some)[:, None]
        index = torch.arange(offset, offset + n_pos, device=some) - first  # [batch or 1, pos]
        told = index >= 0
        found = dict(parameters)
        for name in self.by_position:
            n_told = len(parameters[name])
            told = told & (index < n_told)
            found[name] = parameters[name][index.clamp(0, n_told - 1)]
        return found, told

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
            direction=None if self.direction is None else self.direction.to(device),
            parameters={name: one.to(device) for name, one in self.parameters.items()},
            multiplier=torch.as_tensor(self.multiplier, device=device),
            positions=positions,
        )

    def hook(self) -> "tuple[_BlockHookNames, Callable[..., Tensor | None]]":
        """A `(name, function)` pair for TransformerLens' `fwd_hooks=[...]`, aware of the KV cache.

        Numbers are moved once to each device that the hook meets, except those that require grad: they are read anew
        in every forward, so that what an optimiser does to them is felt.
        """
        pattern, *_ = names = _names_of(self.layer, self.site)
        # Of each thread's latest pattern: the tokens behind, its keys, and whether it went on from the one before.
        patterns: dict[int, tuple[int, int, bool]] = {}
        placed: dict[torch.device, tuple[list, Edit]] = {}
        inside = self.site != HOOK_POINT
        met: set[int] = set()  # threads whose block has come to a site inside of it, and not yet to its end

        def steer_hook(activation: Tensor, hook: Any) -> Tensor | None:
            thread = threading.get_ident()
            if inside and hook.name == names[2]:
                if thread not in met:
                    raise RuntimeError(NOT_MET.format(names[1]))
                met.discard(thread)
                return None
            if hook.name == pattern:
                n_queries, n_keys = activation.shape[-2:]
                behind = n_keys - n_queries
                _, until, _ = patterns.get(thread, (0, 0, True))
                patterns[thread] = behind, n_keys, behind in (0, until)
                return None
            met.add(thread)
            if (watch := watch_at(hook)) is not None:
                behind = watch.behind
            elif thread not in patterns:
                raise RuntimeError(f"{hook.name} ran without {pattern}, so positions are unknown")
            else:  # kept, so that the pair may be registered twice
                behind, _, goes_on = patterns[thread]
                if hook.name != names[1] and not goes_on:
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
        numbers_of = (*self.all_parameters.values(), self.multiplier, *ends)
        tensors = [one for one in numbers_of if isinstance(one, Tensor)]
        if any(one.requires_grad or one.is_inference() for one in tensors):
            return None
        return [(one._version, one.data_ptr()) for one in tensors]


NOT_MET = (
    "the model ran the whole block, and did not come to {} in it, so that nothing was steered: take another site, such "
    "as 'hook_resid_post'"
)
_UNMET = (
    "{} was given tokens behind a key-value cache that were not counted from its beginning: it holds {} keys, but a "
    "sliding window holds fewer than there are tokens, and a cache of fixed size more. Call "
    "caa_lens.models.check_model(model) once after the model was made: then positions are known from the cache itself"
)


def _names_of(layer: int, site: str) -> tuple[str, str, str]:
    """The pattern, the site by a `HookedTransformer`'s name for it, and the end of a bridge's block.

    A bridge has that name for a point of its own beside the point's, and tells it after all of its own: of the stream
    both are listened to. At the end of a block it is seen whether the block had a site inside of it at all.
    """
    return f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.{site}", f"blocks.{layer}.hook_out"


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
