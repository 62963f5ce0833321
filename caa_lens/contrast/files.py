"""Files of contrast pairs, and of open-ended prompts: every public form is read, and one error says what is wrong.

| file | its rows |
|---|---|
| `.jsonl`, `.json` | one JSON object a line, or a JSON list of them |
| `.csv`, `.tsv` | the first line names the columns; separated by commas, semicolons or tabs |
| `.parquet` | those of the table |
| `.txt` | of open-ended prompts: one a line |

What the columns mean says `rows`. Texts are UTF-8, with or without a byte order mark, or UTF-16 with one; any file may
be packed by gzip (`.jsonl.gz`). A file that is something else is told what it is. Rows become pairs through the
caller's `make`: what a pair is, `contrast_pair` knows.
"""

import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from caa_lens.atomic_files import write_atomically
from caa_lens.contrast.errors import ContrastFileError, FieldError, OnBad, Reading, Source
from caa_lens.contrast.messages import Question
from caa_lens.contrast.rows import pairs_of, questions_of, schema_of
from caa_lens.contrast.tables import csv_source, parquet_source
from caa_lens.file_kinds import MAX_BYTES, expanded, other_than_text, printable

PAPER_SETS = (  # what somebody may ask for by name, and has to fetch first; see `caa_lens.paper`
    "coordinate-other-ais",
    "corrigible-neutral-HHH",
    "hallucination",
    "myopic-reward",
    "survival-instinct",
    "sycophancy",
    "refusal",
)
PAPER_QUESTIONS = ("mmlu", "truthfulqa")
VECTORS = {".safetensors", ".pt", ".gguf"}
TABLES = {".csv", ".tsv", ".parquet"}
SHEETS = {".xlsx", ".xls", ".ods"}
EXPECTED = "contrast pairs in a .json, .jsonl, .csv, .tsv or .parquet file"
_OPEN_ENDED = "_open_ended"

T = TypeVar("T")


def bundled_names() -> list[str]:
    """Names of the contrast sets that come with the package."""
    entries = [Path(entry.name) for entry in (files("caa_lens.contrast") / "data").iterdir()]
    return sorted(e.stem for e in entries if e.suffix == ".jsonl" and not e.stem.endswith(_OPEN_ENDED))


def locate(name_or_path: str | Path, *, open_ended: bool = False) -> Traversable:
    """The file of a bundled name (its pairs, or its open-ended prompts), or else the file at that path."""
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"got a {type(name_or_path).__name__}, expected a bundled name or a file")
    names = bundled_names()
    if isinstance(name_or_path, str) and name_or_path in names:
        return files("caa_lens.contrast") / "data" / f"{name_or_path}{_OPEN_ENDED if open_ended else ''}.jsonl"
    path = expanded(name_or_path)
    if not path.exists():
        name = str(name_or_path)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        if name.lower() in PAPER_QUESTIONS:
            hint = (
                f"; the paper's set is load_paper_questions({name.lower()!r}), once fetched with `caa-lens data fetch`"
            )
        if name in PAPER_SETS:
            hint = f"; the paper's set is load_paper_set({name!r}), once fetched with `caa-lens data fetch {name}`"
        expected = f"a file, or a bundled name: {', '.join(names)}{hint}"
        raise ContrastFileError(str(name_or_path), [(None, FieldError(None, "no such file", expected))])
    return path


def stem(path: Path) -> str:
    """What a file is called, without its endings."""
    return path.stem if path.suffix.lower() != ".gz" else Path(path.stem).stem


def read_pairs(file: Traversable, make: Callable[..., T]) -> list[T]:
    """Every row of a file as `make(question=..., positive=..., negative=...)`, which may raise `FieldError`.

    Raises:
        ContrastFileError: what in the file does not fit, where, and what was expected instead.
    """
    return list(read(file, make).settled())


def read(
    file: Traversable,
    make: Callable[..., T],
    *,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "raise",
) -> Reading[T]:
    """As `read_pairs`, with the problems for the caller to settle."""
    source = _source(file, columns)
    return pairs_of(source, make, columns=columns, on_bad=on_bad, kinds="most" if on_bad == "drop" else "first")


def read_questions(file: Traversable) -> list[Question]:
    """Open-ended prompts: the question of every row, the texts of a list, or the lines of a `.txt`.

    Answers, if there are any, are not read.
    """
    return list(questions_of(_source(file, prompts=True)).settled())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines; `path` holds what it held before until all of them are there."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def _source(file: Traversable, columns: Mapping[str, str] | None = None, *, prompts: bool = False) -> Source:
    """The rows of a file, whatever its form."""
    ending = Path(file.name.lower().removesuffix(".gz")).suffix
    try:
        data = _bytes(file, ending)
        if ending == ".parquet" or data[:4] == b"PAR1":
            source = parquet_source(str(file), data)
        else:
            text = _text(data)
            if ending in (".csv", ".tsv") and not text.lstrip().startswith(("{", "[")):
                source = csv_source(str(file), text, tabs=ending == ".tsv", columns=columns)
            elif ending == ".txt" and not text.lstrip().startswith(("{", "[")):
                if not prompts:
                    raise FieldError(None, "lines of text", f"{EXPECTED}; prompts are read by load_open_ended")
                lines = enumerate(text.split("\n"), start=1)
                source = Source(of=str(file), unit="line", rows=[(n, one.strip()) for n, one in lines if one.strip()])
            else:
                unit, values = _values(text)
                source = Source(of=str(file), unit=unit, rows=values)
        if not source.rows:
            raise FieldError(None, "no rows", "one prompt at least" if prompts else "one pair at least")
        return source
    except FieldError as error:
        raise ContrastFileError(str(file), [(None, error)]) from None


def _bytes(file: Traversable, ending: str) -> bytes:
    """What is in a file, unpacked."""
    try:
        if file.is_dir():
            raise FieldError(None, "a folder", _in_folder({entry.name for entry in file.iterdir()}))
        if ending in VECTORS:
            raise FieldError(None, "a file of vectors", EXPECTED)
        if ending in SHEETS:
            made = "ContrastSet.from_pairs(pandas.read_excel(...))"
            raise FieldError(None, "a spreadsheet", f"{EXPECTED}: save it as CSV in UTF-8, or {made}")
        if isinstance(file, Path) and (file.is_block_device() or file.is_char_device()):
            raise FieldError(None, "a device", EXPECTED)
        data = file.read_bytes()
    except OSError as error:
        raise FieldError(None, f"what cannot be read ({error})", EXPECTED) from None
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            data = packed.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FieldError(None, f"a damaged gzip file ({error})", "a whole one: get it again") from None
    if len(data) > MAX_BYTES:
        raise FieldError(None, f"more than {MAX_BYTES} bytes, packed", EXPECTED)
    return data


def _in_folder(names: set[str]) -> str:
    if names & {"dataset_info.json", "dataset_dict.json", "state.json"}:
        return "a file. A data set that was saved is read by ContrastSet.from_pairs(datasets.load_from_disk(...))"
    return f"{EXPECTED}, in it"


def _text(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and not data.startswith(b"\xff\xfe\0\0"):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise FieldError(None, f"damaged UTF-16 ({error.reason})", "a text that is saved as UTF-8") from None
    if data and (words := other_than_text(data)):
        raise FieldError(None, words, f"{EXPECTED}, in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}, which is not UTF-8"
        remedy = (
            "a file that is saved as UTF-8 (in a spreadsheet: 'CSV UTF-8'; where it is of Windows, path.write_text("
        )
        raise FieldError(None, found, f"{remedy}path.read_text('cp1252'), 'utf-8'))") from None


def _values(text: str) -> tuple[str, list[tuple[int | None, object]]]:
    """What rows are called, and each with its JSON value or the error that says why it has none."""

    def parse(part: str) -> object:
        try:
            return json.loads(part, object_pairs_hook=_object)
        except FieldError as error:
            return error
        except ValueError as error:
            return FieldError(None, f"what is not JSON ({printable(str(error), 200)})", "a JSON object")
        except RecursionError:
            return FieldError(None, "what is not JSON (nested too deeply)", "a JSON object")

    if text.lstrip().startswith("["):
        items = parse(text)
        return "item", list(enumerate(items, start=1)) if isinstance(items, list) else [(None, items)]
    # Not splitlines(), which would also cut at the separators U+2028 and U+0085 inside a text.
    lines = ((line, part.strip().removesuffix(",")) for line, part in enumerate(text.split("\n"), start=1))
    values: list[tuple[int | None, object]] = [(line, parse(part)) for line, part in lines if part]
    if values and (isinstance(values[0][1], FieldError) or len(values) == 1):
        whole = values[0][1] if len(values) == 1 else parse(text)
        if isinstance(whole, dict):
            _refuse_wrapped(whole)
            return "line", [(values[0][0], whole)]
    return "line", values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldError(twice, "the key twice in one object", "it once")
    return found


def _is_talk(value: list[Any]) -> bool:
    """Whether a list holds the messages of one conversation."""
    return all(
        isinstance(one, dict) and ({"role", "content"} <= set(one) or {"from", "value"} <= set(one)) for one in value
    )


def _refuse_wrapped(whole: dict[str, Any]) -> None:
    """One JSON object that holds all rows is told what to write for it."""
    try:
        schema_of(list(whole))
        one_row = not all(isinstance(value, dict) for value in whole.values())
    except FieldError:
        one_row = False
    inside = [(k, value) for k, value in whole.items() if isinstance(value, list) and value and not _is_talk(value)]
    if not one_row and inside and all(isinstance(row, dict | str) for row in inside[0][1]):
        key, rows = inside[0]
        read = f"ContrastSet.from_pairs(json.loads(Path(...).read_text('utf-8'))[{key!r}])"
        raise FieldError(None, f"one object with {len(rows)} rows under {key!r}", f"the rows themselves: write {read}")
    if not one_row and whole and all(isinstance(value, dict) for value in whole.values()):
        raise FieldError(
            None,
            f"one object of columns ({printable(', '.join(whole), 80)})",
            "rows: write ContrastSet.from_pairs(pandas.read_json(...)), or save it with to_json(..., orient='records')",
        )
