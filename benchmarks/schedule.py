"""How long a run takes, from the seconds of its units: two bounds, and a simulation of the runner.

No run ends before `least`: the loading of a model, and the largest of the work shared by all
workers, the longest chain of units that wait for each other, and the driver's time for all results. None that keeps its
workers busy ends after `most`: shared work and longest chain one after the other (Graham 1969), with a model loaded at
every link, and the driver. The simulation is of the runner itself, unit by unit: who waits for whom, one driver, models
that are loaded again.
"""

import heapq
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A unit in the plan: its expected seconds without loading, the model that it wants, seconds for a copy of it."""

    experiment: str
    seconds: float
    model: str = "chat"
    copying: float = 0.0


@dataclass(slots=True, kw_only=True)
class Load:
    """A whole run: tasks by experiment, in the catalogue's order, and who waits for whom."""

    tasks: dict[str, list[Task]]
    needs: Mapping[str, Sequence[str]]
    loading: float = 0.0
    """Seconds until a worker has a model."""
    by_driver: set[str] = field(default_factory=set)

    @property
    def n_units(self) -> int:
        return sum(map(len, self.tasks.values()))


def seconds_of(load: Load) -> float:
    return sum(task.seconds + task.copying for tasks in load.tasks.values() for task in tasks)


def longest(load: Load, more: float = 0.0) -> float:
    """Seconds of the longest chain: of every experiment the longest unit, behind what it needs; and `more` a link."""
    ends: dict[str, float] = {}
    for name, tasks in load.tasks.items():
        before = max((ends[needed] for needed in load.needs[name]), default=0.0)
        ends[name] = before + max((task.seconds + task.copying + more for task in tasks), default=0.0)
    return max(ends.values())


def bounds(load: Load, n_workers: int, handling: float) -> tuple[dict[str, float], float]:
    """What no run is shorter than, by what bounds it, and what none is longer than."""
    work = seconds_of(load)
    parts = {
        "work": load.loading + work / n_workers,
        "chain": load.loading + longest(load),
        "driver": load.loading + handling * load.n_units,
    }
    # A unit may find a worker that has still to load its model, or has loaded another for the unit before.
    others = {task.model if not task.copying else "copy" for tasks in load.tasks.values() for task in tasks} - {"chat"}
    again = 2 * load.loading * len(others)
    return parts, again + work / n_workers + longest(load, load.loading) + handling * load.n_units


def simulate(load: Load, n_workers: int, ratios: Mapping[str, Sequence[float]], seed: int, handling: float) -> float:
    """Seconds of a run by the runner's own rules, units' times strayed as those that were measured."""
    rng = random.Random(seed)
    pooled = [ratio for many in ratios.values() for ratio in many] or [1.0]
    waiting = {name: deque(tasks) for name, tasks in load.tasks.items()}
    running = dict.fromkeys(load.tasks, 0)
    models = ["none"] * n_workers
    idle = list(range(n_workers))
    ending: list[tuple[float, int, str]] = []  # when, which worker (-1: the driver's thread), of which experiment
    now, driver_free, thread_free = 0.0, 0.0, True
    while any(waiting.values()) or ending:
        for name, units in waiting.items():
            if any(waiting[needed] or running[needed] for needed in load.needs[name]):
                continue
            while units and (thread_free if name in load.by_driver else idle):
                task = units.popleft()
                running[name] += 1
                if name in load.by_driver:
                    thread_free = False
                    heapq.heappush(ending, (now + task.seconds, -1, name))
                    continue
                worker = heapq.heappop(idle)  # the first of them, so that those come last that have no model yet
                takes = task.copying + task.seconds * rng.choice(ratios.get(name) or pooled)
                if task.copying:
                    models[worker] = "none"
                elif task.seconds and models[worker] != task.model:
                    takes += load.loading
                    models[worker] = task.model
                heapq.heappush(ending, (now + takes, worker, name))
        now, worker, name = heapq.heappop(ending)
        now = driver_free = max(now, driver_free) + handling
        running[name] -= 1
        if worker < 0:
            thread_free = True
        else:
            heapq.heappush(idle, worker)
    return now
