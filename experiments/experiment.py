"""What an experiment is: units of work that do not depend on each other, and a section made of their frames.

    UNIT = Unit.of(behavior="refusal", multiplier=1.0)

    EXPERIMENT = Experiment(
        name="my_experiment",
        title="What is asked, as a heading",
        source="Figure 3",
        units=lambda config: [Unit.of(behavior=behavior) for behavior in config.behaviors],
        run=run,          # (unit, context) -> DataFrame, deterministic, no global state
        section=section,  # ({unit: frame}, config) -> caa_lens.report.Section; sees no model
        cost=cost,        # (unit, context) -> Cost, for --dry-run and the time left
        needs=needs_layer,  # from layer_sweep: vectors, and the chosen layer
        own=own,          # config -> {name: value}: what it depends on and the rest of the run does not
    )

Add it to `catalogue.EXPERIMENTS`; everything else (folder, restarts, several processes, progress, report) is the
runner's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.context import Context
    from experiments.settings import RunConfig

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a unit takes: forwards (a prompt, or a token that is generated), their tokens, and generated tokens' steps.

    `steps` are forwards of one token a row, waiting for each other: each takes at least the time to read the weights.
    `requests` are a judge's.
    """

    forwards: float = 0
    tokens: float = 0
    steps: float = 0
    requests: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            forwards=self.forwards + other.forwards,
            tokens=self.tokens + other.tokens,
            steps=self.steps + other.steps,
            requests=self.requests + other.requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A question to a model; see the module's text for the parts."""

    name: str
    title: str
    source: str
    units: "Callable[[RunConfig], Sequence[Unit]]"
    run: "Callable[[Unit, Context], pd.DataFrame]"
    section: "Callable[[Frames, RunConfig], Section]"
    cost: "Callable[[Unit, Context], Cost]" = lambda unit, context: Cost()
    weights: "Callable[[RunConfig], float]" = lambda config: 1.0
    """How many times the model's weights, in the run's type, are in memory at once; gradients count as much."""
    needs: "Callable[[RunConfig], Sequence[str]]" = lambda config: ()
    """Names of the experiments whose results it uses."""
    skip: "Callable[[RunConfig], str | None]" = lambda config: None
    """Why it cannot run with these settings, or None."""
    own: "Callable[[RunConfig], Mapping[str, Any]]" = lambda config: {}
    """Settings and hashes of data, by name, that it depends on and the whole run does not; see `identity`."""


class Unfinished(Exception):
    """Raised by `run` where a unit cannot be done now, but perhaps at the next start.

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
