"""What a check finds, and the texts of pairs as checks compare them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from caa_lens.contrast.pair import ContrastPair

SHOWN = 3  # examples of a finding
# A word, with its apostrophe; of scripts that write no blanks, a character.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+(?:['’]\w+)*"
)
_OPTIONS_HEAD = re.compile(r"\s*(?:(?:your )?(?:choices|answers|options):?)?\s*\(A\)\s*\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of fault in a contrast set."""

    finding: str
    """What it is called: `duplicates`, `words`, ..."""
    message: str
    """What was found, and what to do."""
    rows: tuple[int, ...]
    """Numbers of the pairs, counted from 1."""
    examples: tuple[str, ...] = ()


def said(pair: ContrastPair, side: str) -> str:
    """What an answer says: the completion, or the text of its option."""
    answer = str(getattr(pair, side))
    return pair.options[answer] if pair.is_ab else answer


def asked(pair: ContrastPair) -> str:
    """The question without its options."""
    return _OPTIONS_HEAD.sub("", pair.stem) if pair.is_ab else str(pair.question)


def plain(text: str) -> str:
    """A text without case, and with single blanks."""
    return " ".join(text.casefold().split())


def words(text: str) -> list[str]:
    """The words of a text, without case."""
    return WORD.findall(text.casefold())


def short(text: str, most: int = 60) -> str:
    """A text on one line, as an example shows it."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def examples(pairs: Sequence[ContrastPair], rows: Sequence[int]) -> tuple[str, ...]:
    """The first pairs of some rows, by number and question."""
    return tuple(f"pair {n}: {short(asked(pairs[n - 1]))!r}" for n in rows[:SHOWN])
