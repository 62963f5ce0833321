"""What a pair says of the direction that the other pairs share: held-out cosines, separation, influence.

The letter of an A/B pair is estimated from other pairs than it, and so that its error has nothing to do with that of
the direction: pair i is held out together with one of the opposite order, and each order has as many of the remaining
pairs (surplus ones sit out in turn). With unequal numbers the two errors would correlate, and pairs of pure noise would
agree or disagree by their letter.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from caa_lens.measures.agreement.letter_groups import LetterGroups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Weights that leave each pair out: one row a pair, one column each of the others.

    Attributes:
        direction: of the shared direction v of the others.
        letter: of the letter's effect on this pair's difference; zeros of a pair without letters.
        middle: of the mean of the others with the same letters.
    """

    direction: Float[np.ndarray, "pair pair"]
    letter: Float[np.ndarray, "pair pair"]
    middle: Float[np.ndarray, "pair pair"]


def held_out(groups: LetterGroups) -> HeldOut:
    """The weights of the others, for every pair."""
    n_pairs = groups.n_pairs
    if not groups.opposite:
        others = (1 - np.eye(n_pairs)) / (n_pairs - 1)
        return HeldOut(direction=others, letter=np.zeros((n_pairs, n_pairs)), middle=others)
    direction, letter, middle = (np.zeros((n_pairs, n_pairs)) for _ in range(3))
    for own, members in enumerate(groups.groups):
        for rank, pair in enumerate(members):
            for number, other in enumerate(groups.opposite):
                here, there = groups.groups[number], groups.groups[other]
                if own == number:
                    here = here[here != pair]
                if own == other:
                    there = there[there != pair]
                kept = min(len(here), len(there))
                chosen = np.roll(here, -rank - 1)[:kept]  # whoever sits out, it is another one for each pair
                direction[pair, chosen] = groups.shares[number] / kept
                if own == number == other:  # without letters
                    middle[pair, chosen] = 1 / kept
                elif own in (number, other):
                    letter[pair, chosen] = (0.5 if own == number else -0.5) / kept
                    middle[pair, chosen] = 0.5 / kept
    return HeldOut(direction=direction, letter=letter, middle=middle)


def held_out_cosines(gram: Float[np.ndarray, "pair pair"], weights: HeldOut) -> Float[np.ndarray, " pair"]:
    """The cosine of each pair's letter-free difference with the direction that the others share."""
    gaps, lengths, own = _gaps(gram, weights)
    return np.divide(gaps, own, out=np.zeros_like(gaps), where=(own > 0) & (lengths > 0))


def d_prime(gram: Float[np.ndarray, "pair pair"], across: Float[np.ndarray, "pair pair"], weights: HeldOut) -> float:
    """How far the sides of held-out pairs lie apart along the others' unit direction, in standard deviations of a side.

        d' = mean(positive - negative) / sqrt((var(positive) + var(negative)) / 2)

    The letter's effect is taken out of both sides, half each, and the middle of the others with the same letters off.

    Args:
        across: `difference_i . middle_j`, where a pair's middle is the mean of its two sides.
    """
    gaps, lengths, _ = _gaps(gram, weights)
    along = weights.direction @ across  # [held out, pair]: the middle of every pair along the direction without one
    middles = np.diag(along) - (weights.middle * along).sum(1)
    middles = np.divide(middles, lengths, out=np.zeros_like(middles), where=lengths > 0)
    spread = ((middles + gaps / 2).var(ddof=1) + (middles - gaps / 2).var(ddof=1)) / 2
    return float(gaps.mean() / np.sqrt(spread)) if spread > 0 else 0.0


def influences(gram: Float[np.ndarray, "pair pair"], groups: LetterGroups) -> Float[np.ndarray, " pair"]:
    """By how many degrees the shared direction turns when a pair is left out."""
    whole = groups.weights(np.ones((1, groups.n_pairs)))[0]
    without = groups.weights(1 - np.eye(groups.n_pairs))
    products = without @ gram @ whole
    sizes = np.sqrt(np.maximum(((without @ gram) * without).sum(1) * (whole @ gram @ whole), 0))
    cosines = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def _gaps(
    gram: Float[np.ndarray, "pair pair"], weights: HeldOut
) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
    """Of each held-out pair: its letter-free difference along the others' unit direction; their length; its length."""
    freed = np.eye(len(gram)) - weights.letter
    projected = freed @ gram
    products = (projected * weights.direction).sum(1)
    lengths = np.sqrt(np.maximum(((weights.direction @ gram) * weights.direction).sum(1), 0))
    own = np.sqrt(np.maximum((projected * freed).sum(1), 0))
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0), lengths, own
