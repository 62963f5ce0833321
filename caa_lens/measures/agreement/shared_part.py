"""How much of the pairs' differences is one direction that all share, and how sure that is.

Everything is computed from the inner products of the letter-free differences, `gram[i, j] = d_i . d_j`, so that a
resample costs a product of matrices of pairs, whatever the model's width. With v the shared direction of a sample of
n pairs,

    noise   = expected squared error of v: over groups, share^2 x variance within the group / pairs of the group
    signal  = ||v||^2 - noise, which is unbiased for the true direction's squared length
    shared  = signal / (signal + n noise): what all pairs share of a pair's mean square, -1 / (n - 1) to 1
    cosine(m) = m shared / (1 + (m - 1) shared): of two vectors from m pairs each (Spearman and Brown's formula)

`cosine(n / 2)` is the split-half cosine: the mean inner product of the halves' vectors over all splits into two halves
(within groups), divided by their mean squared length.
"""

import numpy as np
from jaxtyping import Float

from caa_lens.measures.agreement.letter_groups import LetterGroups


def shared_part(
    gram: Float[np.ndarray, "pair pair"], groups: LetterGroups, counts: Float[np.ndarray, "draw pair"] | None = None
) -> Float[np.ndarray, " draw"]:
    """`shared` of each draw; of the pairs themselves, once each, if no draw is given.

    A pair that was drawn twice is not compared with itself: only different pairs can tell what pairs share.
    """
    counts = np.ones((1, len(gram))) if counts is None else counts
    squares = np.diag(gram)
    apart = gram - np.diag(squares)
    signal, noise = np.zeros(len(counts)), np.zeros(len(counts))
    for one, share in zip(groups.groups, groups.shares, strict=True):
        drawn = counts[:, one]
        for other, other_share in zip(groups.groups, groups.shares, strict=True):
            others = counts[:, other]
            products = ((drawn @ apart[np.ix_(one, other)]) * others).sum(1)
            n_products = drawn.sum(1) * others.sum(1) - ((drawn**2).sum(1) if one is other else 0)
            common = products / n_products
            signal += share * other_share * common
            if one is other:
                noise += share**2 * ((drawn @ squares[one]) / drawn.sum(1) - common) / len(one)
    # Of the pairs themselves it is within these bounds; a draw with many repeats can be outside.
    return np.clip(signal / (signal + groups.n_pairs * noise), -1 / (groups.n_pairs - 1), 1)


def cosine_of(
    shared: Float[np.ndarray, " draw"], n_pairs: float | int | Float[np.ndarray, " draw"]
) -> Float[np.ndarray, " draw"]:
    """The cosine of two vectors of `n_pairs` pairs each, for what pairs share."""
    return n_pairs * shared / (1 + (n_pairs - 1) * shared)


def resamples(groups: LetterGroups, n_resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "draw pair"]:
    """How often each pair is drawn, with replacement and within its group; at least two pairs of each group differ."""
    counts = np.zeros((n_resamples, groups.n_pairs))
    for group in groups.groups:
        size, todo = len(group), np.arange(n_resamples)
        while len(todo):
            counts[np.ix_(todo, group)] = rng.multinomial(size, np.full(size, 1 / size), size=len(todo))
            todo = todo[counts[np.ix_(todo, group)].max(1) == size]
    return counts


def cone(
    gram: Float[np.ndarray, "pair pair"], groups: LetterGroups, counts: Float[np.ndarray, "draw pair"], level: float
) -> float:
    """Half the opening angle, in degrees, of the cone about v that holds the true direction at this level; 90 is any.

    Of each resample its error e = v_resampled - v, larger by sqrt(n / (n - 1)) of its group, since resampled means
    vary that much less than means do. The angle is arcsin(||e across v|| / ||v||), and its quantile is taken: v is
    itself the sum of the true direction and an error. The angle between v and its resamples, without that step, would
    be 45 degrees for pure noise in many dimensions.
    """
    weights = groups.weights(np.ones((1, groups.n_pairs)))
    errors = groups.weights(counts) - weights
    for group in groups.groups:
        errors[:, group] *= np.sqrt(len(group) / (len(group) - 1))
    square = (weights @ gram @ weights.T).item()
    if square <= 0:
        return 90.0
    along = (errors @ gram @ weights.T)[:, 0]
    across = np.maximum(((errors @ gram) * errors).sum(1) - along**2 / square, 0)
    return float(np.degrees(np.quantile(np.arcsin(np.minimum(1, np.sqrt(across / square))), level)))


def relabelled(groups: LetterGroups, n_draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draw pair"]:
    """Weights of the shared direction if positive and negative were only names; the first draw is as it is.

    Each draw exchanges the sides of some pairs: of those without letters any, each with probability 1/2; of A/B pairs
    so that as many as before have each letter as the positive one. (Exchanging the sides of an A/B pair moves it to
    the opposite group, where it counts with the opposite letter: the letter cancels in every draw as it does in v.)
    """
    draws = np.zeros((n_draws, groups.n_pairs))
    if not groups.opposite:
        draws[:] = rng.choice([-1.0, 1.0], size=draws.shape) / groups.n_pairs
    for number, other in enumerate(groups.opposite):
        if number < other:
            both = np.concatenate([groups.groups[number], groups.groups[other]])
            sizes = groups.sizes[number], groups.sizes[other]
            # Of act(first letter) - act(second letter): plus for those of the first group, minus for the others.
            values = np.repeat([groups.shares[number] / sizes[0], -groups.shares[other] / sizes[1]], sizes)
            draws[:, both] = rng.permuted(np.tile(values, (n_draws, 1)), axis=1) * groups.signs[both]
        elif number == other:  # without letters
            free = groups.groups[number]
            draws[:, free] = rng.choice([-1.0, 1.0], size=(n_draws, len(free))) * groups.shares[number] / len(free)
    draws[0] = groups.weights(np.ones((1, groups.n_pairs)))[0]
    return draws


def squared_lengths(
    gram: Float[np.ndarray, "pair pair"], weights: Float[np.ndarray, "draw pair"]
) -> Float[np.ndarray, " draw"]:
    """||sum of weight x difference||^2 of each draw."""
    return ((weights @ gram) * weights).sum(1)


def by_chance(squares: Float[np.ndarray, "draw layer"]) -> Float[np.ndarray, " layer"]:
    """Each layer's p: how often relabelled pairs have, at whichever layer, so long a vector as these have there.

    The draws are the same at all layers. Each layer's squared lengths are measured from their mean in units of their
    standard deviation, and compared with the draws' largest over layers (Westfall and Young), so that a set of pure
    noise has p < 0.05 at any of its layers one time in twenty at most. Row 0 is the pairs as they are, and counts.
    """
    spread = squares.std(0)
    heights = (squares - squares.mean(0)) / np.where(spread > 0, spread, 1)
    highest = heights.max(1)
    return (highest[:, None] >= heights[0] - 1e-9).mean(0)
