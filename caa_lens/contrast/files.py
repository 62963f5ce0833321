"""Files of contrast pairs: every public format is read, every row checked, and one error says what is wrong.

The formats are told apart by the keys of a file's first row; other keys are ignored.

| keys | whose |
|---|---|
| `question`, `positive`, `negative` | ours: A/B letters or completions, read as they are |
| `question`, `answer_matching_behavior`, `answer_not_matching_behavior` | CAA authors, model-written evals |
| `question`, `correct`, `incorrect` | TruthfulQA as two-option questions: the correct answer is positive |

Rows of the last two are tidied, because the prompt format adds its own marks: blanks around the texts go, and
so do a leading `Question:` and a closing `Answer:`. Of an answer that is a list (`["(A)", " (C)"]`) the first
entry is used and the others are dropped. A file is a JSON list, or has one JSON object a line; UTF-8, with or
without a byte order mark. A file that is something else is told what it is. Rows become pairs
through the caller's `make`: what a pair is, `contrast_pair` knows.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from caa_lens.atomic_files import write_atomically
from caa_lens.file_kinds import expanded, other_than_text, printable

OURS = ("question", "positive", "negative")
PAPER_SETS = (  # what somebody may ask for by name, and has to fetch first; see `caa_lens.paper`
    "coordinate-other-ais",
    "corrigible-neutral-HHH",
    "hallucination",
    "myopic-reward",
    "survival-instinct",
    "sycophancy",
    "refusal",
)
SCHEMAS = {  # whose: the keys of the question, of the positive and of the negative answer
    "caa-lens": OURS,
    "CAA or model-written evals": ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    "TruthfulQA": ("question", "correct", "incorrect"),
}
VECTORS = {".safetensors", ".pt", ".gguf"}
TABLES = {".csv", ".tsv", ".xlsx", ".xls", ".parquet"}
SHOWN = 5  # problems that one message lists
LETTER = re.compile(r"\([A-Z]\)")
_QUESTION_MARK = re.compile(r"\AQuestion:\s*")
_ANSWER_MARK = re.compile(r"\s*^[ \t]*Answer:\Z", re.MULTILINE)
_HALF = re.compile("[\ud800-\udfff]")
_OPEN_ENDED = "_open_ended"

T = TypeVar("T")


class FieldError(ValueError):
    """A field that does not fit (`None`: the whole row or file), what was found and what was expected."""

    def __init__(self, field: str | None, found: str, expected: str) -> None:
        super().__init__(f"{field + ': ' if field else ''}found {found}, expected {expected}")
        self.field, self.found, self.expected = field, found, expected


class SchemaError(FieldError):
    """A row whose keys belong to no known format."""


class ContrastFileError(ValueError):
    """A file that cannot be read. Its message lists the first five problems; `problems` holds all of them.

    `line`, `field`, `found` and `expected` are those of the first problem. Lines are counted from 1, and in a
    JSON list so are the items. `None` stands for the whole file, or the whole row.
    """

    def __init__(self, file: str, problems: Sequence[tuple[int | None, FieldError]], *, unit: str = "line") -> None:
        self.file, self.problems = file, tuple(problems)
        self.line, first = self.problems[0]
        self.field, self.found, self.expected = first.field, first.found, first.expected
        texts = []
        for line, error in self.problems[:SHOWN]:
            separator = ", " if error.field else ": "
            texts.append(f"{unit} {line}{separator}{error}" if line else str(error))
        if len(self.problems) == 1:
            super().__init__(f"{file}: {texts[0]}")
        else:
            shown = f" (the first {SHOWN} are shown)" if len(self.problems) > SHOWN else ""
            super().__init__("\n  ".join([f"{file}: {len(self.problems)} problems{shown}", *texts]))


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
        if name in PAPER_SETS:
            hint = f"; the paper's set is load_paper_set({name!r}), once fetched with `caa-lens data fetch {name}`"
        expected = f"a .json or .jsonl file, or a bundled name: {', '.join(names)}{hint}"
        raise ContrastFileError(str(name_or_path), [(None, FieldError(None, "no such file", expected))])
    return path


def read_pairs(file: Traversable, make: Callable[..., T]) -> list[T]:
    """Every row of a file as `make(question=..., positive=..., negative=...)`, which may raise `FieldError`.

    Raises:
        ContrastFileError: what in the file does not fit, where, and what was expected instead.
    """
    schema: tuple[str, str, str] | None = None
    first_is_letter: bool | None = None

    def pair(row: dict[str, Any]) -> T:
        nonlocal schema, first_is_letter
        schema = schema or _schema(row)
        texts = _texts(row, schema)
        is_letter = LETTER.fullmatch(texts["positive"]) is not None
        first_is_letter = is_letter if first_is_letter is None else first_is_letter
        if is_letter != first_is_letter:
            kinds = ("an option letter", "a full completion")
            found, expected = kinds if is_letter else reversed(kinds)
            raise FieldError(schema[1], found, f"{expected}, as in the first row: make a file of each kind")
        try:
            return make(**texts)
        except FieldError as error:  # told in the file's own words
            keys = dict(zip(OURS, schema, strict=True))
            raise FieldError(keys.get(error.field or "", error.field), error.found, error.expected) from None

    return _read(file, pair)


def read_questions(file: Traversable) -> list[str]:
    """The `question` of every row of a file: open-ended prompts, whose answers, if any, are not read."""
    return _read(file, lambda row: _text(row, "question"))


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes JSON lines; `path` holds what it held before until all of them are there."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def _read(file: Traversable, convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """Every row of a file, converted; all rows that cannot be are told in one error."""
    converted: list[T] = []
    problems: list[tuple[int | None, FieldError]] = []
    if Path(file.name).suffix.lower() in TABLES:
        expected = (
            "a .json or .jsonl file. With pandas a table becomes one: read_csv(...).to_json('pairs.jsonl', "
            "orient='records', lines=True), of columns question, positive, negative"
        )
        raise ContrastFileError(str(file), [(None, FieldError(None, "a table", expected))])
    unit, values = _values(_decode(file))
    for line, value in values:
        try:
            if isinstance(value, ValueError):
                raise FieldError(None, f"what is not JSON ({printable(str(value), 200)})", "a JSON object")
            if not isinstance(value, dict):
                raise FieldError(None, _show(value), "a JSON object")
            converted.append(convert(value))
        except FieldError as error:
            problems.append((line, error))
            if isinstance(error, SchemaError):
                break  # all other rows would say the same
    if not values:
        problems.append((None, FieldError(None, "no rows", "at least one JSON object")))
    if problems:
        raise ContrastFileError(str(file), problems, unit=unit)
    return converted


def _decode(file: Traversable) -> str:
    try:
        if file.is_dir():
            raise FieldError(None, "a folder", "a .json or .jsonl file in it")
        if Path(file.name).suffix.lower() in VECTORS:
            raise FieldError(None, "a file of vectors", "contrast pairs, a .json or .jsonl file")
        if isinstance(file, Path) and (file.is_block_device() or file.is_char_device()):
            raise FieldError(None, "a device", "a .json or .jsonl file")
        data = file.read_bytes()
        if data and (words := other_than_text(data)):
            raise FieldError(None, words, "contrast pairs, a .json or .jsonl file in UTF-8")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}, which is not UTF-8"
        problem = FieldError(None, found, "a file that is saved as UTF-8")
    except OSError as error:
        problem = FieldError(None, f"what cannot be read ({error})", "a .json or .jsonl file")
    except FieldError as error:
        problem = error
    raise ContrastFileError(str(file), [(None, problem)])


def _values(text: str) -> tuple[str, list[tuple[int | None, Any]]]:
    """What lines are called, and each with its JSON value or the `ValueError` that says why it has none."""

    def parse(part: str) -> Any:
        try:
            return json.loads(part)
        except ValueError as error:
            return error
        except RecursionError:
            return ValueError("nested too deeply")

    if text.lstrip().startswith("["):
        items = parse(text)
        return "item", list(enumerate(items, start=1)) if isinstance(items, list) else [(None, items)]
    # Not splitlines(), which would also cut at the separators U+2028 and U+0085 inside a text.
    lines = ((line, part.strip().removesuffix(",")) for line, part in enumerate(text.split("\n"), start=1))
    return "line", [(line, parse(part)) for line, part in lines if part]


def _schema(row: Mapping[str, Any]) -> tuple[str, str, str]:
    for keys in SCHEMAS.values():
        if keys[1] in row or keys[2] in row:
            return keys
    known = "; ".join(f"{whose}: {', '.join(keys)}" for whose, keys in SCHEMAS.items())
    raise SchemaError(None, f"the keys {printable(', '.join(row), 200) or '(none)'}", f"one of the schemas {known}")


def _texts(row: Mapping[str, Any], schema: tuple[str, str, str]) -> dict[str, str]:
    ours = schema == OURS
    row = {k: v[0] if isinstance(v, list) and v and k in schema[1:] and not ours else v for k, v in row.items()}
    question, positive, negative = (_text(row, key) for key in schema)
    if not ours:
        question = _ANSWER_MARK.sub("", _QUESTION_MARK.sub("", question.strip()))
    answers = [a.strip() if not ours or LETTER.fullmatch(a.strip()) else a for a in (positive, negative)]
    return dict(zip(OURS, (question, *answers), strict=True))


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise FieldError(key, "no such field", "text")
    if not isinstance(row[key], str) or not row[key].strip():
        raise FieldError(key, _show(row[key]), "text")
    if half := _HALF.search(row[key]):
        found = f"half a character, \\u{ord(half[0]):04x} at character {half.start()}, which no text has"
        raise FieldError(key, found, "text that can be written as UTF-8")
    return str(row[key])


def _show(value: object) -> str:
    shown = printable(json.dumps(value, ensure_ascii=False), most=10**6)
    return shown if len(shown) <= 60 else shown[:57] + "..."
