"""What a run says in the terminal: tables whose numbers are never cut, outcomes, and the plan of `--dry-run`.

A table is laid out for the width that there is. Columns of numbers keep their width; text folds. Columns with one value
throughout move into the caption. Where that is too wide, rows are grouped by the first column; where that is too wide
as well, every row becomes a line that the terminal may wrap.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.context import Context
from experiments.experiment import Cost, Experiment
from experiments.plan import (
    BYTES,
    Rates,
    disk_bytes,
    memory_bytes,
    n_parameters,
    scratch_bytes,
    show_duration,
    show_number,
    unit_costs,
)
from experiments.run_folder import RunFolder
from experiments.runner import Outcome, skip_reasons
from experiments.settings import RunConfig

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 90  # rows of a table that are printed; the report has all
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
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def show_outcome(outcome: Outcome, folder: RunFolder, console: Console) -> None:
    """What was found, and the tables cell by cell."""
    from caa_lens.report.runs import load_section

    one = outcome.experiment
    console.print(Text(f"\n{one.name}: {one.title} ({one.source})", style="bold"))
    if outcome.skipped:
        console.print(Text(f"skipped: {outcome.skipped}"), soft_wrap=True)
        return
    if outcome.failed:
        console.print(Text(f"failed: {outcome.failed}", style="red"), soft_wrap=True)
        if outcome.traceback:
            console.print(Text(f"traceback in {outcome.traceback}", style="red"), soft_wrap=True)
        return
    if outcome.unfinished:
        console.print(Text(f"not complete: {outcome.unfinished}", style="yellow"), soft_wrap=True)
    file = folder.section_file(one.name)
    section = load_section(file)
    for line in section.found:
        console.print(Text(f"- {line}"))
    for caption, frame in section.captioned_tables():
        if len(frame) > LONGEST:
            line = f"{caption}: {len(frame)} rows, too many to print here; they are in the report, and in {file}"
            console.print(Text(line, style="italic"), soft_wrap=True)
        elif not len(frame):
            why = ": the paper has none of these cells" if "paper" in caption else ""
            console.print(Text(f"{caption}: no rows{why}", style="italic"))
        else:
            show_table(caption, frame, console)


def disk_said(config: RunConfig, parameters: int, experiments: Sequence[Experiment]) -> str:
    """What a run needs on the disk, in a sentence."""
    stored, scratch = disk_bytes(config), scratch_bytes(config, parameters, experiments) / 1e9
    two = f" and of the base model {config.base_model}" if config.base_model else ""
    size = "of unknown size before they are here" if stored is None else f"{stored / 1e9:.1f} GB"
    said = f"On the disk: {size} for the weights of {config.model}{two}, less what is here already"
    return said + (f"; and {scratch:.1f} GB in the run folder for a moment, for merged adapters." if scratch else ".")


def show_plan(
    experiments: Sequence[Experiment],
    config: RunConfig,
    folder: RunFolder,
    workers: int,
    rates: Rates,
    console: Console,
) -> None:
    """What `--dry-run` says: units, forwards, tokens and time by experiment, memory, and requests to the judge."""
    import pandas as pd

    parameters = n_parameters(config.model)
    skipped = skip_reasons(experiments, config)
    able = [one for one in experiments if one.name not in skipped]
    costs = unit_costs(able, Context(config, folder))
    rows, every = [], Cost()
    total = 0.0
    for one in able:
        of_one = [cost for (name, _), cost in costs.items() if name == one.name]
        cost = sum(of_one, Cost())
        seconds = sum(rates.seconds(each, parameters or 0, config.dtype) for each in of_one)
        total, every = total + seconds, every + cost
        row = {"experiment": one.name, "paper": one.source, "units left": len(of_one)}
        row |= {"forwards": show_number(cost.forwards), "tokens": show_number(cost.tokens)}
        rows.append(row | {"time": show_duration(seconds) if parameters else "?"})

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    show_table(f"{config.model} into {folder.path}", pd.DataFrame(rows), console)
    for name, reason in skipped.items():
        say(f"{name} is skipped: {reason}")
    if config.stand_ins:
        say(
            f"The paper's data are not all here yet: blank questions stand in for {', '.join(config.stand_ins)}, as "
            "many as the paper has. `caa-lens data fetch` gets all of them; a run needs them."
        )
    if every.requests:
        say(f"{show_number(every.requests)} requests to the judge {config.judge}; their time is not in the estimate.")
    if parameters is None:
        say(f"No estimate of time and memory: the size of {config.model} is not known before it is loaded.")
    else:
        neediest = max(able, key=lambda one: one.weights(config)) if able else None
        memory = memory_bytes(config, parameters, able) / 1e9
        why = f", for {neediest.name}" if neediest and neediest.weights(config) > 1 else ""
        of_weights = f" ({BYTES[config.dtype] * parameters / 1e9:.1f} GB are its weights)"
        say(
            f"{show_number(parameters)} parameters as {config.dtype}: about {memory:.1f} GB a process{why}"
            f"{of_weights}, {workers} process{'es' if workers > 1 else ''}. Time about "
            f"{show_duration(total / workers)}: two operations a parameter and token at half of "
            f"{show_number(rates.flops)}FLOP/s, and reading the weights for every generated token at "
            f"{show_number(rates.bandwidth)}B/s ({rates.source}); tokens estimated from characters."
        )
        if rates.memory is not None and memory > rates.memory / 1e9:
            say(f"That is more than the {rates.memory / 1e9:.0f} GB of this card: a model is on one device.")
        say(disk_said(config, parameters, able))
    say("Nothing was written.")
