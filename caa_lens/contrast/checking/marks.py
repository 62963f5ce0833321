"""Marks that tokenizers and chat templates mean, in the words of pairs; answers that do not begin with a token."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from caa_lens.arguments import describe
from caa_lens.contrast.checking.findings import Finding, asked, examples, short, words
from caa_lens.contrast.messages import Asked, last_words, texts_of
from caa_lens.contrast.pair import ContrastPair

MARKS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk|mask)>|\[(?:CLS|SEP|PAD|UNK|MASK)\]|<extra_id_\d+>"
    r"|\n\n(?:Human|Assistant):|^### (?:Instruction|Response|Human|Assistant|User):",
    re.MULTILINE,
)


def marks(pairs: Sequence[ContrastPair], tokenizer: Any = None) -> list[Finding]:
    """Special tokens and marks of chat templates: those that are known, and the tokenizer's own."""
    own = [re.escape(one) for one in getattr(tokenizer, "all_special_tokens", ()) if one.strip()]
    pattern = re.compile("|".join([MARKS.pattern, *own]), re.MULTILINE)
    rows, counts = [], Counter[str]()
    for n, pair in enumerate(pairs, start=1):
        found = {
            m[0].strip()
            for text in (*texts_of(pair.question), pair.positive, pair.negative)
            for m in pattern.finditer(text)
        }
        counts.update(found)
        if found:
            rows.append(n)
    if not rows:
        return []
    told = ", ".join(f"{mark!r} in {n}" for mark, n in counts.most_common(3))
    message = f"{len(rows)} of {len(pairs)}: marks of tokenizers or chat templates ({told}); take them out"
    return [Finding(finding="special tokens", message=message, rows=tuple(rows), examples=examples(pairs, rows))]


def without_question(pairs: Sequence[ContrastPair]) -> list[Finding]:
    """Pairs that ask nothing: of A/B pairs, there are options only."""
    rows = tuple(n for n, pair in enumerate(pairs, start=1) if not words(asked(pair)))
    message = f"{len(rows)} of {len(pairs)}: nothing is asked; leave them out"
    return [Finding(finding="no question", message=message, rows=rows, examples=examples(pairs, rows))] if rows else []


def within_tokens(pairs: Sequence[ContrastPair], tokenizer: Any) -> list[Finding]:
    """Answers whose first character lies inside of a token that begins before them, or is a blank joined to it.

    The answer stands where prompts have it: right behind the tokenizer's own chat template; one blank behind Llama 2's,
    or behind `Response:` where there is no template. A token that begins with just this blank is the answer's.
    """
    rows: list[int] = []
    told: list[str] = []
    for n, pair in enumerate(pairs, start=1):
        before, gap = _rendered(tokenizer, pair.question)
        for answer in (pair.positive, pair.negative):
            start = len(before) + len(gap)
            text = before + gap + answer
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            across = next(((a, b) for a, b in offsets if a < start < b), None)
            if across and (across[0] < len(before) or not text[start : across[1]].strip()):
                rows.append(n)
                told.append(f"pair {n}: {short(answer, 30)!r} begins within the token {text[across[0] : across[1]]!r}")
                break
    if not rows:
        return []
    message = (
        f"{len(rows)} of {len(pairs)}: answers that begin in the middle of a token; take off the blanks before them"
    )
    return [Finding(finding="tokens", message=message, rows=tuple(rows), examples=tuple(told[:3]))]


def tokenizer_of(given: Any) -> Any:
    """The tokenizer of a model, or the tokenizer itself.

    Raises:
        TypeError: for anything else, or a tokenizer without character offsets.
    """
    found = getattr(given, "tokenizer", given)
    if not callable(found) or not getattr(found, "is_fast", False):
        raise TypeError(
            "expected a model with a tokenizer that gives character offsets (a fast one), or such a tokenizer, got "
            f"{describe(given)}"
        )
    return found


def _rendered(tokenizer: Any, question: Asked) -> tuple[str, str]:
    """What stands before an answer, behind the last turn of a conversation; and what is between the two."""
    if not getattr(tokenizer, "chat_template", None):
        return f"Input: {last_words(question)}\nResponse:", " "
    messages = [{"role": "user", "content": last_words(question)}]
    before = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # Llama 2's mark is no token of its own, and its format has a blank behind it; other models' marks are tokens.
    is_llama2 = before.endswith("[/INST]") and len(tokenizer.tokenize("[/INST]")) > 1
    return before, " " if is_llama2 else ""
