"""A contrast pair: a question with an answer that shows a behavior and one that does not.

It is *A/B*, with options inside the question and letters as answers, or holds two full *completions*.
"""

import re
from collections import Counter
from dataclasses import dataclass

from caa_lens.contrast.errors import FieldError
from caa_lens.contrast.messages import Asked, Question, as_question, last_words, with_last_words
from caa_lens.contrast.rows import LETTER

_OPTION = re.compile(r"^[ \t]*(\([A-Z]\))", re.MULTILINE)
_RESTART = re.compile(r"^[ \t]*\([A-Z]\).*\n\s*\(A\)", re.MULTILINE)
_BARE_LETTER = re.compile(r"(?=[A-Z(])\(?([A-Za-z])[).:]?")  # a letter that is not written as `LETTER` is
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastPair:
    """One question and its two answers.

    Raises:
        ValueError: a text is empty, the answers are equal, or a letter is not among the question's options.
    """

    question: Asked
    """What is asked: a text, or messages; of an A/B pair with the options: `...\\n\\nChoices:\\n (A) Yes\\n (B) No`.

    A list of messages (`{"role": ..., "content": ...}`) becomes a `Conversation`, or the text of the user's only one.
    """
    positive: str
    """The answer that shows the behavior: a letter such as `(A)`, without blanks, or a full completion."""
    negative: str
    """The answer that does not show it, of the same kind."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", as_question(self.question, "question"))
        answers = {"positive": self.positive, "negative": self.negative}
        for field, text in {"question": last_words(self.question), **answers}.items():
            if not text.strip():
                raise FieldError(field, repr(text), "text")
            if field in answers and LETTER.fullmatch(text.strip()) and text != text.strip():
                raise FieldError(field, repr(text), f"{text.strip()!r}, without blanks around it")
        if self.positive.strip() == self.negative.strip():
            raise FieldError("negative", repr(self.negative), "another answer than the positive one")
        letters = [field for field, answer in answers.items() if LETTER.fullmatch(answer)]
        if len(letters) == 1:
            raise FieldError(letters[0], repr(answers[letters[0]]), "a full completion, as the other answer is")
        if letters:
            self._check_options(answers)
            return
        bare = [_BARE_LETTER.fullmatch(answer.strip()) for answer in answers.values()]
        if bare[0] and bare[1]:
            wanted = (
                f"'({bare[0][1].upper()})' where the question has options, in lines such as ' (A) Yes'; or else words"
            )
            raise FieldError("positive", repr(self.positive), wanted)

    def _check_options(self, answers: dict[str, str]) -> None:
        question = last_words(self.question)
        letters = [letter for letter, _, _ in _option_spans(question)]
        if letters != [f"({chr(ord('A') + i)})" for i in range(len(letters))] or _RESTART.search(question):
            found = " ".join(mark[1] for mark in _OPTION.finditer(question))
            raise FieldError("question", f"the options {found}", "each letter once, in order from (A)")
        for field, answer in answers.items():
            if answer not in letters:
                offered = ", ".join(letters) or "none: no line starts with (A)"
                raise FieldError(field, repr(answer), f"a letter of the question's options ({offered})")
        texts = Counter(self.options.values())
        if "" in texts or max(texts.values()) > 1:
            text = "" if "" in texts else texts.most_common(1)[0][0]
            raise FieldError("question", f"{texts[text]} options {text!r}", "options with texts that differ")

    @property
    def is_ab(self) -> bool:
        """Whether the answers are letters of options in the question, not full completions."""
        return LETTER.fullmatch(self.positive) is not None

    @property
    def options(self) -> dict[str, str]:
        """The text of each letter's option, `{"(A)": "Yes", "(B)": "No"}`; empty for completions.

        Options are lines that start with a letter in brackets, from the question's last `(A)` on: of a conversation, of
        its last message. A text may span lines. The last one ends at a blank line: a closing instruction after it is no
        option's text.
        """
        if not self.is_ab:
            return {}
        question = last_words(self.question)
        return {letter: question[start:end] for letter, start, end in _option_spans(question)}

    @property
    def stem(self) -> str:
        """The question up to its first option's text; the whole question of completions. Of messages, as one text."""
        return str(self.without_options)

    @property
    def without_options(self) -> Question:
        """The question up to its first option's text, as text or messages; the whole question of completions."""
        if not self.is_ab:
            return as_question(self.question)
        question = last_words(self.question)
        _, start, _ = _option_spans(question)[0]
        return with_last_words(self.question, question[:start])

    def swapped(self) -> "ContrastPair":
        """The same pair with the texts of its two options, and so its letters, exchanged; twice is the pair.

        Every other character of the question stays as it is.

        Raises:
            ValueError: the answers are completions, or an option has a blank line inside: what follows that
                line would be taken for a closing instruction if the option came last.
        """
        if not self.is_ab:
            raise ValueError(f"got completions for {str(self.question)!r}: only an A/B pair has options to swap")
        for letter, text in self.options.items():
            if _BLANK_LINE.search(text):
                raise ValueError(f"option {letter} of {str(self.question)!r} has a blank line: take it out to swap")
        q = last_words(self.question)
        spans = {letter: (start, end) for letter, start, end in _option_spans(q)}
        (a, b), (c, d) = sorted([spans[self.positive], spans[self.negative]])
        question = with_last_words(self.question, q[:a] + q[c:d] + q[b:c] + q[a:b] + q[d:])
        return ContrastPair(question=question, positive=self.negative, negative=self.positive)


def _option_spans(question: str) -> list[tuple[str, int, int]]:
    """Letter, start and end of every option's text from the last `(A)` on, without the blanks around it."""
    marks = list(_OPTION.finditer(question))
    first = max((i for i, mark in enumerate(marks) if mark[1] == "(A)"), default=len(marks))
    marks = marks[first:]
    if not marks:
        return []
    blank = _BLANK_LINE.search(question, marks[-1].end())
    ends = [mark.start() for mark in marks[1:]] + [blank.start() if blank else len(question)]
    spans = []
    for mark, end in zip(marks, ends, strict=True):
        text = question[mark.end() : end]
        start = end - len(text.lstrip())
        spans.append((mark[1], start, start + len(text.strip())))
    return spans
