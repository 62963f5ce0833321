"""What a check says of an answer, and how answers are read and compared.

A check computes the right answer and what the usual mistakes come to. An answer is compared with the right one first,
so that it is right also where a mistake would not show; then with the mistakes, each of which has its hint. A hint says
where to look and never what comes out.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caa_lens.arguments import describe

Mistake = tuple[Any, str]
"""What an answer is that was got wrong in this way, or a function that computes it; and the hint."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Right, wrong with a hint, or not answered yet; a notebook shows it in these words."""

    said: str
    hint: str = ""

    @property
    def right(self) -> bool:
        return self == RIGHT

    def __repr__(self) -> str:
        return f"{self.said}: {self.hint}" if self.hint else self.said


RIGHT = Verdict("right")
NOT_ANSWERED = Verdict("not answered yet")


def wrong(hint: str) -> Verdict:
    return Verdict("wrong", hint)


class UnreadableAnswer(ValueError):
    """An answer that is of another kind than what was asked for."""


def exercise(read: Callable[[Any], Any]) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Make a check of a function: it sees answers that were given and are of the kind that was asked for.

    Args:
        read: gives the answer in one form, and raises `UnreadableAnswer` for another kind.
    """

    def decorated(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
        @functools.wraps(check)
        def judged_answer(answer: Any, *given: Any, **named: Any) -> Verdict:
            if _is_open(answer):
                return NOT_ANSWERED
            try:
                readable = read(answer)
            except UnreadableAnswer as error:
                return wrong(str(error))
            with torch.no_grad():
                return check(readable, *given, **named)

        return judged_answer

    return decorated


def judged(
    answer: Any, right: Any, *, near: Callable[[Any, Any], bool], mistakes: Iterable[Mistake], otherwise: str
) -> Verdict:
    """Right, or wrong with the hint of the first mistake that comes to this answer.

    Args:
        near: whether two answers are the same but for rounding.
        otherwise: the hint where no mistake comes to this answer.
    """
    if near(answer, right):
        return RIGHT
    for value, hint in mistakes:
        if near(answer, value() if callable(value) else value):
            return wrong(hint)
    return wrong(otherwise)


def within(limit: float) -> Callable[[Any, Any], bool]:
    """Whether two numbers, lists of numbers or vectors are apart by at most `limit`: the length of the difference."""

    def near(one: Any, other: Any) -> bool:
        one, other = (torch.as_tensor(each, dtype=torch.float64) for each in (one, other))
        return one.shape == other.shape and float((one - other).norm()) <= limit

    return near


def same_text(one: str, other: str) -> bool:
    """Whether two texts are the same but for quotes and blanks around them."""
    return one.strip(" \n'\"") == other.strip(" \n'\"")


def bare(token: str) -> str:
    """A token's word, without the marks of a blank or of a piece of a word; small letters."""
    return token.strip(" \n'\"␣…Ġ▁").lower()


def a_number(answer: Any) -> float:
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = answer.item()
    try:
        number = float(answer)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(answer, str | bool):
        raise UnreadableAnswer(f"expected one number, got {describe(answer)}")
    return number


def numbers(count: int | None = None) -> Callable[[Any], list[float]]:
    """So many numbers in a row, or any number of them; a dict's are taken by its keys, in their order."""

    def read(answer: Any) -> list[float]:
        if isinstance(answer, Mapping):
            answer = [answer[key] for key in sorted(answer)]
        if hasattr(answer, "tolist"):
            answer = answer.tolist()
        if not isinstance(answer, list | tuple) or count not in (None, len(answer)):
            raise UnreadableAnswer(f"expected {count or 'several'} numbers in a list, got {describe(answer)}")
        return [a_number(each) for each in answer]

    return read


def a_vector(answer: Any) -> Tensor:
    """`[d_model]`, on the CPU; of a steering vector its direction."""
    answer = getattr(answer, "direction", answer)
    if not isinstance(answer, Tensor) or answer.ndim != 1:
        shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
        raise UnreadableAnswer(f"expected one tensor [d_model], got {describe(answer)}{shape}")
    return answer.detach().float().cpu()


def a_text(answer: Any) -> str:
    if not isinstance(answer, str):
        raise UnreadableAnswer(f"expected a text, got {describe(answer)}")
    return answer


def some_words(answer: Any) -> list[str]:
    if not isinstance(answer, list | tuple) or not all(isinstance(each, str) for each in answer):
        raise UnreadableAnswer(f"expected a list of words, got {describe(answer)}")
    return [bare(each) for each in answer]


def a_word_and_a_layer(answer: Any) -> tuple[str, int]:
    if not isinstance(answer, list | tuple) or len(answer) != 2 or not isinstance(answer[0], str):
        raise UnreadableAnswer(f"expected a word and a layer, got {describe(answer)}")
    return bare(answer[0]), int(a_number(answer[1]))


def a_function(answer: Any) -> Callable[..., Any]:
    if not callable(answer):
        raise UnreadableAnswer(f"expected a function, got {describe(answer)}")
    return answer


def _is_open(answer: Any) -> bool:
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    return answer is ... or (isinstance(answer, list | tuple) and any(each is ... for each in answer))
