"""A bar over units, weighted by what each takes, with the time left.

The line fits into 80 columns: numbers and times keep their room, and the name of the unit gets what is left. In a log
there is no bar; there, every experiment that is finished has a line.
"""

from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from experiments.experiment import Experiment, Unit
from experiments.run_folder import RunFolder


class UnitProgress:
    """Use as a context manager; `weights` are the seconds that units are expected to take, in any unit of time."""

    def __init__(self, console: Console, weights: Mapping[tuple[str, Unit], float]) -> None:
        self._weights = dict(weights)
        self._n_left = len(weights)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=8 if console.width < 100 else 30),
            TextColumn("{task.percentage:>3.0f} %, {task.fields[left]} left,"),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("to go"),
            console=console,
            expand=True,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task("", total=sum(self._weights.values()) or 1, left=self._n_left)

    def __enter__(self) -> "UnitProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def at(self, experiment: Experiment, unit: Unit) -> None:
        self._bar.update(self._task, description=f"{experiment.name} {unit.name}")

    def look(self, folder: RunFolder) -> None:
        """Count what other processes have finished."""
        for name, unit in list(self._weights):
            if folder.is_done(name, unit):
                self._count(name, unit)

    def done(self, experiment: Experiment, unit: Unit) -> None:
        self._count(experiment.name, unit)

    def _count(self, name: str, unit: Unit) -> None:
        weight = self._weights.pop((name, unit), None)
        if weight is not None:
            self._n_left -= 1
            self._bar.update(self._task, advance=weight, left=self._n_left)
            if not self._bar.console.is_terminal and not any(other == name for other, _ in self._weights):
                self._log(name)

    def _log(self, name: str) -> None:
        task = self._bar.tasks[0]
        gone, to_go = (None if t is None else timedelta(seconds=round(t)) for t in (task.elapsed, task.time_remaining))
        self._bar.console.print(
            f"{name} is finished: {task.percentage:.0f} % of the run, {self._n_left} units left, {gone or 'no time'} "
            f"gone, {to_go or 'unknown'} to go",
            soft_wrap=True,
            highlight=False,
        )
