"""The terminal: tables whose numbers are never cut, numbers in words, and a bar of what is done.

A table is laid out for the width that there is. Columns of numbers keep their width; text folds. Columns with one value
throughout move into the caption. Where that is too wide, rows are grouped by the first column; where that is too wide
as well, every row becomes a line that the terminal may wrap.

The bar's line fits into 80 columns: numbers and times keep their room, and the name of the unit gets what is left. In a
log there is no bar; there, every experiment that is finished has a line.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from experiments.running.experiment import Experiment
from experiments.running.units import Unit

if TYPE_CHECKING:
    import pandas as pd

LOG_WIDTH = 160  # columns, where nobody looks on: a file or a pipe
TEXT_WIDTH = 16  # columns that a text is not folded below
GAP = 2  # columns between two of a table's
NUMBER = re.compile(r"([-+]?\d[\d.e+-]*( (k|M|G|T|s|min|h))?|\?|-?inf)?")


def make_console() -> Console:
    """For standard output; of a good width where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = max(LOG_WIDTH, console.width)
    return console


def show_table(caption: str, frame: "pd.DataFrame", console: Console) -> None:
    """Print a frame with nothing cut off."""
    columns = {str(name): [_cell(value) for value in frame[name]] for name in frame}
    numbers = [all(map(NUMBER.fullmatch, cells)) for cells in columns.values()]
    if len(frame) > 2:  # what is the same in all rows is said once
        same = [name for name, cells in columns.items() if len(set(cells)) == 1 and 0 < len(cells[0]) <= TEXT_WIDTH]
        if same and len(same) < len(columns) - 1:
            caption += f" ({', '.join(f'{name} {columns[name][0]}' for name in same)})"
            numbers = [number for name, number in zip(columns, numbers, strict=True) if name not in same]
            columns = {name: cells for name, cells in columns.items() if name not in same}
    console.print(Text(f"\n{caption}", style="italic"))
    rows = list(zip(*columns.values(), strict=True))
    if widths := _widths(columns, numbers, console.width):
        _print_rows(list(columns), rows, numbers, widths, console)
        return
    first, *others = columns
    groups = dict.fromkeys(columns[first])
    widths = _widths({name: columns[name] for name in others}, numbers[1:], console.width) if others else None
    if widths and len(groups) < len(rows):
        for i, group in enumerate(groups):
            console.print(Text(f"{first} {group}"))
            of_group = [row[1:] for row in rows if row[0] == group]
            _print_rows(others, of_group, numbers[1:], widths, console, header=i == 0)
        return
    for row in rows:
        line = ", ".join(f"{name} {cell}" for name, cell in zip(columns, row, strict=True))
        console.print(Text(f"  {line}"), soft_wrap=True)


def _print_rows(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[bool],
    widths: Sequence[int],
    console: Console,
    *,
    header: bool = True,
) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, GAP - 1, 0, 0), show_header=header)
    for name, number, width in zip(names, numbers, widths, strict=True):
        title = "\n".join(_words(name)) if cell_len(name) > width else name
        justify = "right" if number else "left"
        table.add_column(Text(title), justify=justify, no_wrap=number, overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(_at_hyphens(cell, width)) for cell, width in zip(row, widths, strict=True)))
    console.print(table)


def _widths(columns: Mapping[str, Sequence[str]], numbers: Sequence[bool], available: int) -> list[int] | None:
    """The width of every column; None where numbers and folded texts do not fit side by side."""
    wanted, least = [], []
    for (name, cells), number in zip(columns.items(), numbers, strict=True):
        widest, of_header = max(map(cell_len, cells), default=0), max(map(cell_len, _words(name)))
        longest_word = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        least.append(max(widest if number else min(longest_word, TEXT_WIDTH), of_header))
        wanted.append(max(widest, cell_len(name)))
    left = available - sum(least) - GAP * len(columns)
    if left < 0:
        return None
    widths = least
    while left > 0 and widths != wanted:
        for i in sorted(range(len(widths)), key=lambda i: wanted[i] - widths[i], reverse=True):
            if left > 0 and widths[i] < wanted[i]:
                widths[i] += 1
                left -= 1
    return widths


def _at_hyphens(cell: str, width: int) -> str:
    """A name that is too long for its column in lines that end at hyphens; texts of several words are folded later."""
    return cell if " " in cell or cell_len(cell) <= width else textwrap.fill(cell, width)


def _words(header: str) -> list[str]:
    return [word for word in re.split(r"\s+(?!%)|(?<=_)", header) if word] or [""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def show_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_number(number: float) -> str:
    """With about two digits and a unit: 12 k, 3.4 M."""
    if number < 1000:
        return f"{number:.0f}"
    power = min(int(math.log10(number)) // 3, 4)
    scaled = number / 1000**power
    return f"{scaled:.{0 if scaled >= 10 else 1}f} {' kMGT'[power]}"


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

    def done(self, experiment: Experiment, unit: Unit) -> None:
        name = experiment.name
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
