"""Twenty easy questions with four choices, written for this library, and which choice an answer in words names.

A small model that knows an answer may yet be unable to say its letter; so the choices can be asked for in words.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = Path(__file__).with_name("data") / "easy_questions.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceQuestion:
    """A question, its choices, and which of them is right.

    Attributes:
        answer: the letter of the right choice.
    """

    question: str
    choices: tuple[str, ...]
    answer: str

    @property
    def right(self) -> str:
        """The right choice in words."""
        return self.choices[ord(self.answer) - ord("A")]

    @property
    def in_words(self) -> str:
        """The question with its choices, in one line: `Which is even? 7, 9, 4 or 11?`."""
        return f"{self.question} {', '.join(self.choices[:-1])} or {self.choices[-1]}?"


def load_easy_questions() -> list[ChoiceQuestion]:
    """The bundled questions, with every letter right equally often."""
    rows = map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines())
    return [
        ChoiceQuestion(question=row["question"], choices=tuple(row["choices"]), answer=row["answer"]) for row in rows
    ]


def named_first(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names first, as a word of its own in any case; None if it names none of them."""
    found = []
    for choice in choices:
        if match := re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE):
            found.append((match.start(), -len(choice), choice))
    return min(found)[2] if found else None
