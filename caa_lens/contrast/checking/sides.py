"""What tells the sides of a set apart and may not be the behavior: the answers' lengths, and single words.

Both are sign tests over pairs. A length counts where answers on one side are longer (in words) in two of three pairs
that differ, by a tenth in the mean, and p < 0.001. A word counts where it stands in a quarter of the answers of one
side (grammar, such as "I" or "the", in nine of ten: without it many a behavior cannot be worded), on the other side a
tenth as often at most, and where its p, times the number of words that could show anything, is below 0.01 (Tarone 1990:
a word of k occurrences has no p below 2^(1-k), so rare words need not be corrected for). The bundled sets have 0.69 and
3 % in length at most, and no word of one side in more than a seventh of its answers but "I", "I'm" and "not".
"""

from collections import Counter
from collections.abc import Sequence

from caa_lens.contrast.checking.findings import SHOWN, Finding, said, words
from caa_lens.contrast.pair import ContrastPair

LONGER, BY = 2 / 3, 1.1
P_LENGTH, P_WORDS = 1e-3, 1e-2
SHARE, SHARE_OF_GRAMMAR, ELSEWHERE = 0.25, 0.9, 0.1
FEWEST = 20  # pairs, below which a word of grammar says nothing
_GRAMMAR = """
    a an the and or but so as if because than then that this these those when where while
    i me my mine you your yours we us our ours he him his she her hers it its they them their one
    i'm i'd i'll i've you'd you'll you're you've it's we're we've they're that's there's he's she's
    is are was were be been being am do does did have has had can could will would shall should may must
    can't won't don't isn't doesn't didn't wouldn't couldn't cannot not
    of to in on at for with from by about into over out up off down through
    there here what which who whom whose how why each every any some all more most only just very too also
"""
GRAMMAR = frozenset(_GRAMMAR.split())


def lengths(pairs: Sequence[ContrastPair]) -> list[Finding]:
    """Answers of one side that are longer than the other's."""
    counts = [(len(words(said(pair, "positive"))), len(words(said(pair, "negative")))) for pair in pairs]
    of_side = {
        "positive": [n for n, (positive, negative) in enumerate(counts, start=1) if positive > negative],
        "negative": [n for n, (positive, negative) in enumerate(counts, start=1) if positive < negative],
    }
    side = max(of_side, key=lambda one: len(of_side[one]))
    longer, n_differ = of_side[side], sum(map(len, of_side.values()))
    means = [sum(column) / len(pairs) for column in zip(*counts, strict=True)]
    if not n_differ or len(longer) < LONGER * n_differ or max(means) < BY * min(means):
        return []
    if means[0 if side == "positive" else 1] < max(means) or sign_test(len(longer), n_differ - len(longer)) >= P_LENGTH:
        return []
    what = "option" if pairs[0].is_ab else "answer"
    guess = "the letter can be guessed from the option's length" if pairs[0].is_ab else "length is in the vector, too"
    message = (
        f"the {side} {what} is the longer one in {len(longer)} of {len(pairs)} pairs ({means[0]:.1f} words positive, "
        f"{means[1]:.1f} negative in the mean): {guess}"
    )
    return [Finding(finding="length", message=message, rows=tuple(longer))]


def one_sided_words(pairs: Sequence[ContrastPair]) -> list[Finding]:
    """Words that (nearly) only one side's answers have."""
    of_side = {side: [set(words(said(pair, side))) for pair in pairs] for side in ("positive", "negative")}
    counts = {side: Counter(word for one in texts for word in one) for side, texts in of_side.items()}
    alone: dict[str, list[int]] = {}
    for positive, negative in zip(*of_side.values(), strict=True):
        for word in positive ^ negative:
            alone.setdefault(word, [0, 0])[word in negative] += 1
    most = _corrected([sum(both) for both in alone.values()], P_WORDS)
    found: list[tuple[int, str, str, int]] = []
    for word, both in alone.items():
        side, other = ("positive", "negative") if both[0] > both[1] else ("negative", "positive")
        n_side, n_other = counts[side][word], counts[other][word]
        if word in GRAMMAR and len(pairs) < FEWEST:
            continue
        share = SHARE_OF_GRAMMAR if word in GRAMMAR else SHARE
        if n_side >= share * len(pairs) and n_other <= ELSEWHERE * n_side and sign_test(*both) < most:
            found.append((n_side, word, side, n_other))
    if not found:
        return []
    found.sort(key=lambda one: (-one[0], one[1]))
    rows = sorted({n for _, word, side, _ in found for n, has in enumerate(of_side[side], start=1) if word in has})
    told = tuple(f"{word!r} in {n} {side} answers and {m} of the others" for n, word, side, m in found[:SHOWN])
    more = f"{len(found)} words stand" if len(found) > 1 else "one word stands"
    message = (
        f"{more} on one side only, or nearly ({'; '.join(told)}): the vector may be of the word, not of the behavior"
    )
    return [Finding(finding="words", message=message, rows=tuple(rows), examples=told)]


def sign_test(one: int, other: int) -> float:
    """Two-sided p of so many pairs one way and so many the other, if both ways are as likely."""
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def _corrected(numbers: Sequence[int], p: float) -> float:
    """What a p has to be below, so that of all tests together a false one is found with probability `p` (Tarone)."""
    by_count = Counter(numbers)
    tests = 1
    while sum(n for count, n in by_count.items() if 2.0 ** (1 - count) < p / tests) > tests:
        tests += 1
    return p / tests
