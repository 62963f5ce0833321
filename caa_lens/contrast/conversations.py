"""Whole texts to a question and two answers: lists of messages, transcripts, and prompts that share a beginning.

What both texts begin with is the question, what follows are the answers. Conversations are cut between turns, plain
texts at a blank, so that no turn and no word is cut in two.

`question_of` is the only place that says which conversations can be a question.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from caa_lens.contrast.errors import FieldError, shown

# Roles as chat templates call them, and what other data sets call these.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_MARKS = (("role", "content"), ("from", "value"))
# As in HH-RLHF: "\n\nHuman: ...\n\nAssistant: ...".
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")
_TRANSCRIPT = re.compile(r"\A\s*\n\nHuman:|\A(?:\s*\n\n)?Human:.*\n\nAssistant:", re.DOTALL)
_JSON_LIST = re.compile(r"\s*\[\s*\{")
_PYTHON_LIST = re.compile(r"\s*(array\()?\[\s*\{\s*'(role|content|from|value)'")
_REPEATED = 3  # words: an answer that begins with a prompt of so many holds the prompt


class Turn(NamedTuple):
    role: str
    text: str


def question_of(turns: Sequence[Turn], field: str | None) -> str:
    """The question that is asked by a conversation: so far, one message of the user.

    Raises:
        FieldError: for any other conversation.
    """
    roles = [turn.role for turn in turns]
    if roles == ["user"]:
        return turns[0].text
    if roles == ["system", "user"] and not turns[0].text.strip():
        return turns[1].text
    if roles == ["system", "user"]:
        raise FieldError(
            field,
            f"a system message ({shown(turns[0].text)}) before the question",
            "the user's question alone: a system prompt for all pairs is given to extract(..., system=...)",
        )
    raise FieldError(
        field,
        f"a conversation of {len(roles)} messages ({', '.join(roles[:6])}{', ...' if roles[6:] else ''})"
        if roles
        else "no message",
        "one question of the user before the answers: longer conversations are no questions yet",
    )


def answers_to(
    question: object, positive: object, negative: object, fields: tuple[str | None, str, str]
) -> tuple[str, str, str]:
    """(question, positive, negative) as texts, of texts or conversations; `question` is None where both are whole.

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
        told = question_of(shared, of_positive)
        if question is not None and _asked(question, asked, of_question).strip() != told.strip():
            found = f"{shown(_asked(question, asked, of_question))}, while the messages ask {shown(told)}"
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


def _asked(question: object, turns: list[Turn] | None, field: str | None) -> str:
    if turns is None:
        return _text(question, field)
    if len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].text.strip():
        turns = turns[:-1]  # a transcript that ends where the answer begins
    return question_of(turns, field)


def _cut_turns(positive: list[Turn], negative: list[Turn], field: str) -> tuple[tuple[str, str], list[Turn]]:
    """Both answers, and the turns before them."""
    n = 0
    while n < min(len(positive), len(negative)) and positive[n] == negative[n]:
        n += 1
    rest = positive[n:], negative[n:]
    if [[turn.role for turn in side] for side in rest] == [["assistant"], ["assistant"]]:
        return (rest[0][0].text, rest[1][0].text), positive[:n]
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


def _turns(value: object, field: str | None) -> list[Turn] | None:
    """The turns of a conversation; None for anything else."""
    if isinstance(value, str):
        return _messages_of_json(value) or (_transcript(value) if _TRANSCRIPT.match(value) else None)
    if isinstance(value, Mapping):
        return [_message(value, field)]
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return [_message(one, field) for one in value]
    return None


def _messages_of_json(text: str) -> list[Turn] | None:
    """Messages that a table holds as JSON; other JSON is an answer like any."""
    if not _JSON_LIST.match(text):
        return None
    try:
        return [_message(one, None) for one in json.loads(text)]
    except (ValueError, RecursionError, AttributeError):
        return None


def _message(message: Mapping[str, object], field: str | None) -> Turn:
    for role, content in _MARKS:
        if isinstance(message.get(role), str) and isinstance(message.get(content), str):
            name = str(message[role]).lower()
            return Turn(ROLES.get(name, name), str(message[content]))
    found = f"a message {shown(dict(message))}"
    raise FieldError(field, found, "messages of a role and a text, {'role': 'user', 'content': '...'}")


def _transcript(text: str) -> list[Turn]:
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        Turn({"Human": "user", "Assistant": "assistant"}[mark[1]], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
