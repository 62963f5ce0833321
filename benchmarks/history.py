"""The history of `bench.py`: how many times faster than a naive way each row was, by commit and machine.

A file of JSON lines, one a run, oldest first. A run that was interrupted stands in it with the rows that it had done.

How two runs are compared. A row's ratio is the median of its turns; its spread is from the slowest turn to the
fastest. A row is *worse* when its ratio fell by more than 15 % and its fastest turn is below the other run's slowest.
Where it fell by more than 15 % and the turns overlap, it is *unclear*: `bench.py` measures it once more with twice the
turns, and then the medians decide.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from caa_lens.atomic_files import write_atomically

WORSE = 0.15  # a fall of a ratio that is shown and fails


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How much more a naive way takes than the library: above 1 the library is better.

    Attributes:
        turns: the ratio of each turn, in which both ways ran one after the other.
        ours: the median of what the library took, in `unit`.
        unit: "CPU seconds", or "weights" for memory.
        against: what the naive way is.
    """

    turns: tuple[float, ...]
    ours: float
    unit: str
    against: str

    @property
    def median(self) -> float:
        return median(self.turns)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({min(self.turns):.3g} to {max(self.turns):.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of the history.

    Attributes:
        date: when it began, ISO 8601 in UTC.
        commit: of the sources, with a `+` where they were changed since.
        identity: what has to be the same for a run to be gone on with: a hash of sources, machine, versions, settings.
        versions: of Python and the libraries below.
        settings: the sizes of the rows; runs of other sizes are not compared.
        wanted: names of the rows that were asked for.
        rows: those that are done.
    """

    date: str
    commit: str
    identity: str
    machine: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    wanted: tuple[str, ...]
    rows: Mapping[str, Ratio] = field(default_factory=dict)

    @property
    def left(self) -> list[str]:
        return [name for name in self.wanted if name not in self.rows]

    def with_row(self, name: str, ratio: Ratio) -> "Run":
        return replace(self, rows={**self.rows, name: ratio})


def read(path: Path) -> list[Run]:
    """The runs of a file, oldest first; none where there is no file.

    Raises:
        ValueError: for a line that is no run, with its number.
    """
    runs = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            rows = {name: Ratio(**{**row, "turns": tuple(row["turns"])}) for name, row in told["rows"].items()}
            if not all(row.turns and min(row.turns) > 0 for row in rows.values()):
                raise ValueError("a row without a ratio above 0")
            runs.append(Run(**{**told, "wanted": tuple(told["wanted"]), "rows": rows}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: expected a run as bench.py writes it ({error})") from error
    return runs


def write(path: Path, runs: Sequence[Run]) -> None:
    text = "".join(json.dumps(asdict(run)) + "\n" for run in runs)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def keep(path: Path, run: Run) -> None:
    """Put a run in the place of what the file has of it, or behind all others."""
    runs = [one for one in read(path) if (one.date, one.identity) != (run.date, run.identity)]
    write(path, [*runs, run])


def unfinished(path: Path, like: Run) -> Run | None:
    """The latest run in a file, if it is of the same sources, machine and rows, and has rows left to do."""
    for run in reversed(read(path)):
        if run.identity == like.identity and run.wanted == like.wanted:
            return run if run.left else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A row beside its latest counterpart.

    Attributes:
        verdict: "same", "better", "worse" or "unclear" (see the module); "new" without a counterpart, "gone" without
            a row today, "not asked for", or "other sizes".
        before: the run that the counterpart is of.
    """

    name: str
    verdict: str
    now: Ratio | None = None
    then: Ratio | None = None
    before: Run | None = None

    @property
    def share(self) -> float | None:
        """The change of the ratio: -0.2 is a fifth less."""
        return self.now.median / self.then.median - 1 if self.now and self.then else None


def judge(now: Ratio, then: Ratio, *, medians_alone: bool = False) -> str:
    """ "same", "better", "worse" or "unclear": see the module."""
    share = now.median / then.median - 1
    if share < -WORSE:
        return "worse" if medians_alone or max(now.turns) < min(then.turns) else "unclear"
    return "better" if share > WORSE and min(now.turns) > max(then.turns) else "same"


def compare(run: Run, others: Sequence[Run], known: Sequence[str], medians_alone: Sequence[str] = ()) -> list[Change]:
    """Every row of a run and of the others, each against the latest other run that has it.

    A run on the same machine comes before one on another.

    Args:
        known: the rows that there are today.
        medians_alone: rows that were measured a second time, whose medians decide.
    """
    others = [one for one in others if (one.date, one.identity) != (run.date, run.identity)]
    changes = []
    for name in dict.fromkeys([*run.wanted, *(name for one in others for name in one.rows)]):
        having = [one for one in others if name in one.rows]
        like = [one for one in having if one.settings == run.settings]
        before = next((one for one in reversed(like) if one.machine == run.machine), like[-1] if like else None)
        now, then = run.rows.get(name), before.rows[name] if before else None
        if name not in known:
            verdict = "gone"
        elif now is None:
            verdict = "not asked for" if name not in run.wanted else "not measured"
        elif then is None:
            verdict = "other sizes" if having else "new"
        else:
            verdict = judge(now, then, medians_alone=name in medians_alone)
        changes.append(Change(name=name, verdict=verdict, now=now, then=then, before=before))
    return changes


def failing(changes: Sequence[Change]) -> list[Change]:
    """What a comparison fails for: rows that are worse, gone, or could not be measured."""
    return [change for change in changes if change.verdict in ("worse", "gone", "not measured")]


def differences(run: Run, before: Run) -> list[str]:
    """What else is not the same between two runs, in words."""
    found = []
    if before.machine != run.machine:
        found.append(f"the machine was another: {before.machine}, now {run.machine}")
    for name in sorted({*run.versions, *before.versions}):
        then, now = before.versions.get(name, "not there"), run.versions.get(name, "not there")
        if then != now:
            found.append(f"{name} was {then}, now {now}")
    return found
