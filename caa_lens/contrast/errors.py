"""What may be wrong with data, and how it is told: where, what was found, what was expected, what to do."""

import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from caa_lens.arguments import describe
from caa_lens.file_kinds import printable

SHOWN = 5  # problems, rows or groups that one message lists
OnBad = Literal["raise", "drop"]
T = TypeVar("T")


class FieldError(ValueError):
    """A field that does not fit (`None`: the whole row or file), what was found and what was expected."""

    def __init__(self, field: str | None, found: str, expected: str) -> None:
        super().__init__(f"{field + ': ' if field else ''}found {found}, expected {expected}")
        self.field, self.found, self.expected = field, found, expected


class SchemaError(FieldError):
    """A row whose keys belong to no known format."""


Problem = tuple[int | None, FieldError]


class ContrastFileError(ValueError):
    """Data that cannot be read. Its message lists the first five problems; `problems` holds all of them.

    `file` is the file, or what was given in its place ("DataFrame"). `line`, `field`, `found` and `expected` are those
    of the first problem. Lines are counted from 1, and so are the items of a JSON list and the rows of a table without
    lines. `None` stands for the whole file, or the whole row.
    """

    def __init__(self, file: str, problems: Sequence[Problem], *, unit: str = "line", n_rows: int = 0) -> None:
        self.file, self.problems = file, tuple(problems)
        self.line, first = self.problems[0]
        self.field, self.found, self.expected = first.field, first.found, first.expected
        texts = []
        for line, error in self.problems[:SHOWN]:
            separator = ", " if error.field else ": "
            texts.append(f"{unit} {line}{separator}{error}" if line else str(error))
        remedy = "; on_bad='drop' leaves such rows out" if n_rows > len(self.problems) else ""
        if len(self.problems) == 1:
            super().__init__(f"{file}: {texts[0]}{remedy}")
        else:
            of = f" in {n_rows} rows" if n_rows else ""
            shown = f" (the first {SHOWN} are shown)" if len(self.problems) > SHOWN else ""
            super().__init__("\n  ".join([f"{file}: {len(self.problems)} problems{of}{shown}{remedy}", *texts]))


class DroppedRowsWarning(UserWarning):
    """Rows that are no pairs were left out, as `on_bad="drop"` asks: how many, which, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The rows of a file, or of what was given in its place, before anybody asked what they mean."""

    of: str
    """What messages call it."""
    unit: str
    """What its rows are called and counted as: line, item, row, pair."""
    rows: Sequence[tuple[int | None, object]]
    """Each row's number and its value; what is no row is the error that says why."""
    columns: tuple[str, ...] | None = None
    """Of a table: its columns in order, those that stand twice too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[T]):
    """What was made of the rows of a source, and what could not be."""

    source: Source
    kept: tuple[T, ...]
    problems: tuple[Problem, ...]

    def settled(self, on_bad: OnBad = "raise", *, stacklevel: int = 2) -> tuple[T, ...]:
        """All rows; or with "drop" those that could be read, with a `DroppedRowsWarning` about the others.

        Raises:
            ContrastFileError: there are problems; with "drop", no row is left, or the problem is the whole file's.
        """
        n_rows, source = len(self.source.rows), self.source
        if not self.problems:
            return self.kept
        if on_bad == "raise" or not self.kept or any(line is None for line, _ in self.problems):
            no_columns = source.columns is not None and any(
                isinstance(error, SchemaError) for _, error in self.problems
            )
            raise ContrastFileError(
                source.of,
                self.problems,
                unit=source.unit,
                n_rows=0 if no_columns else n_rows,  # of a table whose columns are not understood, no row is left
            )
        groups: dict[tuple[str | None, str], list[Problem]] = defaultdict(list)
        for problem in self.problems:
            groups[problem[1].field, problem[1].expected].append(problem)
        told = sorted(groups.values(), key=len, reverse=True)
        why = [
            numbered(source.unit, [n for n, _ in some]) + (", " if some[0][1].field else ": ") + str(some[0][1])
            for some in told[:SHOWN]
        ]
        if told[SHOWN:]:
            n_others, n_reasons = sum(map(len, told[SHOWN:])), len(told) - SHOWN
            reasons = "another reason" if n_reasons == 1 else f"{n_reasons} other reasons"
            why.append(f"and {n_others} row{'s' * (n_others > 1)} for {reasons}")
        head = f"{source.of}: {len(self.problems)} of {n_rows} rows are no pairs and were left out"
        warnings.warn("\n  ".join([head, *why]), DroppedRowsWarning, stacklevel=stacklevel)
        return self.kept


def numbered(unit: str, numbers: Sequence[int | None]) -> str:
    """`line 3`, or `lines 3, 5, 8, 9, 11 and 7 more`."""
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"{unit}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:SHOWN]))}{more}"


def shown(value: object) -> str:
    """A value of somebody's data, on one line and short."""
    text = printable(json.dumps(value, ensure_ascii=False, default=repr), most=10**6)
    return text if len(text) <= 60 else text[:57] + "..."


def check_on_bad(on_bad: object) -> None:
    """Raises `ValueError` for anything but "raise" and "drop"."""
    if not isinstance(on_bad, str) or on_bad not in ("raise", "drop"):
        raise ValueError(
            f"on_bad must be 'raise' or 'drop' (rows that are no pairs are left out), got {describe(on_bad)}"
        )


def check_columns(columns: object) -> None:
    """Raises `TypeError` or `ValueError` for anything but a mapping from our fields to a file's columns."""
    ours = ("question", "positive", "negative")
    if columns is None:
        return
    wanted = "columns={'question': ..., 'positive': ..., 'negative': ...}, each the name of a column of yours"
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        raise TypeError(f"expected {wanted}, got {describe(columns)}")
    if unknown := [key for key in columns if key not in ours]:
        around = set(columns.values()) <= set(ours)
        raise ValueError(
            f"columns has the key {unknown[0]!r}: expected {wanted}"
            + ("; here they are the other way round" if around else "")
        )
    if ("positive" in columns) != ("negative" in columns):
        raise ValueError(f"columns names one of the two answers only: expected {wanted}")
