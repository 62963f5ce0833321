"""One text to token ids and the characters each covers; a user's special tokens as control tokens, or as text.

A tokenizer takes the characters `</s>` for the end of a sequence wherever they stand. Encoded *as text*, those of the
user become ordinary characters, while those that the format itself wrote stay control tokens: the format's are found
in a text of the same length in which the user's are masked, and what lies between two of them is tokenized without
special tokens.
"""

import re
from collections.abc import Sequence
from typing import Any

Encoded = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the half-open span of characters that each token covers."""

_MASKS = "\ue000\uf8ff\u2400\u25a1"  # a character that no text here holds stands for every one of a special token


def check_offsets(tokenizer: Any) -> None:
    """Raises `TypeError` if a tokenizer is missing, or gives no character offsets."""
    if tokenizer is None:
        raise TypeError("this model has no tokenizer: load it from a folder that has tokenizer files")
    if not tokenizer.is_fast:
        raise TypeError(
            f"{type(tokenizer).__name__} gives no character offsets, which positions are computed from: "
            "load the fast tokenizer (AutoTokenizer with use_fast=True)"
        )


def encode_whole(tokenizer: Any, text: str, *, as_text: bool = False) -> Encoded:
    """Tokenize a text at once, without adding anything to it."""
    options = {"split_special_tokens": True} if as_text else {}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def special_tokens(tokenizer: Any) -> list[str]:
    """Every text that becomes a control token, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(texts, key=lambda text: (-len(text), text))


def find_special_tokens(tokenizer: Any, text: str) -> list[str]:
    """Those that stand in a text, each once."""
    return [token for token in special_tokens(tokenizer) if token in text]


def mask(tokenizer: Any, *texts: str) -> list[str]:
    """Texts of the same length without special tokens, for `encode_as_text`."""
    pattern = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
    filler = next(character for character in _MASKS if not any(character in text for text in texts))
    return [pattern.sub(lambda found: filler * len(found[0]), text) for text in texts]


def encode_as_text(tokenizer: Any, text: str, masked: str) -> Encoded:
    """Tokenize a text in which only the special tokens that are not masked in `masked` are control tokens.

    Without masked ones it is `encode_whole`, number for number.

    Raises:
        ValueError: if the tokenizer encodes a part of a text otherwise than the same part alone.
    """
    tokens, spans = encode_whole(tokenizer, masked)
    special = set(special_tokens(tokenizer))
    controls = [i for i, (start, end) in enumerate(spans) if masked[start:end].strip() in special]
    found: Encoded = ([], [])
    for first, last in zip([-1, *controls], [*controls, len(tokens)], strict=True):
        if first >= 0:
            found[0].append(tokens[first])
            found[1].append(spans[first])
        between = slice(first + 1, last)
        start = spans[first][1] if first >= 0 else 0
        end = spans[last][0] if last < len(tokens) else len(text)
        if text[start:end] == masked[start:end]:
            found[0].extend(tokens[between])
            found[1].extend(spans[between])
            continue
        if encode_whole(tokenizer, masked[start:end])[0] != tokens[between]:
            raise ValueError(
                f"this tokenizer cannot encode {text[start:end]!r} as text behind a control token: take the special "
                "tokens out of the text, or leave special_tokens_as_text out"
            )
        ids, within = encode_whole(tokenizer, text[start:end], as_text=True)
        found[0].extend(ids)
        found[1].extend((start + a, start + b) for a, b in within)
    return found


def token_span(spans: Sequence[tuple[int, int]], first_char: int, last_char: int, text: str) -> tuple[int, int]:
    """Half-open span of the tokens that overlap the characters `[first_char, last_char)` of a text.

    Raises:
        ValueError: if no token does, as the tokenizer drops these characters.
    """
    touching = [i for i, (start, end) in enumerate(spans) if start < last_char and end > first_char]
    if not touching:
        raise ValueError(
            f"the tokenizer drops {text[first_char:last_char]!r}, so no token stands for it: leave it out of the text"
        )
    return touching[0], touching[-1] + 1
