"""How the experiments scale: units, bytes and time for behaviors, sizes of model and numbers of GPUs.

    python benchmarks/scaling.py             # the tables of docs/scaling.md
    python benchmarks/scaling.py --sweep     # whether one sweep needs several machines
    python benchmarks/scaling.py --measure   # the driver's own time, and a run of Ray's workers beside its simulation

Counted: units and their tokens and steps (the experiments' own `cost`), bytes of vectors and weights. Planned: seconds
of a unit on a card (`experiments/running/rates.py`, by its data sheet), of loading (`DISK`) and of the network
(`NETWORK`). Measured: the driver's seconds a result (`HANDLING`), and how far units stray from their plan:
`unit_seconds.csv` has the seconds and bytes of every unit of the demo model's run that experiments/README.md tells of
(one core of an AMD EPYC). How a run follows from its units: `schedule.py`.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.schedule import Load, Task, bounds, longest, seconds_of, simulate
from experiments.catalogue import EXPERIMENTS
from experiments.running.beforehand import KNOWN_LAYERS, n_parameters
from experiments.running.behavior_sets import missing_sets
from experiments.running.context import Context
from experiments.running.experiment import Experiment
from experiments.running.plan import unit_costs
from experiments.running.rates import EFFICIENCY, gpu_rates
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run, skip_reasons
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

CARD, DTYPE = "h100", "bfloat16"
DISK = 2e9  # bytes a second that weights are read at; planned: one NVMe disk in each node
NETWORK = 1.25e9  # bytes a second between nodes; planned: 10 Gbit/s
HANDLING = 0.002  # seconds of the driver a result; measured, see --measure
LARGER = 10  # times the bytes of the demo run's frames that the paper's have, at most (more questions, more layers)
WIDTHS = {"7b": 4096, "13b": 5120, "70b": 8192}
CARDS = {"7b": 1, "13b": 1, "70b": 2}  # of a worker: 138 GB of weights fit on no card of 80
ON_BASE = ("base_vectors",)
COPIES = ("finetuning",)  # units that load a copy of their own, in float32
MEASURED = Path(__file__).with_name("unit_seconds.csv")


def load_of(size: str, n_behaviors: int) -> tuple[Load, RunConfig]:
    """The paper's experiments for so many behaviors: those beyond its seven are like the seven, one after the other."""
    model = f"meta-llama/Llama-2-{size}-chat-hf"
    more = {"base_model": "none"} if size == "70b" else {}
    config = RunConfig.of(model, "paper", dtype=DTYPE, judge="j", judge_url="http://localhost/v1", **more)
    config = config.model_copy(update={"stand_ins": missing_sets(config)})
    skipped = skip_reasons(EXPERIMENTS, config)
    able = [one for one in EXPERIMENTS if one.name not in skipped and not one.apart]
    if size == "70b":  # float32 weights and gradients: 276 GB and more
        able = [one for one in able if not one.name.startswith("finetun")]
    costs = unit_costs(able, Context(config, RunFolder("none")))
    rates, parameters = gpu_rates(CARD, DTYPE), n_parameters(model) or 0
    tasks: dict[str, list[Task]] = {one.name: [] for one in able}
    for (name, unit), cost in costs.items():
        wanted = "base" if name in ON_BASE else "chat"
        copying = 2 * parameters / DISK if name in COPIES else 0.0
        task = Task(experiment=name, seconds=rates.seconds(cost, parameters, DTYPE), model=wanted, copying=copying)
        n_like_it = len(range(config.behaviors.index(dict(unit.arguments)["behavior"]), n_behaviors, 7)) if (
            "behavior" in dict(unit.arguments)
        ) else 1  # fmt: skip
        tasks[name] += [task] * n_like_it
    load = Load(
        tasks=tasks,
        needs={one.name: [name for name in one.needs(config) if name in tasks] for one in able},
        loading=2 * parameters / DISK,
        by_driver={one.name for one in able if one.by_driver},
    )
    return load, config


def strayed() -> dict[str, list[float]]:
    """By experiment, measured seconds of units over those that their work foretells, at the experiment's own rate."""
    with MEASURED.open() as file:
        rows = {(row["experiment"], row["unit"]): float(row["seconds"]) for row in csv.DictReader(file)}
    config = RunConfig.of("demo")
    ran = [one for one in EXPERIMENTS if one.name in {name for name, _ in rows}]
    costs = unit_costs(ran, Context(config, RunFolder("none")))
    found: dict[str, list[tuple[float, float]]] = {}
    for (name, unit), cost in costs.items():
        if cost.work and (name, unit.name) in rows:
            found.setdefault(name, []).append((rows[name, unit.name], cost.work))
    ratios = {}
    for name, pairs in found.items():
        rate = sum(seconds for seconds, _ in pairs) / sum(work for _, work in pairs)
        ratios[name] = [seconds / (rate * work) for seconds, work in pairs]
    return ratios


def span(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def volume(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


AMOUNTS = (
    "model",
    "behaviors",
    "units",
    "seconds of one card",
    "weights",
    "vectors, to each worker",
    "frames back, at most",
)
LIMITS = (
    "model",
    "behaviors",
    "load, a worker",
    "object store, a worker",
    "driver, all results",
    "longest chain",
    "work / 64 GPUs",
)
NUMBERS = (1, 2, 4, 8, 16, 32, 64)  # of GPUs


def vectors_of(size: str, n_behaviors: int, config: RunConfig) -> int:
    """Bytes of all behaviors' vectors at every layer, in float32, and of the base model's."""
    return n_behaviors * KNOWN_LAYERS[f"Llama-2-{size}"] * WIDTHS[size] * 4 * (2 if config.base_model else 1)


def amounts(size: str, n: int, load: Load, config: RunConfig) -> list[str]:
    with MEASURED.open() as file:
        frames = [int(row["bytes"]) for row in csv.DictReader(file)]
    back = load.n_units * LARGER * sum(frames) / len(frames)
    work = sum(task.seconds for tasks in load.tasks.values() for task in tasks)
    sizes = [volume(amount) for amount in (2.0 * (n_parameters(config.model) or 0), vectors_of(size, n, config), back)]
    return [size.upper(), str(n), str(load.n_units), span(work), *sizes]


def limits(size: str, n: int, load: Load, config: RunConfig) -> list[str]:
    shared = seconds_of(load) / (NUMBERS[-1] // CARDS[size])
    store = vectors_of(size, n, config) / NETWORK
    parts = (load.loading, store, HANDLING * load.n_units, longest(load), shared)
    return [size.upper(), str(n), *(f"{seconds:.{0 if seconds > 10 else 2}f} s" for seconds in parts)]


def times(
    size: str, n: int, load: Load, ratios: Mapping[str, Sequence[float]], n_seeds: int
) -> tuple[list[str], list[float]]:
    """A row of simulated times with what bounds them most, and how many times the lower bound they are."""
    cells, over = [size.upper(), str(n)], []
    for n_gpus in NUMBERS:
        n_workers = n_gpus // CARDS[size]
        if not n_workers:
            cells.append("none")
            continue
        parts, most = bounds(load, n_workers, HANDLING)
        why, least = max(parts.items(), key=lambda part: part[1])
        # Strayed units may be shorter than planned: the bounds are of units as planned, and so is what they hold.
        plain = simulate(load, n_workers, {}, 0, HANDLING)
        assert least * 0.9999 <= plain <= most * 1.0001, (size, n, n_gpus, least, plain, most)
        found = sorted(simulate(load, n_workers, ratios, seed, HANDLING) for seed in range(n_seeds))
        over.append(found[len(found) // 2] / least)
        cells.append(f"{span(found[len(found) // 2])} ({why})")
    return cells, over


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def tables(n_seeds: int) -> None:
    ratios = strayed()
    every = {(size, n): load_of(size, n) for size in WIDTHS for n in (7, 100)}
    print_rows(AMOUNTS, [amounts(*key, *found) for key, found in every.items()])
    rows = [times(*key, load, ratios, n_seeds) for key, (load, _) in every.items()]
    header = ("model", "behaviors", *(f"{n} GPU{'s' if n > 1 else ''}" for n in NUMBERS))
    print_rows(header, [cells for cells, _ in rows])
    over = [ratio for _, many in rows for ratio in many]
    print(f"\nSimulated over the lower bound: {min(over):.2f} to {max(over):.2f}.")
    print_rows(LIMITS, [limits(*key, *found) for key, found in every.items()])


def one_sweep() -> None:
    """A sweep of 80 layers x 5 multipliers over 50 questions of Llama 2 70B, beside what a second worker costs."""
    parameters, rates = n_parameters("Llama-2-70b") or 0, gpu_rates(CARD, DTYPE)
    layers, multipliers, questions = 80, 4, 50  # multiplier 0 is the plain model
    print("| questions | tokens | steered | plain passes | seconds of compute, one card at a time |")
    print("|---|---|---|---|---|")
    for name, tokens, steered, sides in (("letters", 80, 2, 1), ("completions", 60, 20, 2)):
        passes = sides * (1 + steered * multipliers * (layers - 1) / (2 * tokens))
        seconds = questions * passes * 2 * parameters * tokens / (EFFICIENCY * rates.flops)
        print(f"| {questions} by {name} | {tokens} | {steered} | {passes:.1f} | {seconds:.0f} |")
    print(f"\nLoading {2 * parameters / 1e9:.0f} GB at {DISK / 1e9:.0f} GB/s: {2 * parameters / DISK:.0f} s a worker.")


# ---- measured here ---------------------------------------------------------------------------------------------


def asleep(unit: Unit, context: Context) -> object:
    import pandas as pd

    time.sleep(unit["seconds"])
    return pd.DataFrame({"x": range(50), "y": 0.5})


def sleeping(name: str, seconds: Sequence[float], *needs: str) -> Experiment:
    from caa_lens.report.page import Section

    units = [Unit.of(i=i, seconds=float(s)) for i, s in enumerate(seconds)]
    return Experiment(
        name=name,
        title=name,
        source="",
        units=lambda config: units,
        run=asleep,
        section=lambda frames, config: Section(title=name),
        needs=lambda config: needs,
    )


class Waiting:
    """Ray, with the seconds that the driver waits for it."""

    def __init__(self, ray: Any) -> None:
        self._ray, self.seconds = ray, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def wait(self, *words: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._ray.wait(*words, **more)
        finally:
            self.seconds += time.perf_counter() - began


class Clock:
    """Times a run from the end of its `warm` experiment on, during which workers start."""

    def __init__(self, engine: Any, n_warm: int) -> None:
        self._engine, self._n_warm = engine, n_warm
        self.began = self.ended = self.waited = 0.0
        self.n = 0

    def at(self, experiment: Experiment, unit: Unit) -> None:
        if not isinstance(self._engine._ray, Waiting):
            self._engine._ray = Waiting(self._engine._ray)

    def done(self, experiment: Experiment, unit: Unit) -> None:
        now, waited = time.perf_counter(), self._engine._ray.seconds
        if experiment.name != "warm":
            self.n, self.ended = self.n + 1, now
            self.waited = waited - self._before
            return
        self._n_warm -= 1
        if not self._n_warm:
            self.began, self._before = now, waited

    @property
    def took(self) -> float:
        return self.ended - self.began

    @property
    def handling(self) -> float:
        """Seconds of the driver's own, a result."""
        return (self.took - self.waited) / self.n


def by_ray(experiments: Sequence[Experiment], n_workers: int, n_warm: int) -> Clock:
    from experiments.running.ray_cluster import Demand
    from experiments.running.ray_workers import RayWorkers

    config = RunConfig(model="none", behaviors=("a",))
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        engine = RayWorkers(n_workers, device="none", demand=Demand(cpus=0.5))
        clock = Clock(engine, n_warm)
        with folder.held():
            folder.claim({"config": {}, "versions": {}}, {})
            run(experiments, config, folder, progress=clock, engine=engine)
    return clock


def measure() -> None:
    """The driver's time a result, and a run of sleeping units by Ray's workers beside its simulation."""
    rng = random.Random(0)
    lengths = {"first": (6, ("warm",)), "then": (24, ("first",)), "last": (10, ("then",))}
    many = {name: [rng.uniform(0.2, 1.5) for _ in range(n)] for name, (n, _) in lengths.items()}
    warm = sleeping("warm", [8.0] * 3)
    handling = by_ray([warm, sleeping("empty", [0.0] * 200, "warm")], 1, 3).handling
    print(f"the driver's own time for each of 200 results: {1e3 * handling:.1f} ms")
    for n_workers in (2, 3):
        load = Load(
            tasks={name: [Task(experiment=name, seconds=s) for s in seconds] for name, seconds in many.items()},
            needs={"first": (), "then": ("first",), "last": ("then",)},
        )
        expected = simulate(load, n_workers, {name: [1.0] for name in many}, 0, handling)
        chain = [sleeping(name, seconds, *lengths[name][1]) for name, seconds in many.items()]
        took = by_ray([warm, *chain], n_workers, 3).took
        print(f"40 sleeping units by {n_workers} workers: simulated {expected:.2f} s, took {took:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="one sweep of 70B instead")
    parser.add_argument("--measure", action="store_true", help="the driver and a run by Ray, here")
    parser.add_argument("--seeds", type=int, default=5, help="simulations of each cell; the middle one is shown")
    options = parser.parse_args()
    if options.sweep:
        one_sweep()
    elif options.measure:
        measure()
    else:
        tables(options.seeds)


if __name__ == "__main__":
    main()
