"""Whole texts to a question and two answers: lists of messages, transcripts, and prompts that share a beginning.

What both texts begin with is the question, what follows are the answers. Conversations are cut between turns, plain
texts at a blank, so that no turn and no word is cut in two. Several turns before the answers are a `Conversation`.
"""

import re
from collections.abc import Mapping

from caa_lens.contrast.errors import FieldError, shown
from caa_lens.contrast.messages import Conversation, Message, Question, as_question, message_of, messages_of_json

# As in HH-RLHF: "\n\nHuman: ...\n\nAssistant: ...".
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")
_TRANSCRIPT = re.compile(r"\A\s*\n\nHuman:|\A(?:\s*\n\n)?Human:.*\n\nAssistant:", re.DOTALL)
_PYTHON_LIST = re.compile(r"\s*(array\()?\[\s*\{\s*'(role|content|from|value)'")
_REPEATED = 3  # words: an answer that begins with a prompt of so many holds the prompt


def answers_to(
    question: object, positive: object, negative: object, fields: tuple[str | None, str, str]
) -> tuple[Question, str, str]:
    """(question, positive, negative), of texts or conversations; `question` is None where both are whole.

    Raises:
        FieldError: what of it does not fit, in the names of `fields`.
    """
    of_question, of_positive, of_negative = fields
    asked = None if question is None else _turns(question, of_question)
    sides = _turns(positive, of_positive), _turns(negative, of_negative)
    if sides[0] is not None and sides[1] is not None:
        texts, shared = _cut_turns(sides[0], sides[1], of_positive)
        if not shared:
            if question is None:
                raise FieldError(of_positive, "an answer without a question", "the question before it, in both texts")
            return _asked(question, asked, of_question), *texts
        told = as_question(shared, of_positive)
        if question is not None and not _same(given := _asked(question, asked, of_question), told):
            found = f"{shown(str(given))}, while the messages ask {shown(str(told))}"
            raise FieldError(of_question, found, "the same question, or no such column")
        return told, *texts
    for side, field, value in zip(sides, fields[1:], (positive, negative), strict=True):
        if side is None and (sides[0] is not None or sides[1] is not None):
            raise FieldError(field, shown(value), "a conversation, as the other answer is")
    words = _text(positive, of_positive), _text(negative, of_negative)
    if question is None:
        return _cut_words(*words, fields)
    told = _asked(question, asked, of_question)
    for whole in (told, question):  # the answers may repeat it, as some data sets have it
        if isinstance(whole, str) and len(whole.split()) >= _REPEATED and all(w.startswith(whole) for w in words):
            return told, words[0][len(whole) :], words[1][len(whole) :]
    return told, *words


def _same(given: Question, told: Question) -> bool:
    """Whether a question is that of the messages; as a text it may leave out what was said before."""
    if isinstance(given, str):
        return given.strip() == (told if isinstance(told, str) else told.last).strip()
    return given == told


def _asked(question: object, turns: list[Message] | None, field: str | None) -> Question:
    if isinstance(question, Conversation):
        return question
    if turns is None:
        return _text(question, field)
    if len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns = turns[:-1]  # a transcript that ends where the answer begins
    return as_question(turns, field)


def _cut_turns(positive: list[Message], negative: list[Message], field: str) -> tuple[tuple[str, str], list[Message]]:
    """Both answers, and the turns before them."""
    n = 0
    while n < min(len(positive), len(negative)) and positive[n] == negative[n]:
        n += 1
    rest = positive[n:], negative[n:]
    if [[turn.role for turn in side] for side in rest] == [["assistant"], ["assistant"]]:
        return (rest[0][0].content, rest[1][0].content), positive[:n]
    if not rest[0] and not rest[1]:
        raise FieldError(field, "the same conversation twice", "two that differ in the last answer")
    roles = [", ".join(turn.role for turn in side) or "nothing" for side in rest]
    raise FieldError(
        field,
        f"conversations that differ in more than the last answer (behind {n} shared messages: {roles[0]}; {roles[1]})",
        "a shared beginning, then one answer of the assistant in each",
    )


def _cut_words(positive: str, negative: str, fields: tuple[str | None, str, str]) -> tuple[str, str, str]:
    """Two whole prompts, cut behind the last blank of what both begin with."""
    n = 0
    while n < min(len(positive), len(negative)) and positive[n] == negative[n]:
        n += 1
    while n and not positive[n - 1].isspace():
        n -= 1
    if not positive[:n].strip():
        raise FieldError(
            fields[1],
            f"whole texts that begin differently ({shown(positive)}, {shown(negative)})",
            "texts that share their beginning, which is the question, or a column of it (columns={'question': ...})",
        )
    return positive[:n], positive[n:], negative[n:]


def _text(value: object, field: str | None) -> str:
    if isinstance(value, str):
        if _PYTHON_LIST.match(value):
            raise FieldError(field, f"a list of messages in Python's notation ({shown(value)})", "it in JSON's")
        return value
    raise FieldError(field, shown(value), "text")


def _turns(value: object, field: str | None) -> list[Message] | None:
    """The turns of a conversation; None for anything else."""
    if isinstance(value, str):
        return messages_of_json(value) or (_transcript(value) if _TRANSCRIPT.match(value) else None)
    if isinstance(value, Mapping):
        return [message_of(value, field)]
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return [message_of(one, field) for one in value]
    return None


def _transcript(text: str) -> list[Message]:
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        Message({"Human": "user", "Assistant": "assistant"}[mark[1]], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
