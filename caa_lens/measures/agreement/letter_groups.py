"""The answer letter, taken out of the differences of A/B pairs.

The difference of a pair whose positive answer is (A) is `behavior + letter`, that of one whose positive answer is (B)
`behavior - letter`, where `letter` is what the stream holds more of behind "A" than behind "B". So pairs are grouped by
their two letters in order, and

    letter    = (mean of the (A, B) group - mean of the (B, A) group) / 2
    behavior  = (mean of the (A, B) group + mean of the (B, A) group) / 2

which is least squares on a constant and the letter. The direction that pairs share is `behavior`: both orders have
equal weights, however many pairs each has. For sets with more than two letters this is done for each two letters
apart, weighted by their numbers of pairs. Completions have no letters: they are one group, the direction its mean.
Questions in both letter orders, joined (see `letter_orders`), have none left; beside pairs with letters they are a
group of their own.

Whatever is held out, resampled or halved is so within groups, so that no letter is left over in any part; where a
number needs the letter's own effect (a single pair's cosine), it is estimated from other pairs than that one.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MIN_PAIRS = 8
MIN_OF_ORDER = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LetterGroups:
    """Which pairs have the same letters in the same order.

    Attributes:
        groups: the pairs of each group, by number; together every pair once.
        shares: each group's weight in the shared direction; they sum to 1.
        opposite: for each group that of the same letters the other way round; of one without letters beside others, the
            group itself; for completions none, `()`.
        signs: 1 for the pairs of a group whose letter effect counts as positive, -1 for its opposite; 1 of completions.
    """

    groups: tuple[np.ndarray, ...]
    shares: tuple[float, ...]
    opposite: tuple[int, ...]
    signs: Float[np.ndarray, " pair"]

    @property
    def n_pairs(self) -> int:
        return len(self.signs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many pairs each group has."""
        return tuple(len(group) for group in self.groups)

    def group_of(self) -> np.ndarray:
        """Each pair's group, by number."""
        found = np.empty(self.n_pairs, dtype=int)
        for number, group in enumerate(self.groups):
            found[group] = number
        return found

    def weights(self, counts: Float[np.ndarray, "draw pair"]) -> Float[np.ndarray, "draw pair"]:
        """How much each pair counts in the shared direction when it was drawn `counts` times."""
        found = np.zeros(counts.shape)
        for group, share in zip(self.groups, self.shares, strict=True):
            found[:, group] = share * counts[:, group] / counts[:, group].sum(1, keepdims=True)
        return found


def group_by_letters(letters: Sequence[tuple[str, str]], n_joined: int = 0) -> LetterGroups:
    """The groups of pairs with these (positive, negative) letters; empty texts are completions, or joined orders.

    Args:
        n_joined: how many of them are two letter orders of a question, for messages.

    Raises:
        ValueError: for fewer than 8 pairs, two letters of which one is always the positive one, or fewer than 4 pairs
            of an order: with 3 of each no relabelling test could fall below 0.05. Also for fewer than 4 joined pairs
            beside others.
    """
    n_pairs = len(letters)
    if n_pairs < MIN_PAIRS:
        joined = f" ({n_joined} of them a question in both letter orders, which counts once)" if n_joined else ""
        raise ValueError(
            f"got {n_pairs} pair{'s' if n_pairs != 1 else ''}{joined}, of which nothing can be said: give at least "
            f"{MIN_PAIRS} (of A/B pairs {MIN_OF_ORDER} with each letter as the positive answer)"
        )
    if not any(letter for pair in letters for letter in pair):
        return LetterGroups(groups=(np.arange(n_pairs),), shares=(1.0,), opposite=(), signs=np.ones(n_pairs))
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, (positive, negative) in enumerate(letters):
        members[positive, negative].append(i)
    free = np.array(members.pop(("", ""), []), dtype=int)
    if 0 < len(free) < MIN_OF_ORDER:
        raise ValueError(
            f"got {len(free)} question{'s' if len(free) > 1 else ''} in both letter orders beside "
            f"{n_pairs - len(free)} in one, expected none or at least {MIN_OF_ORDER}: keep one order of "
            "each, or give both orders of more of them"
        )
    both = sorted({tuple(sorted(order)) for order in members})
    for first, second in both:
        counts = Counter({order: len(members.get(order, ())) for order in ((first, second), (second, first))})
        (order, most), (_, least) = counts.most_common(2)
        if least == 0:
            raise ValueError(
                f"{order[0]} is the positive answer of all {most} pairs of {first} and {second}: the letter and the "
                "behavior cannot be told apart. Exchange options with pairs.balance_letters(), and read them again"
            )
        if least < MIN_OF_ORDER:
            raise ValueError(
                f"{order[1]} is the positive answer of {least} of the {most + least} pairs of {first} and {second}, "
                f"expected at least {MIN_OF_ORDER}, so that the letter can be taken out: use pairs.balance_letters(), "
                "give more pairs, or leave those with these letters out"
            )
    groups: list[np.ndarray] = []
    shares: list[float] = []
    opposite: list[int] = []
    signs = np.ones(n_pairs)
    for first, second in both:
        one, other = (np.array(members[order]) for order in ((first, second), (second, first)))
        opposite += [len(groups) + 1, len(groups)]
        groups += [one, other]
        shares += 2 * [(len(one) + len(other)) / (2 * n_pairs)]
        signs[other] = -1
    if len(free):
        opposite.append(len(groups))
        groups.append(free)
        shares.append(len(free) / n_pairs)
    return LetterGroups(groups=tuple(groups), shares=tuple(shares), opposite=tuple(opposite), signs=signs)


def without_letter(
    differences: Float[np.ndarray, "pair d_model"], groups: LetterGroups
) -> tuple[Float[np.ndarray, "pair d_model"], float]:
    """The differences minus the letter's mean effect, and its share of their mean square (0 to 1; 0 of completions).

    The share is that of ||letter||^2 after what noise alone would give it is taken off, and not below 0.
    """
    if not groups.opposite:
        return differences, 0.0
    freed, explained = differences.copy(), 0.0
    means = [differences[group].mean(0) for group in groups.groups]
    noise = [differences[group].var(0, ddof=1).sum() / len(group) for group in groups.groups]
    for number, other in enumerate(groups.opposite):
        letter = (means[number] - means[other]) / 2
        freed[groups.groups[number]] -= letter
        size = float(letter @ letter - (noise[number] + noise[other]) / 4)
        explained += max(size, 0.0) * len(groups.groups[number]) / len(differences)
    total = float((differences**2).sum(1).mean())
    return freed, min(explained / total, 1.0) if total > 0 else 0.0
