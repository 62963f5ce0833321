"""Which positions are steered: a span or a mask, in padded coordinates of the first forward.

    (3, 7)      positions 3, 4, 5 and 6, half-open as everywhere
    (3, None)   from position 3 on, every generated token included; what `start=3` says
    mask        a bool tensor `[batch pos]` (or `[1 pos]`, for all rows), True where it is steered; behind its last
                column nothing is

Both ends of a span may be one number a row, `[batch]`, as left padding needs. Tokens in a KV cache count: a position
means the same whether a text runs whole, in chunks or token by token.
"""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

Positions = tuple[int | Tensor, int | Tensor | None] | Bool[Tensor, "batch pos"]


def check_positions(positions: Any) -> Positions:
    """The same, refused if it is neither a span nor a mask.

    Raises:
        TypeError: for anything else.
        ValueError: for a mask that is not `[batch pos]`, negative positions, or a span that ends where it starts.
    """
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2:
            kind = str(positions.dtype).removeprefix("torch.")
            raise ValueError(
                f"a mask of positions must be bool [batch pos], got {kind} of shape {tuple(positions.shape)}: a span "
                "is written (first, stop)"
            )
        return positions
    if not isinstance(positions, tuple) or len(positions) != 2:
        remedy = ""
        if isinstance(positions, str):
            remedy = "; the last token of a prompt is known to steer(model, v, prompt=..., positions='last')"
        elif isinstance(positions, numbers.Integral):
            remedy = f"; one position is ({positions}, {int(positions) + 1}), and start={positions} steers from it on"
        raise TypeError(f"positions must be a span (first, stop) or a bool mask [batch pos], got {positions!r}{remedy}")
    first, stop = positions
    if not isinstance(first, numbers.Integral | Tensor) or not isinstance(stop, numbers.Integral | Tensor | None):
        raise TypeError(f"a span of positions must be two whole numbers or tensors [batch], got {positions!r}")
    for end in (first, stop):
        if isinstance(end, Tensor) and (end.ndim > 1 or end.is_floating_point() or end.is_complex()):
            raise ValueError(
                f"an end of a span must be a whole number or [batch], got {end.dtype} of shape {tuple(end.shape)}"
            )
        if isinstance(end, numbers.Integral) and end < 0:
            raise ValueError(f"positions are counted from 0, got {end}: a span's end None means every token to come")
    if isinstance(first, numbers.Integral) and isinstance(stop, numbers.Integral) and stop <= first:
        raise ValueError(f"the span ({first}, {stop}) has no positions: expected the second behind the first")
    return positions


def of_row(positions: Positions, row: int, n_padding: int) -> Positions:
    """The positions of one row of a batch, counted without its padding."""
    if isinstance(positions, Tensor):
        return positions[row if len(positions) > 1 else 0, n_padding:][None]

    def end_of(end: int | Tensor) -> Tensor:
        end = torch.as_tensor(end)
        return ((end[row] if end.ndim else end) - n_padding).clamp_min(0)

    first, stop = positions
    return end_of(first), None if stop is None else end_of(stop)


def chosen(
    positions: Positions, *, behind: int, n_rows: int, n_pos: int, device: torch.device
) -> Bool[Tensor, "rows n_pos"]:
    """Which of `n_pos` positions with `behind` tokens before them are steered; one row where all are alike."""
    if isinstance(positions, Tensor):
        if positions.shape[0] not in (1, n_rows):
            raise ValueError(
                f"the mask of positions has {positions.shape[0]} rows for a batch of {n_rows}: give one row, or as many"
            )
        here = positions[:, behind : behind + n_pos].to(device)
        return F.pad(here, (0, n_pos - here.shape[1]))
    first, stop = positions
    position = torch.arange(behind, behind + n_pos, device=device)
    inside = position >= per_row("start", first, n_rows, device)[:, None]
    if stop is not None:
        inside = inside & (position < per_row("stop", stop, n_rows, device)[:, None])
    return inside


def per_row(name: str, value: int | float | Tensor, n_rows: int, device: torch.device) -> Tensor:
    """A number or `[batch]` as `[1]` or `[batch]`."""
    tensor = torch.as_tensor(value, device=device)
    if tensor.ndim == 1 and tensor.shape[0] != n_rows:
        raise ValueError(f"{name} has {tensor.shape[0]} entries for a batch of {n_rows}: give one number, or one a row")
    return tensor.reshape(-1)


@dataclass(frozen=True, slots=True)
class Reach:
    """What can be said of positions without the batch, in plain numbers on the CPU.

    Attributes:
        first: the first steered position of any row; None if a mask selects none.
        stop: the first position that no row steers any more; None if there is no end.
    """

    first: int | None
    stop: int | None
    columns: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, positions: Positions) -> "Reach":
        if isinstance(positions, Tensor):
            columns = tuple(positions.any(0).tolist())
            where = [column for column, any_row in enumerate(columns) if any_row]
            return cls(where[0], where[-1] + 1, columns) if where else cls(None, 0, columns)
        first, stop = positions
        return cls(int(torch.as_tensor(first).min()), None if stop is None else int(torch.as_tensor(stop).max()))

    def meets(self, behind: int, until: int) -> bool:
        """Whether any of the positions `behind` to `until` (exclusive) is steered in any row."""
        if self.columns is not None:
            return any(self.columns[behind:until])
        return self.first is not None and self.first < until and (self.stop is None or self.stop > behind)

    def __str__(self) -> str:
        if self.first is None:
            return "at no position"
        if self.columns is not None:
            return f"at {sum(self.columns)} positions from {self.first} to {(self.stop or 0) - 1}"
        if self.stop is None:
            return f"from position {self.first} on"
        last = self.stop - 1
        return f"at position {self.first}" if last == self.first else f"at positions {self.first} to {last}"
