"""What a unit of work is: one piece of an experiment, named by its arguments, that leaves one frame.

UNIT = Unit.of(behavior="refusal", multiplier=1.0)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Frames = Mapping["Unit", "pd.DataFrame"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work, named by its arguments: `unit["behavior"]`; `name` is also its file's."""

    arguments: tuple[tuple[str, str | int | float], ...]

    @classmethod
    def of(cls, **arguments: str | int | float) -> "Unit":
        return cls(tuple(arguments.items()))

    @property
    def name(self) -> str:
        parts = [f"{key}={value:+g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.arguments]
        return re.sub(r"[^\w=+.,-]", "_", ",".join(parts)) or "all"

    def __getitem__(self, key: str) -> Any:
        return dict(self.arguments)[key]


class Unfinished(Exception):
    """Raised by an experiment where a unit cannot be done now, but perhaps at the next start.

    The unit is left undone. The experiment's section is made of what there is: it must do with some of the units, or
    none of them.
    """

    def __init__(self, reason: str, frame: "pd.DataFrame | None" = None, *, stop: bool = False) -> None:
        """`frame` is shown until the unit is done; with `stop`, no other unit of the experiment is tried either."""
        super().__init__(reason)
        self.frame, self.stop = frame, stop


def together(frames: Frames) -> "pd.DataFrame":
    """All units' frames below each other, with the units' arguments as columns where the frames lack them."""
    import pandas as pd

    parts = []
    for unit, frame in frames.items():
        missing = {key: value for key, value in unit.arguments if key not in frame}
        part = frame.assign(**missing)
        part.attrs = {}  # pandas compares them when it concatenates
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
