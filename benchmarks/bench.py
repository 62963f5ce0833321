"""What the engine saves, row by row, in one process and in a few minutes; kept in a history and compared with it.

    python benchmarks/bench.py                                  # all rows, into benchmarks/history.jsonl
    python benchmarks/bench.py --against benchmarks/history.jsonl   # and beside the latest run there
    python benchmarks/bench.py --only "sweep, letters" --quick
    python benchmarks/bench.py --list

A row is a naive way against the library's, on the same inputs, whose results are compared first. Both run in turns, in
CPU seconds of this process on one thread, which a busy machine disturbs less than the wall's clock. A run that is
interrupted keeps the rows that it had done, and the same command goes on with the others.

With `--against` the status is 1 where a ratio is worse by more than 15 %, or a row is gone or fails. How the spread of
the turns counts in this stands in `history.py`.
"""

import argparse
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from history import Change, Ratio, Run, compare, differences, failing, keep, read, unfinished
from timing import machine
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
HISTORY = Path(__file__).with_name("history.jsonl")
LIBRARIES = ("caa_lens", "torch", "transformers", "transformer_lens", "numpy")


class Skip(Exception):
    """A row that cannot be measured here, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        against: what the naive way is.
        prepare: gets `quick`, makes the inputs, runs and compares both ways once, and returns a turn: a function that
            gives what the naive way took and what ours took, for the same work.
        turns: how often the two are run.
        unit: what they took it of.
    """

    against: str
    prepare: Callable[[bool], Callable[[], tuple[float, float]]]
    turns: int = 5
    unit: str = "CPU seconds"


def measure(row: Row, quick: bool, turns: int, bar: tqdm) -> Ratio:
    turn = row.prepare(quick)
    ratios, ours = [], []
    for _ in range(turns):
        theirs, mine = turn()
        ratios.append(theirs / mine)
        ours.append(mine)
        bar.update()
    return Ratio(turns=tuple(ratios), ours=median(ours), unit=row.unit, against=row.against)


def started(wanted: Sequence[str], quick: bool) -> Run:
    """A run of today, with no rows yet."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not there"
    settings = {"quick": quick, "threads": torch.get_num_threads()}
    sources = hashlib.sha256()
    for file in sorted([*(ROOT / "caa_lens").rglob("*.py"), *Path(__file__).parent.glob("bench*.py")]):
        sources.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    told = [sources.hexdigest(), machine(), *map(str, versions.items()), *map(str, settings.items())]
    return Run(
        date=datetime.now(UTC).isoformat(),
        commit=commit(),
        identity=hashlib.sha256("\n".join(told).encode()).hexdigest()[:16],
        machine=machine(),
        versions=versions,
        settings=settings,
        wanted=tuple(wanted),
    )


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "caa_lens", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(run: Run) -> None:
    print(f"\n{run.commit}, {run.date[:19]}, {run.machine}, torch {run.versions.get('torch')}\n")
    print("| row | ratio (slowest and fastest turn) | ours | against |\n|---|---|---|---|")
    for name, row in run.rows.items():
        print(f"| {name} | {row} | {row.ours:.3g} {row.unit} | {row.against} |")


def show_changes(run: Run, changes: Sequence[Change]) -> None:
    for before in {change.before.date: change.before for change in changes if change.before}.values():
        print(f"\nbeside {before.commit} of {before.date[:19]}" + ":" * bool(differences(run, before)))
        for difference in differences(run, before):
            print(f"    {difference}")
    print("\n| row | then | now | change | |\n|---|---|---|---|---|")
    for one in changes:
        share = "" if one.share is None else f"{one.share:+.0%}"
        print(f"| {one.name} | {one.then or ''} | {one.now or ''} | {share} | {one.verdict} |")


def main(rows: Mapping[str, Row], words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some rows, by name")
    parser.add_argument("--quick", action="store_true", help="two turns, of less text: shows that it runs")
    parser.add_argument("--history", type=Path, default=HISTORY, help="where the run is kept")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a history to compare with; may be the same")
    parser.add_argument("--list", action="store_true", help="the rows' names")
    options = parser.parse_args(words)
    if options.list:
        print("\n".join(rows))
        return 0
    if unknown := [name for name in options.only or () if name not in rows]:
        parser.error(f"no row is called {', '.join(map(repr, unknown))}: expected some of {', '.join(map(repr, rows))}")
    if options.against and not options.against.exists():
        parser.error(f"{options.against} is not there: expected a history as an earlier run wrote it")
    torch.set_num_threads(1)

    run = started([name for name in rows if name in (options.only or rows)], options.quick)
    others = read(options.against) if options.against else []
    if (earlier := unfinished(options.history, run)) is not None:
        run = earlier
        print(f"going on with the run of {run.date[:19]}: {', '.join(run.rows)} done")
    problems: dict[str, str] = {}

    def do(names: Sequence[str], times: int) -> None:
        nonlocal run
        turns = {name: times * (2 if options.quick else rows[name].turns) for name in names}
        with tqdm(total=sum(turns.values()), unit="turn") as bar:
            for name in names:
                bar.set_description(name)
                problems.pop(name, None)
                try:
                    run = run.with_row(name, measure(rows[name], options.quick, turns[name], bar))
                except Exception as error:
                    problems[name] = f"{'skipped: ' * isinstance(error, Skip)}{error or type(error).__name__}"
                    continue
                keep(options.history, run)

    try:
        do(run.left, 1)
        again: list[str] = []
        if others:
            again = [one.name for one in compare(run, others, list(rows)) if one.verdict == "unclear"]
            if again:
                print(f"unclear, measured again with twice the turns: {', '.join(again)}")
                do(again, 2)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(run.rows)} rows are kept in {options.history}, and the same command goes on")
        return 130
    show(run)
    for name, problem in problems.items():
        print(f"{name}: {problem}")
    failed = [name for name, problem in problems.items() if not problem.startswith("skipped: ")]
    if options.against:
        changes = compare(run, others, list(rows), again)
        show_changes(run, changes)
        failed += [one.name for one in failing(changes) if one.name not in problems]
    if failed:
        print(f"\nworse, gone or not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    from bench_rows import ROWS

    sys.exit(main(ROWS))
