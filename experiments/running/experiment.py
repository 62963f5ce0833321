"""What an experiment is: units of work that do not depend on each other, and a section made of their frames.

    EXPERIMENT = Experiment(
        name="my_experiment",
        title="What is asked, as a heading",
        source="Figure 3",
        units=lambda config: [Unit.of(behavior=behavior) for behavior in config.behaviors],
        run=run,          # (unit, context) -> DataFrame, deterministic, no global state
        section=section,  # ({unit: frame}, config) -> caa_lens.report.Section; sees no model
        cost=cost,        # (unit, context) -> Cost, for --dry-run and the time left
        needs=needs_layer,  # from paper/layer_choice: vectors, and the chosen layer
        own=own,          # config -> {name: value}: what it depends on and the rest of the run does not
    )

Add it to `catalogue.EXPERIMENTS`; everything else (folder, restarts, several workers, progress, report) is the
runner's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.running.context import Context
from experiments.running.costs import Cost
from experiments.running.settings import RunConfig
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A question to a model; see the module's text for the parts."""

    name: str
    title: str
    source: str
    units: Callable[[RunConfig], Sequence[Unit]]
    run: "Callable[[Unit, Context], pd.DataFrame]"
    section: "Callable[[Frames, RunConfig], Section]"
    cost: Callable[[Unit, Context], Cost] = lambda unit, context: Cost()
    weights: Callable[[RunConfig], float] = lambda config: 1.0
    """How many times the model's weights, in the run's type, are in memory at once; gradients count as much."""
    needs: Callable[[RunConfig], Sequence[str]] = lambda config: ()
    """Names of the experiments whose results it uses."""
    by_driver: bool = False
    """Whether the process that writes the run folder does its units itself: they ask a server, and no model."""
    skip: Callable[[RunConfig], str | None] = lambda config: None
    """Why it cannot run with these settings, or None."""
    apart: bool = False
    """Whether `all` leaves it out: it has to be named."""
    own: Callable[[RunConfig], Mapping[str, Any]] = lambda config: {}
    """Settings and hashes of data, by name, that it depends on and the whole run does not; see `identity`."""
