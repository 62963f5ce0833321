"""A word as the tokens that stand for it in a vocabulary."""

import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from caa_lens.arguments import describe, is_unicode


def word_tokens(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Token ids of a word: the single token with a leading blank, or without, or else the pieces with one."""
    if tokenizer is None:
        raise TypeError("this model has no tokenizer: load it from a folder that has tokenizer files")
    found = []
    for text in (" " + word.strip(), word.strip()):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        while len(tokens) > 1 and not tokenizer.convert_ids_to_tokens(tokens[0]).strip("▁Ġ"):
            tokens = tokens[1:]  # sentencepiece puts a blank of its own before a text, so this one stands alone
        found.append(tuple(tokens))
    chosen = next((tokens for tokens in found if len(tokens) == 1), found[0])
    if not chosen or chosen[0] == tokenizer.unk_token_id != tokenizer.eos_token_id:
        raise ValueError(f"the tokenizer has no token for {word!r}: choose another word")
    return chosen


def check_words(words: object) -> list[str]:
    """Distinct words, in order.

    Raises:
        TypeError: for one string, or anything but a list of texts.
        ValueError: for no words, or one that is empty or no valid Unicode.
    """
    if isinstance(words, str):
        raise TypeError(f"expected a list of words, got the string {words!r}: put it into a list")
    if not isinstance(words, Iterable):
        raise TypeError(f"expected a list of words, got {describe(words)}")
    found = list(words)
    if not found:
        raise ValueError("no words given: expected at least one")
    for word in found:
        if not isinstance(word, str):
            raise TypeError(f"expected a list of words, got {describe(word)} among them")
        if not word.strip() or not is_unicode(word):
            raise ValueError(f"got {word!r} among the words, expected some text")
    return list(dict.fromkeys(found))


def behavior_words(behavior: str) -> list[str]:
    """Twenty words of a bundled behavior's positive side, which no code was tuned on; none for other behaviors."""
    text = (files("caa_lens.interpretation") / "data" / "behavior_words.json").read_text(encoding="utf-8")
    of_behavior = json.loads(text).get(behavior)
    return list(of_behavior["held_out"]) if isinstance(of_behavior, dict) else []


def show_token(tokenizer: Any, token: int) -> str:
    """A token's text with what does not print made visible.

    `␣` is a blank; `…ful` is a lower-case piece without one, which goes on with a word; control characters are escaped
    (`\\n`); a part of a character is the tokenizer's own name for it, quoted. Without a tokenizer, or for a row of the
    unembedding that no token has, it is the id: `[7]`.
    """
    piece = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"[{token}]"
    # The piece, not decode, says whether there is a blank: Llama 2's decode drops it from a single token.
    text = piece.replace("▁", " ") if piece.startswith("▁") else tokenizer.decode([token])
    if piece.startswith("Ġ") and not text.startswith(" "):
        text = " " + text
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return repr(piece)
    n_blanks = len(text) - len(text.lstrip(" "))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[n_blanks:])
    return "␣" * n_blanks + ("…" if text[0].islower() else "") + shown
