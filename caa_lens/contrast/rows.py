"""What the columns of a row mean, whoever made the data: a question and two answers.

| answers | whose |
|---|---|
| `positive`, `negative` | ours: A/B letters or completions, read as they are |
| `answer_matching_behavior`, `answer_not_matching_behavior` | CAA authors, model-written evals |
| `correct`, `incorrect` | two-option questions (TruthfulQA, MMLU): the correct answer is positive |
| `chosen`, `rejected` | preference data: texts, lists of messages, or transcripts |

The question is the first column there is of `question`, `prompt`, `instruction` (with what `input` adds to it, on a
line of its own), `input`, `conversations` and `messages`. `positive` and `negative`, and `chosen` and `rejected`, may
also be whole texts that share their beginning, without such a column: see `conversations`. A question may be a list of
messages, also as JSON in a cell of a table: see `messages`. Of preference data, a system prompt and a history come
before the question. Other columns are ignored. A mapping of columns names those that are called something else.

Rows that are not ours are tidied, because the prompt format adds its own marks: blanks around the texts go, and so do
a leading `Question:` and a closing `Answer:`. Of an answer that is a list (`["(A)", " (C)"]`) the first entry is used
and the others are dropped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from caa_lens.contrast.conversations import answers_to
from caa_lens.contrast.errors import FieldError, OnBad, Problem, Reading, SchemaError, Source, shown
from caa_lens.contrast.messages import (
    Conversation,
    Message,
    Question,
    as_question,
    is_messages,
    last_words,
    messages_of_json,
    texts_of,
    with_last_words,
)
from caa_lens.file_kinds import printable

OURS = ("question", "positive", "negative")
QUESTIONS = ("question", "prompt", "instruction", "input", "conversations", "messages")
BEFORE = ("system", "system_prompt", "history")
ANSWERS = {  # whose: the columns of the positive and of the negative answer
    "caa-lens": ("positive", "negative"),
    "CAA or model-written evals": ("answer_matching_behavior", "answer_not_matching_behavior"),
    "two options": ("correct", "incorrect"),
    "preferences": ("chosen", "rejected"),
}
WITH_WHOLE_TEXTS = ("caa-lens", "preferences")
KINDS = ("an option letter", "a full completion")
LETTER = re.compile(r"\([A-Z]\)")
_QUESTION_MARK = re.compile(r"\AQuestion:\s*")
_ANSWER_MARK = re.compile(r"\s*^[ \t]*Answer:\Z", re.MULTILINE)
_HALF = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Which columns of some data hold what."""

    question: str | None
    """None: both answers are whole texts, which share their beginning."""
    positive: str
    negative: str
    before: tuple[str, ...] = ()
    """Columns of what was said before the question: a system prompt, earlier turns."""
    context: str | None = None
    """A column that goes on with the question."""
    whose: str = ""

    def texts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`question` (a text, or a `Conversation`), `positive` and `negative` of a row.

        Raises:
            FieldError: what does not fit, in the words of the data.
        """
        ours = self.whose == "caa-lens" and self.question is not None
        asked = None if self.question is None else _given(row, self.question)
        given = [_given(row, key) for key in (self.positive, self.negative)]
        if self.whose not in WITH_WHOLE_TEXTS:
            given = [value[0] if isinstance(value, list) and value else value for value in given]
        fields = (self.question, self.positive, self.negative)
        if self.question is not None and asked is None:
            raise FieldError(self.question, shown(None), "text")
        texts: tuple[object, ...] = (asked, *given)
        if isinstance(asked, str) and (messages := messages_of_json(asked)):
            asked = as_question(messages, self.question)
        if self.question is None or self.whose == "preferences" or any(isinstance(one, list) for one in texts):
            texts = answers_to(asked, given[0], given[1], fields)
        else:
            texts = (asked, *given)
        of_question = self.question or self.positive
        question = question_in(of_question, texts[0])
        answers = [text_of(key, text) for key, text in zip(fields[1:], texts[1:], strict=True)]
        question = _with_context(question, row, self.context)
        if not ours:
            question = _tidied(question)
        if said := self._said_before(row):
            question = as_question([*said, *_messages_of(question)], of_question)
        answers = [a.strip() if not ours or LETTER.fullmatch(a.strip()) else a for a in answers]
        return dict(zip(OURS, (question, *answers), strict=True))

    def _said_before(self, row: Mapping[str, Any]) -> list[Message]:
        """The system prompt and the earlier turns that columns of their own hold."""
        found: list[Message] = []
        for key in self.before:
            said = row.get(key)
            is_system = "system" in _plain(key)
            if isinstance(said, str) and said.strip() and is_system:
                found.append(Message("system", said.strip()))
            elif isinstance(said, list) and said and not is_system and all(_is_exchange(one) for one in said):
                found += [
                    Message(role, text.strip())
                    for one in said
                    for role, text in zip(("user", "assistant"), one, strict=True)
                ]
            elif isinstance(said, str | list) and (said.strip() if isinstance(said, str) else said):
                wanted = "a text" if is_system else "a list of [question, answer]"
                raise FieldError(key, shown(said), f"{wanted}; or give the question as a list of messages")
        return found


def schema_of(names: Sequence[str], columns: Mapping[str, str] | None = None) -> Schema:
    """Which of these columns hold what; `columns` says it for those that are called otherwise.

    Raises:
        SchemaError: they belong to no known form, to two, or one of them stands twice.
    """
    columns = columns or {}
    for ours, theirs in columns.items():
        if find_column(names, theirs) is None:
            raise SchemaError(None, _found(names), f"a column {theirs!r}, which columns= names for the {ours}")
    asked = [columns["question"]] if "question" in columns else QUESTIONS
    question: str | None = next((found for one in asked if (found := find_column(names, one)) is not None), None)
    before = tuple(find_column(names, one) or one for one in BEFORE)
    context = None if "question" in columns else _context_of(question, names)
    if "positive" in columns:
        positive, negative = (str(find_column(names, columns[side])) for side in ("positive", "negative"))
        whose = "preferences"
        return Schema(
            question=question, positive=positive, negative=negative, before=before, context=context, whose=whose
        )
    there = {whose: keys for whose, keys in ANSWERS.items() if any(find_column(names, key) is not None for key in keys)}
    whole = {whose: keys for whose, keys in there.items() if all(find_column(names, key) for key in keys)}
    if len(whole) > 1:
        raise SchemaError(None, f"answers of two forms: {_found(names)}", f"one of them: {_USE_COLUMNS}")
    if not there:
        known = "; ".join(f"{whose}: {', '.join(keys)}" for whose, keys in ANSWERS.items())
        open_ended = question and "; prompts without answers are read by load_open_ended"
        expected = f"a question ({', '.join(QUESTIONS)}) and the answers of one of the schemas {known}"
        raise SchemaError(None, _found(names), f"{expected}. Others are named with {_USE_COLUMNS}{open_ended or ''}")
    whose, keys = next(iter((whole or there).items()))
    if question is None and whose not in WITH_WHOLE_TEXTS:
        question = QUESTIONS[0]  # whose absence every row tells
    positive, negative = (find_column(names, key) or key for key in keys)
    return Schema(
        question=question,
        positive=positive,
        negative=negative,
        before=before if whose == "preferences" else (),
        context=context,
        whose=whose,
    )


_USE_COLUMNS = "columns={'question': ..., 'positive': ..., 'negative': ...}"


def find_column(names: Sequence[str], wanted: str) -> str | None:
    """A column by its name; if none is called exactly so, by its letters, whatever their case and blanks.

    Raises:
        SchemaError: two columns are called so.
    """
    for alike in (str, _plain):
        found = [name for name in names if alike(name) == alike(wanted)]
        if len(found) > 1:
            shown = " and ".join(map(repr, found[:3]))
            raise SchemaError(
                wanted, f"{len(found)} columns of that name ({shown})", "one: give the others other names"
            )
        if found:
            return found[0]
    return None


def pairs_of(
    source: Source,
    make: Callable[..., T],
    *,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "raise",
    kinds: Literal["first", "most", "any"] = "first",
) -> Reading[T]:
    """Every row as `make(question=..., positive=..., negative=...)`, which may raise `FieldError`.

    A value that is no row and no error is taken for what `make` would give. With `kinds`, answers are all letters or
    all completions: as those of the first row are, or of most.
    """
    schema: Schema | None = None
    made: list[tuple[int | None, bool, str, T]] = []
    problems: list[Problem] = []
    for line, value in source.rows:
        try:
            if isinstance(value, FieldError):
                raise value
            if isinstance(value, list) and len(value) == 3 and is_triple(value):
                value = dict(zip(OURS, value, strict=True))
            if not isinstance(value, Mapping):
                raise FieldError(None, shown(value), "a JSON object")
            schema = schema or schema_of(source.columns or list(value), columns)
            texts = schema.texts(value)
            is_letter = LETTER.fullmatch(texts["positive"]) is not None
            made.append((line, is_letter, schema.positive, _make(make, texts, schema)))
        except FieldError as error:
            if isinstance(error, SchemaError) and source.columns is not None and source.unit == "line":
                error = SchemaError(error.field, f"{error.found} in its first line", error.expected)
            problems.append((line, error))
            if isinstance(error, SchemaError) and (source.columns is not None or on_bad == "raise"):
                return Reading(source=source, kept=(), problems=tuple(problems))  # all others would say the same
    letters = sum(is_letter for _, is_letter, _, _ in made)
    as_letters = bool(made) and (made[0][1] if kinds == "first" else 2 * letters >= len(made))
    kept = []
    for line, is_letter, field, one in made:
        if kinds != "any" and is_letter != as_letters:
            found, expected = KINDS if is_letter else KINDS[::-1]
            others = "the first row" if kinds == "first" else "most rows"
            problems.append((line, FieldError(field, found, f"{expected}, as in {others}: make a file of each kind")))
        else:
            kept.append(one)
    problems.sort(key=lambda problem: problem[0] or 0)
    return Reading(source=source, kept=tuple(kept), problems=tuple(problems))


def questions_of(source: Source) -> Reading[Question]:
    """The question of every row, or the row itself where it is a text or a list of messages; answers are not read."""
    key: str | None = None
    kept: list[Question] = []
    problems: list[Problem] = []
    for line, value in source.rows:
        try:
            if isinstance(value, FieldError):
                raise value
            if isinstance(value, str):
                kept.append(question_in(None, messages_of_json(value) or value))
                continue
            if is_messages(value):
                kept.append(question_in(None, value))
                continue
            if not isinstance(value, Mapping):
                raise FieldError(None, shown(value), "a text, a list of messages, or a JSON object with a question")
            if {"role", "content"} <= set(value):
                raise FieldError(None, "a message alone", "a list of prompts: a conversation is a list in that list")
            names = source.columns or list(value)
            key = key or next((found for one in QUESTIONS if (found := find_column(names, one))), QUESTIONS[0])
            asked = _given(value, key)
            if isinstance(asked, str):
                asked = messages_of_json(asked) or asked
            kept.append(_with_context(question_in(key, asked), value, _context_of(key, names)))
        except FieldError as error:
            problems.append((line, error))
    return Reading(source=source, kept=tuple(kept), problems=tuple(problems))


def text_of(key: str | None, value: object) -> str:
    """A value of a row if it is a text.

    Raises:
        FieldError: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        numeric = isinstance(value, int | float) and value == value and not isinstance(value, bool)
        raise FieldError(key, shown(value), "text (numbers are written as texts)" if numeric else "text")
    if half := _HALF.search(value):
        found = f"half a character, \\u{ord(half[0]):04x} at character {half.start()}, which no text has"
        raise FieldError(key, found, "text that can be written as UTF-8")
    return str(value)


def question_in(key: str | None, value: object) -> Question:
    """A value of a row if it is a question: a text, or messages.

    Raises:
        FieldError: it is not.
    """
    if isinstance(value, str) or not is_messages(value):
        return text_of(key, value)
    question = as_question(value, key)
    for words in texts_of(question):
        text_of(key, words)
    return question


def is_triple(values: Sequence[object]) -> bool:
    """Whether three values are a question, in words or in messages, and two texts."""
    asked, *answers = values
    return (isinstance(asked, str) or is_messages(asked)) and all(isinstance(one, str) for one in answers)


def _is_exchange(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, str) for one in value)


def _messages_of(question: Question) -> tuple[Message, ...]:
    return (Message("user", question),) if isinstance(question, str) else question.messages


def _tidied(question: Question) -> Question:
    """Without blanks around its texts; of a lone text, without the marks of a question and an answer."""
    if isinstance(question, Conversation):
        return Conversation(messages=tuple(Message(role, text.strip()) for role, text in question.messages))
    return _ANSWER_MARK.sub("", _QUESTION_MARK.sub("", question.strip()))


def _context_of(question: str | None, names: Sequence[str]) -> str | None:
    """The column that goes on with an instruction."""
    if question is None or _plain(question) != "instruction":
        return None
    return find_column(names, "input") or "input"


def _with_context(question: Question, row: Mapping[str, Any], column: str | None) -> Question:
    context = row.get(column) if column else None
    if not isinstance(context, str) or not context.strip():
        return question
    return with_last_words(question, f"{last_words(question)}\n{context}")


def _make(make: Callable[..., T], texts: dict[str, Any], schema: Schema) -> T:
    try:
        return make(**texts)
    except FieldError as error:  # told in the data's own words
        keys = {"question": schema.question or schema.positive, **{k: getattr(schema, k) for k in OURS[1:]}}
        raise FieldError(keys.get(error.field or "", error.field), error.found, error.expected) from None


def _given(row: Mapping[str, Any], key: str) -> Any:
    if key in row:
        return row[key]
    if (found := find_column(list(row), key)) is None:
        raise FieldError(key, "no such field", "text")
    return row[found]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", str(name).strip().casefold())


def _found(names: Sequence[str]) -> str:
    return f"the columns {printable(', '.join(map(str, names)), 200) or '(none)'}"
