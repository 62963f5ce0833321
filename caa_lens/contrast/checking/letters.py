"""Letters of A/B pairs that give the answer away, and letters that were not taken for such."""

import re
from collections import Counter
from collections.abc import Sequence

from caa_lens.contrast.checking.findings import Finding, examples
from caa_lens.contrast.checking.sides import sign_test
from caa_lens.contrast.messages import last_words
from caa_lens.contrast.pair import ContrastPair

P_PLACE, OF_CHANCE = 1e-3, 1.5  # how often a place may be right, in units of chance
# (1), 1., a), [b], (iv), Option 2: what marks an option, and is not `(A)`.
_LABEL = re.compile(r"(?:(?:option|choice|answer)\s+)?([(\[]?)(\d{1,2}|[a-z]|[ivx]{1,4})([)\].:]?)", re.IGNORECASE)


def uneven(pairs: Sequence[ContrastPair]) -> tuple[str, Counter[str]] | None:
    """The side on which one letter is over 0.6 of the answers (of 4 to 9 pairs: all of them), and its letters."""
    if not pairs[0].is_ab or len(pairs) < 4:
        return None
    most = 0.6 * len(pairs) if len(pairs) >= 10 else len(pairs) - 1
    for side in ("positive", "negative"):
        # Beyond two options one side can be even while the other is not.
        counts = Counter(str(getattr(pair, side)) for pair in pairs)
        if max(counts.values()) > most:
            return side, counts
    return None


def letters(pairs: Sequence[ContrastPair]) -> list[Finding]:
    """Uneven letters, and options whose place tells the positive one."""
    if not pairs[0].is_ab:
        return []
    if found := uneven(pairs):
        side, counts = found
        common = counts.most_common(1)[0][0]
        split = ", ".join(f"{letter} {n}" for letter, n in sorted(counts.items()))
        message = f"the {side} answers are {split}: the vector is mostly the letter; use .balance_letters()"
        rows = tuple(n for n, pair in enumerate(pairs, start=1) if getattr(pair, side) == common)
        return [Finding(finding="letters", message=message, rows=rows)]
    places = [(list(pair.options).index(pair.positive), len(pair.options)) for pair in pairs]
    if max(n for _, n in places) == 2:
        return []  # there the place is the letter
    chance = sum(1 / n for _, n in places)
    for name, right in (("first", [p == 0 for p, _ in places]), ("last", [p == n - 1 for p, n in places])):
        rows = tuple(n for n, is_right in enumerate(right, start=1) if is_right)
        if len(rows) > OF_CHANCE * chance and sign_test(len(rows), len(pairs) - len(rows)) < P_PLACE:
            message = (
                f"the positive option is the {name} one in {len(rows)} of {len(pairs)} pairs, {chance:.0f} by chance: "
                "the answer can be guessed from its place; mix the options"
            )
            return [Finding(finding="place", message=message, rows=rows)]
    return []


def labels_as_completions(pairs: Sequence[ContrastPair]) -> list[Finding]:
    """Answers such as `(1)` or `b.`, whose options stand in the question: read as completions, not as letters."""
    if pairs[0].is_ab:
        return []
    rows = tuple(
        n for n, pair in enumerate(pairs, start=1) if _is_label(pair, "positive") and _is_label(pair, "negative")
    )
    if not rows:
        return []
    message = (
        f"{len(rows)} of {len(pairs)}: answers that name options ({pairs[rows[0] - 1].positive!r}), taken for "
        "completions; write options in lines such as ' (A) Yes', and answers '(A)'"
    )
    return [Finding(finding="labels", message=message, rows=rows, examples=examples(pairs, rows))]


def _is_label(pair: ContrastPair, side: str) -> bool:
    label = _LABEL.fullmatch(str(getattr(pair, side)).strip())
    if label is None:
        return False
    if label[1] and label[3]:
        return True
    mark = rf"(?:\A|\s)[(\[]?{re.escape(label[2])}[)\].:]"  # a bare number may be an answer, unless it marks an option
    return re.search(mark, last_words(pair.question), re.IGNORECASE) is not None
