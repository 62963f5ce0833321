"""Tables, and other data in memory, to rows: CSV, TSV, parquet, frames, data sets, lists.

A cell of a CSV is the text that stands there: `NA`, `None` and `1` are texts, an empty cell is an empty text. Rows of a
CSV are called by the line on which they begin, other rows by their number, counted from 1.
"""

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from caa_lens.contrast.errors import FieldError, OnBad, SchemaError, Source
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.rows import OURS, is_triple, schema_of
from caa_lens.extras import needed_for

COMMA, TAB, SEMICOLON = ",", "\t", ";"


def csv_source(of: str, text: str, *, tabs: bool, columns: Mapping[str, str] | None = None) -> Source:
    """The rows of a text of comma-, semicolon- or tab-separated values, whose first line names the columns.

    Raises:
        FieldError: the quotes do not fit, so that no row can be told from the next.
    """
    separators = (TAB, COMMA, SEMICOLON) if tabs else (COMMA, SEMICOLON, TAB)
    header = {one: _header(text, one) for one in separators}
    chosen = next((one for one in separators if _are_known(header[one], columns)), None)
    chosen = chosen or max(separators, key=lambda one: len(header[one]))
    names: list[str] | None = None
    rows: list[tuple[int | None, object]] = []
    for line, cells in _lines(text, chosen):
        if names is None:
            names = [name.strip() for name in cells]
            continue
        extra = cells[len(names) :]
        if len(cells) < len(names) or any(cell.strip() for cell in extra):
            found, expected = f"{len(cells)} cells", f"{len(names)}, as in the first line: quote what holds a separator"
            rows.append((line, FieldError(None, found, expected)))
        else:
            rows.append((line, dict(zip(names, cells, strict=False))))
    return Source(of=of, unit="line", rows=rows, columns=tuple(names or ()))


def _lines(text: str, separator: str) -> Iterable[tuple[int, list[str]]]:
    """Every row that is not blank, with the line on which it begins."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        line = 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        found = f"quotes that do not fit ({error}) in the row from line {line} on"
        raise FieldError(None, found, 'a quoted cell with its quotes doubled, "like ""this"""') from None
    finally:
        csv.field_size_limit(before)


def _header(text: str, separator: str) -> list[str]:
    """The first row, as it would be with a separator; none where that cannot be the separator."""
    try:
        return next(iter(_lines(text, separator)), (1, []))[1]
    except FieldError:
        return []


def _are_known(names: Sequence[str], columns: Mapping[str, str] | None) -> bool:
    try:
        schema_of(names, columns)
    except SchemaError:
        return False
    return True


def parquet_source(of: str, data: bytes) -> Source:
    """The rows of a parquet file.

    Raises:
        FieldError: it is damaged.
    """
    with needed_for("parquet files"):
        import pyarrow.parquet

    try:
        return source_of(pyarrow.parquet.read_table(io.BytesIO(data)), of=of)
    except Exception as error:  # pyarrow has errors of its own for every way in which a file can be broken
        raise FieldError(None, f"a parquet table that cannot be read ({error})", "a whole one") from None


def source_of(data: Any, *, of: str | None = None, on_bad: OnBad = "raise") -> Source:
    """The rows of a frame (pandas, polars), a table of Arrow, a `datasets.Dataset`, or a list of pairs.

    Args:
        of: what messages call it, by default its type.
        on_bad: whether what is no pair in a list is an error here, or a row like others.

    Raises:
        TypeError: for what holds no rows, with what to write instead.
    """
    of = of or type(data).__name__
    if isinstance(data, Mapping):
        if any(hasattr(part, "column_names") for part in data.values()):
            parts = ", ".join(map(repr, data))
            raise TypeError(f"got a {of} of the splits {parts}: choose one, as in data[{next(iter(data))!r}]")
        raise TypeError(f"got a {of}, {EXPECTED}; of columns, pandas.DataFrame(...)")
    if hasattr(data, "to_pylist") and hasattr(data, "column_names"):  # pyarrow
        return _table(of, data.column_names, zip(*(column.to_pylist() for column in data.columns), strict=True))
    if hasattr(data, "columns") and hasattr(data, "rows"):  # polars
        return _table(of, data.columns, data.rows())
    if hasattr(data, "columns") and hasattr(data, "itertuples"):  # pandas
        return _table(of, [str(name) for name in data.columns], data.itertuples(index=False, name=None))
    if hasattr(data, "features") and hasattr(data, "column_names"):  # datasets, also streamed
        rows = list(data)
        names = data.column_names or (list(rows[0]) if rows else [])
        return _table(of, names, ([row.get(name) for name in names] for row in rows))
    if isinstance(data, str | ContrastPair) or not isinstance(data, Iterable) or getattr(data, "ndim", 1) == 0:
        load = "; a file is read by ContrastSet.load" if isinstance(data, str) else ""
        raise TypeError(f"got a {of}, {EXPECTED}{load}")
    return Source(of="pairs", unit="pair", rows=[(n, _pair(given, n, on_bad)) for n, given in enumerate(data, start=1)])


def _pair(given: object, n: int, on_bad: OnBad) -> object:
    """One of a list of pairs as a row."""
    if isinstance(given, ContrastPair):
        return dict(zip(OURS, (given.question, given.positive, given.negative), strict=True))
    if isinstance(given, Mapping):
        return given
    is_one = isinstance(given, str) or getattr(given, "ndim", 1) == 0
    texts = tuple(given) if isinstance(given, Iterable) and not is_one else ()
    if len(texts) == 3 and is_triple(texts):
        return dict(zip(OURS, texts, strict=True))
    shown = repr(given)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if on_bad == "drop":
        return FieldError(
            None, shown, "(question, positive, negative), each a text; a question may be a list of messages"
        )
    remedy = ""
    if len(texts) == 2 and all(isinstance(text, str) for text in texts):
        remedy = (
            "; two texts are a pair with the question that both answer, as in [(question, a, b) for a, b in pairs], or "
            "where they begin alike, as in [{'positive': a, 'negative': b} for a, b in pairs]"
        )
    raise TypeError(f"pair {n}: got {shown}, {EXPECTED}{remedy}")


def _table(of: str, names: Iterable[str], rows: Iterable[Sequence[Any]]) -> Source:
    names = tuple(names)
    first = {name: names.index(name) for name in names}  # of a name that stands twice, which is an error if it is used
    return Source(
        of=of,
        unit="row",
        rows=[(n, {name: _plain(row[i]) for name, i in first.items()}) for n, row in enumerate(rows, start=1)],
        columns=names,
    )


def _plain(value: Any) -> Any:
    """Arrays of numpy, as pandas has lists, as lists; everything else as it is."""
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0:
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


EXPECTED = (
    "expected a list of (question, positive, negative), each a text, or of mappings with these three keys; or a data "
    "frame or a data set with such columns"
)
