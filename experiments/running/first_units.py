"""How long a run will take on this machine, from what a small part of it took.

The first unfinished unit of each kind is run on a part of its data, with the experiment's own code and the run's own
model, in a folder of its own that is gone afterwards. The part is doubled until it takes half a second, or is the whole
unit, and at least once if there is time, as the first also warms up. All units of that kind are then expected to take
the measured time, as many times as they are the more work (`Cost.work`: tokens, and steps of generation). What cannot
be measured (a base model that is not here, adapters that would fill the disk, whatever is left when `PATIENCE` is at
its end) is expected to be as fast as the rest, and the plan says so. A judge is never asked.

Loading the run's model counts once. Copies that a unit loads for itself count with each such unit.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.running.beforehand import n_layers, n_parameters, place_of
from experiments.running.context import Context, Loaded
from experiments.running.costs import Cost
from experiments.running.experiment import Experiment
from experiments.running.plan import Costs, Estimate, scratch_bytes, this_device
from experiments.running.run_folder import RunFolder
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

SMALLEST = {"n_generate": 4, "n_test": 2, "n_prompts": 1, "n_questions": 4, "max_new_tokens": 4}
LONG_ENOUGH = 0.5  # seconds that a part takes at least, where the unit is that long
TOO_LONG = 2.0  # seconds after which a part is not doubled
PATIENCE = 30.0  # seconds for all parts, beside loading the model; each kind has its share of what is left


def part_of(config: RunConfig, behavior: str, n: int) -> RunConfig:
    """The run's settings for one behavior and `n` times the smallest part of its data.

    The layer is a middle one where the settings name none, so that no sweep has to find it.
    """
    smaller = {}
    for name, least in SMALLEST.items():
        own = getattr(config, name)
        smaller[name] = n * least if own is None else min(own, n * least)
    layer = config.layer if config.layer is not None else (n_layers(config.model, fetch=False) or 1) // 2
    base = config.base_model if config.base_model and place_of(config.base_model) else None
    return config.model_copy(update={"behaviors": (behavior,), "layer": layer, "base_model": base, **smaller})


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a part of a unit took: its work, the seconds for it, and those for copies of a model that it loaded."""

    cost: Cost
    seconds: float
    copying: float

    def expected(self, cost: Cost) -> float:
        """Seconds for a whole unit of this kind."""
        return self.copying + self.seconds * (cost.work / self.cost.work if self.cost.work else 1.0)


@dataclass(slots=True)
class Parts:
    """Does parts of units; those of one behavior and size share a folder, as they use each other's results."""

    experiments: Mapping[str, Experiment]
    config: RunConfig
    root: Path
    device: str | None
    loaded: Loaded = field(default_factory=Loaded)
    contexts: dict[tuple[str, int], Context] = field(default_factory=dict)

    def context(self, behavior: str, n: int) -> Context:
        if (behavior, n) not in self.contexts:
            folder = RunFolder(self.root / f"{behavior}-{n}")
            config = part_of(self.config, behavior, n)
            self.contexts[behavior, n] = Context(config, folder, device=self.device, loaded=self.loaded)
        return self.contexts[behavior, n]

    def do(self, experiment: Experiment, unit: Unit, n: int) -> Part:
        """Do a part of a unit, after those of what it needs, and time it alone."""
        context = self.context(str(dict(unit.arguments).get("behavior", self.config.behaviors[0])), n)
        for name in experiment.needs(context.config):
            needed = self.experiments[name]
            for its in needed.units(context.config):
                if {*its.arguments} <= {*unit.arguments} and not context.folder.is_done(name, its):
                    self.do(needed, its, n)
        cost = experiment.cost(unit, context)
        loading, copying, began = self.loaded.seconds, self.loaded.copying, time.perf_counter()
        frame = experiment.run(unit, context)
        copying = self.loaded.copying - copying
        seconds = time.perf_counter() - began - copying - (self.loaded.seconds - loading)
        context.folder.save(experiment.name, unit, frame)
        return Part(cost=cost, seconds=seconds, copying=copying)

    def measure(self, experiment: Experiment, unit: Unit, whole: Cost, until: float) -> Part | None:
        """The part of a unit that says most about the whole; None if not even a small one can be done."""
        found = None
        for power in range(12):
            try:
                found = self.do(experiment, unit, 2**power)
            except Exception:  # too little data for a probe, say, or a base model that is not here
                if found is not None or power > 1:
                    break
                continue
            enough = found.seconds >= LONG_ENOUGH or found.cost.work >= whole.work
            if (power and enough) or found.seconds + found.copying > TOO_LONG or time.perf_counter() > until:
                break
        return found


def kinds(costs: Costs) -> dict[tuple[str, Unit], tuple[str, Unit]]:
    """Of every unit, the first unit of its kind.

    Units of an experiment are of one kind if they differ in the behavior alone, or are as much work for one behavior.
    """
    first: dict[tuple[object, ...], tuple[str, Unit]] = {}
    found = {}
    for (name, unit), cost in costs.items():
        behavior = dict(unit.arguments).get("behavior")
        rest = tuple(argument for argument in unit.arguments if argument[0] != "behavior")
        same_work, same_arguments = (name, "work", behavior, cost), (name, "arguments", rest)
        key = first.get(same_arguments) or first.get(same_work) or (name, unit)
        first.setdefault(same_arguments, key)
        first.setdefault(same_work, key)
        found[name, unit] = key
    return found


def measured(
    experiments: Sequence[Experiment],
    costs: Costs,
    config: RunConfig,
    *,
    device: str | None,
    console: Console,
) -> Estimate:
    """Run a part of the first unit of each kind, and say how long all units will take.

    Args:
        experiments: those that are to run, in an order in which needs come first.
        costs: of their units that are not finished.
    """
    kind_of = kinds(costs)
    firsts = [key for key in dict.fromkeys(kind_of.values()) if not costs[key].requests]
    by_name = {one.name: one for one in experiments}
    parameters = n_parameters(config.model) or 0
    found: dict[tuple[str, Unit], Part] = {}
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="caa-lens-plan-") as root, bar:
        task = bar.add_task(f"loading {config.model_name}", total=len(firsts) + 1)
        parts = Parts(by_name, config, Path(root), device)
        if any(costs[key].work for key in firsts):
            _ = parts.context(config.behaviors[0], 1).model
        once, end = parts.loaded.seconds, time.perf_counter() + PATIENCE
        for n_done, key in enumerate(firsts):
            bar.update(task, advance=1, description=f"measuring a part of {key[0]}")
            left = end - time.perf_counter()
            if scratch_bytes(config, parameters, [by_name[key[0]]]) or left <= 0:
                continue
            share = time.perf_counter() + left / (len(firsts) - n_done)
            if part := parts.measure(by_name[key[0]], key[1], costs[key], until=share):
                found[key] = part
        parts.contexts.clear()
        parts.loaded.name = parts.loaded.model = None
    work = sum(part.cost.work for part in found.values())
    rate = sum(part.seconds for part in found.values() if part.cost.work) / work if work else None
    seconds: dict[tuple[str, Unit], float] = {}
    ways: dict[str, set[str]] = {}
    for key, cost in costs.items():
        if part := found.get(kind_of[key]):
            seconds[key] = part.expected(cost)
            ways.setdefault(key[0], set()).add("measured")
        elif not cost.work:
            seconds[key] = 0.0
        elif rate is not None:
            seconds[key] = rate * cost.work
            ways.setdefault(key[0], set()).add("as the others")
    how = {name: "measured in part" if len(of_one) > 1 else of_one.pop() for name, of_one in ways.items()}
    return Estimate(
        seconds=seconds,
        how=how,
        once=once,
        source=f"{once:.1f} s of it for loading the model, and the rest as measured here ({_where(device)}) on a part "
        "of the first unit of each kind, the others by their tokens and steps",
    )


def _where(device: str | None) -> str:
    import torch

    device, n = this_device() if device in (None, "auto") else str(device), torch.get_num_threads()
    return f"{device}, {n} thread{'s' if n > 1 else ''}" if device == "cpu" else device
