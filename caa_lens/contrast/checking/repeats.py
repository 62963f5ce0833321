"""Pairs that stand in a set more than once: as they are, nearly, with their answers or options exchanged, in two parts.

Near duplicates share at least 7 in 10 of their pairs of neighbouring words (Jaccard index of the sets of bigrams),
without those that more than half of all pairs have, such as "Is the following statement something you would say?". One
word changed in a pair of thirty changes two of about thirty bigrams. Nearest pairs of the bundled sets share 13 %.

Not all pairs are compared: 64 hashes of each set of bigrams (MinHash, Broder 1997) are cut into 16 bands of four, and
a pair is compared with the first three that agree with it in a band, so the time grows with the number of pairs and not
with its square. Two pairs that share 0.7 agree in some band with probability 1 - (1 - 0.7^4)^16 = 0.988, and two that
share 0.8 with 0.9998.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from caa_lens.contrast.checking.findings import Finding, asked, examples, plain, said, words
from caa_lens.contrast.pair import ContrastPair

ALIKE = 0.7  # of the bigrams
COMMON = 0.5  # what more of all pairs have is a frame around them
FEWEST = 6  # bigrams that both have together: less is too short to be told from chance
N_HASHES, BAND, COMPARED = 64, 4, 3

Content = tuple[str, str, str]


def repeated(pairs: Sequence[ContrastPair]) -> list[Finding]:
    """Duplicates, near duplicates, mirrored pairs, and options in both orders."""
    contents = [content(pair) for pair in pairs]
    first: dict[tuple[object, ...], int] = {}
    orders: dict[Content, int] = {}
    exact: list[int] = []
    exchanged: list[int] = []
    mirrored: list[int] = []
    for n, (pair, (question, positive, negative)) in enumerate(zip(pairs, contents, strict=True), start=1):
        if (key := (question, positive, negative, pair.positive if pair.is_ab else "")) in first:
            exact.append(n)
            continue
        first[key] = n
        if (question, positive, negative) in orders:
            exchanged.append(n)
        elif (question, negative, positive) in orders:
            mirrored.append(n)
        orders.setdefault((question, positive, negative), n)
    near = _near(contents, {*exact, *exchanged, *mirrored})
    found = []
    if exact:
        why = "the same as a pair before, which then counts twice: leave them out"
        found.append(_finding(pairs, "duplicates", exact, why))
    if near:
        rows = sorted(near)
        found.append(
            Finding(
                finding="near duplicates",
                message=f"{len(rows)} of {len(pairs)}: most of their words are those of a pair before",
                rows=tuple(rows),
                examples=tuple(
                    f"{one}, like pair {near[n]}" for one, n in zip(examples(pairs, rows), rows, strict=False)
                ),
            )
        )
    if mirrored:
        why = "the answers of a pair before the other way round: the two differences cancel to zero; leave out one"
        found.append(_finding(pairs, "mirrored", mirrored, why))
    if exchanged:
        why = "a pair before with its options exchanged: a random split puts one of both into either part"
        found.append(_finding(pairs, "both orders", exchanged, why))
    return found


def in_both(pairs: Sequence[ContrastPair], other: Sequence[ContrastPair], name: str) -> list[Finding]:
    """Pairs of a set that are, or nearly are, in another."""
    contents, others = [content(pair) for pair in pairs], [content(pair) for pair in other]
    there = {frozenset(("q" + q, p, n)) for q, p, n in others}
    same = {n for n, (q, pos, neg) in enumerate(contents, start=1) if frozenset(("q" + q, pos, neg)) in there}
    matched = _near([*others, *contents], set(), n_first=len(others))
    rows = sorted(same | {n - len(others) for n in matched})
    if not rows:
        return []
    nearly = f", {len(rows) - len(same)} of them nearly" if len(rows) > len(same) else ""
    what = f"{len(rows)} of {len(pairs)}: in {name!r}, too{nearly}, which is not held out then; leave them out"
    return [Finding(finding="in both", message=what, rows=tuple(rows), examples=examples(pairs, rows))]


def content(pair: ContrastPair) -> Content:
    """Question, positive and negative answer, whatever the letters and the case."""
    return plain(asked(pair)), plain(said(pair, "positive")), plain(said(pair, "negative"))


def _finding(pairs: Sequence[ContrastPair], name: str, rows: list[int], why: str) -> Finding:
    return Finding(
        finding=name, message=f"{len(rows)} of {len(pairs)}: {why}", rows=tuple(rows), examples=examples(pairs, rows)
    )


def _near(contents: Sequence[Content], but: set[int], n_first: int | None = None) -> dict[int, int]:
    """Of each text that is like one before, the number of that one; of two parts, those of the second only."""
    numbers = [n for n in range(1, len(contents) + 1) if n not in but]
    sets = _bigrams([contents[n - 1] for n in numbers])
    signatures = _signatures(sets)
    found: dict[int, int] = {}
    for start in range(0, N_HASHES, BAND):
        seen: dict[bytes, list[int]] = defaultdict(list)
        for i, key in enumerate(np.ascontiguousarray(signatures[:, start : start + BAND])):
            is_later = n_first is not None and numbers[i] > n_first
            agree = seen[key.tobytes()]
            if numbers[i] in found:
                continue
            if n_first is None or is_later:
                like = next((before for before in agree if _alike(sets[before], sets[i])), None)
                if like is not None:
                    found[numbers[i]] = numbers[like]
                    continue
            if not is_later and len(agree) < COMPARED:
                agree.append(i)
    return found


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    short, long = sorted((len(one), len(other)))
    if short < ALIKE * long:
        return False
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = short + long - both
    return either >= FEWEST and both >= ALIKE * either


def _bigrams(contents: Sequence[Content]) -> list[np.ndarray]:
    """The distinct pairs of neighbouring words of each, as numbers."""
    vocabulary: dict[str, int] = {}
    found = []
    for question, positive, negative in contents:
        # Sorted, so that the same two answers give the same bigrams on either side.
        ids = [
            vocabulary.setdefault(word, len(vocabulary))
            for text in (question, *sorted((positive, negative)))
            for word in words(text)
        ]
        codes = np.array(ids, dtype=np.uint64)
        found.append(np.unique(codes[:-1] << np.uint64(32) | codes[1:]) if len(codes) > 1 else codes)
    every, counts = np.unique(np.concatenate(found), return_counts=True) if found else (np.empty(0), np.empty(0))
    common = every[counts > max(2, COMMON * len(found))]
    return [np.setdiff1d(one, common, assume_unique=True) for one in found] if len(common) else found


def _signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash of each set, `[set hash]`; an empty set is like no other."""
    generator = np.random.default_rng(0)
    lengths = np.array([len(one) for one in sets])
    signatures = generator.integers(0, 2**63, size=(len(sets), N_HASHES), dtype=np.uint64)
    filled = [i for i, one in enumerate(sets) if len(one)]
    if not filled:
        return signatures
    codes = np.concatenate([sets[i] for i in filled])
    starts = np.concatenate([[0], np.cumsum(lengths[filled])[:-1]])
    for k in range(N_HASHES):
        salt = generator.integers(0, 2**63, dtype=np.uint64)
        mixed = (codes ^ salt) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        signatures[filled, k] = np.minimum.reduceat(mixed, starts)
    return signatures
