"""Several texts that begin alike as one row of tokens, in which what they share stands once.

Two answers to a question often begin with the same words, and are of unequal length. As two rows of a batch they would
be padded to the longer one, and their common beginning would run twice. A tree has every token once, in the order of
the texts, and says of each which one is before it::

    tokens     It  was  fine  awful          texts  "It was fine", "It was awful"
    parents    -1   0    1     1

A token sees its ancestors and itself, and stands at the position of its depth. What is done to the stream must then be
the same at every position, since one row has positions of several texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTree:
    """Texts with their common beginnings shared.

    Attributes:
        tokens: every token once; a parent stands before its children.
        parents: for each the index of the token before it; -1 for the first of a text.
        places: for each text, the indices of its tokens.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "TokenTree":
        tokens: list[int] = []
        parents: list[int] = []
        known: dict[tuple[int, int], int] = {}  # by parent and token
        places = []
        for text in texts:
            at, place = -1, []
            for token in text:
                if (at, token) not in known:
                    known[at, token] = len(tokens)
                    tokens.append(token)
                    parents.append(at)
                at = known[at, token]
                place.append(at)
            places.append(tuple(place))
        return cls(tokens=tuple(tokens), parents=tuple(parents), places=tuple(places))

    def __len__(self) -> int:
        return len(self.tokens)
