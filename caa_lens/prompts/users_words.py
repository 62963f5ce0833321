"""The words that go into a prompt: what is no text is refused; what a format or a tokenizer makes of them is told."""

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from caa_lens.contrast.messages import Asked, as_question, texts_of
from caa_lens.prompts.token_spans import special_tokens


class TemplateInQuestionWarning(UserWarning):
    """A question that already is in a prompt format is put into it once more."""


class SpecialTokenWarning(UserWarning):
    """Words of the user hold special tokens, which become control tokens."""


class StrippedQuestionWarning(UserWarning):
    """A format leaves out the blanks around a question."""


class JoinedWordsWarning(UserWarning):
    """An answer follows a text directly, without the blank that is between two words."""


class GuessedFormatWarning(UserWarning):
    """Nothing in a checkpoint says how the model is prompted."""


def check_text(what: str, words: object) -> None:
    """Raises `TypeError` for anything but a `str`, `ValueError` for one that is no text."""
    if not isinstance(words, str):
        raise TypeError(f"expected the {what} in words, got {words!r}")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {what} holds {words[error.start]!r} at character {error.start}, half of a surrogate pair, which is "
            "no text: read the file it comes from in its own encoding"
        ) from None


def warn_of_words(
    prompt_format: Any,
    tokenizer: Any,
    questions: Sequence[Asked],
    answers: Iterable[str] = (),
    *,
    system: str | None = None,
) -> None:
    """One warning of each kind for all words that go into prompts, with what it is about and how often.

    `prompt_format` is a `PromptFormat`, or anything with its fields. Answers are in the order of their questions, as
    many of each.

    Warns:
        TemplateInQuestionWarning, SpecialTokenWarning, StrippedQuestionWarning, JoinedWordsWarning: as
            `PromptFormat.encode`.
    """
    answers = list(answers)
    if system is not None:
        check_text("system prompt", system)
    many = len(questions) > 1
    asked = [texts_of(as_question(question)) for question in questions]
    stripped = sum(any(text != text.strip() for text in one) for one in asked) if prompt_format.strip else 0
    if stripped:
        of = f"{stripped} of {len(questions)} questions" if many else "the question"
        warnings.warn(
            f"blanks around {of} are left out in the format {prompt_format.name!r}, as in the CAA authors' code: "
            "strip them yourself, or keep them with dataclasses.replace(prompt_format, strip=False)",
            StrippedQuestionWarning,
            stacklevel=3,
        )
    if not questions:
        return
    of_each = len(answers) // len(questions)
    joined = [
        (one[-1], answer)
        for n, one in enumerate(asked)
        for answer in answers[n * of_each : (n + 1) * of_each]
        if prompt_format.separator == "" and _are_joined(one[-1], answer)
    ]
    if joined and prompt_format.render("words", None).endswith("words"):
        before, after = joined[0]
        of = f"{len(joined)} of {len(answers)} answers follow" if many else "the answer follows"
        seam = before.split()[-1] + after.split()[0]
        warnings.warn(
            f"{of} the text without a blank in the format {prompt_format.name!r}, as in {seam!r}: begin answers with "
            "the blank, as in [(pair.question, ' ' + pair.positive, ' ' + pair.negative) for pair in pairs]",
            JoinedWordsWarning,
            stacklevel=3,
        )
    if tokenizer is None:
        return
    special = () if prompt_format.special_tokens_as_text else special_tokens(tokenizer)
    marks = (*special, "[INST]")
    texts = [*(text for one in asked for text in one), *answers, system or ""]
    found = [mark for mark in marks if any(mark in text for text in texts)]
    if not found:
        return
    around = prompt_format.render("words", None)
    twice = [mark for mark in found if mark in around and any(mark in text for one in asked for text in one)]
    if twice:
        n = sum(any(mark in text for mark in twice for text in one) for one in asked)
        of = f"{n} of {len(questions)} questions contain" if many else "the question contains"
        warnings.warn(
            f"{of} {_listed(twice)}, {'marks' if len(twice) > 1 else 'a mark'} of the format {prompt_format.name!r}, "
            "which the model then sees twice: give the bare question, or a Prompt, which is taken as it is",
            TemplateInQuestionWarning,
            stacklevel=3,
        )
    controls = [mark for mark in found if mark in special and mark not in twice]
    if controls:
        n = sum(any(mark in text for mark in controls) for text in texts)
        of = f"{n} of {len(texts) - (not system)} questions and answers contain" if many else "the words contain"
        warnings.warn(
            f"{of} {_listed(controls)}, which the tokenizer takes for control tokens, not for text: take them out, or "
            "encode them as text with dataclasses.replace(prompt_format, special_tokens_as_text=True)",
            SpecialTokenWarning,
            stacklevel=3,
        )


def _are_joined(text: str, answer: str) -> bool:
    """Whether a blank is missing between both; scripts of wide characters are written without."""
    if not text or not answer or "W" in map(unicodedata.east_asian_width, (text[-1], answer[0])):
        return False
    return (text[-1].isalnum() or text[-1] in ".,;:?!)") and answer[0].isalnum()


def _listed(marks: Sequence[str]) -> str:
    return ", ".join(map(repr, marks[:4])) + (f" and {len(marks) - 4} more" if len(marks) > 4 else "")
