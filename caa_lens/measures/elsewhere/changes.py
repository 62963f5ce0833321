"""What a measure is without steering, with it, and with random directions of the same norm: a row of a table.

Intervals are of the change, paired: the same questions with and without steering.

- Means, ratios of sums and percentiles: percentile bootstrap over questions, resampled whole.
- Shares of questions: the score interval of a difference of paired proportions. Where no question changes, as easily
  happens with thirty of them, a bootstrap would give an interval of no width, as if that were known of all questions.

Source: Newcombe 1998 (Statistics in Medicine 17, 2635), method 10: Wilson's intervals of both shares, put together with
the correlation of the answers, that of a 2 x 2 table with a continuity correction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from caa_lens.arguments import as_seed, check_count

LEAST = 8  # questions that an interval is given for: of fewer a percentile bootstrap is much too narrow
UNSTEERED, STEERED, RANDOM = 0, 1, 2  # the conditions in their order; random directions are all from 2 on
COLUMNS = (
    *("group", "of", "measure", "unit", "unsteered", "steered", "change", "low", "high", "interval"),
    *("random", "random_low", "random_high", "n"),
)
BOOTSTRAP, SCORE, NONE = "bootstrap", "score", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Something that is measured under every condition.

    Attributes:
        group: what kind of side effect it is.
        of: the set of questions, or the behavior.
        measure: its name.
        unit: of its values.
        n_questions: how many there are; 0 for a number that is of vectors alone, whose `value` without steering is 0.
        value: the measure of some questions, by their numbers, under a condition, by its number.
        share: whether it is a share of questions.
    """

    group: str
    of: str
    measure: str
    unit: str
    n_questions: int
    value: Callable[[int, Int[np.ndarray, " question"]], float]
    share: bool = False


def mean_of(values: Float[np.ndarray, "condition question"]) -> Callable[[int, Int[np.ndarray, " question"]], float]:
    """The mean over questions, as `Measure.value`."""
    return lambda condition, some: float(values[condition, some].mean())


def change_of(measure: Measure, n_random: int, *, n_resamples: int, seed: int) -> dict[str, str | float | int]:
    """A row of `COLUMNS`: random columns are the mean and the range of the random directions' changes."""
    every, of_questions = np.arange(measure.n_questions), measure.n_questions > 0
    plain, steered = measure.value(UNSTEERED, every), measure.value(STEERED, every)
    random = np.array([measure.value(RANDOM + i, every) - plain for i in range(n_random)])
    low, high, how = np.nan, np.nan, NONE
    if measure.n_questions >= LEAST:
        if measure.share:
            sides = [np.array([measure.value(side, every[[i]]) for i in every]) > 0.5 for side in (UNSTEERED, STEERED)]
            (low, high), how = paired_share_interval(sides[0], sides[1]), SCORE
        elif n_resamples:
            (low, high), how = resampled(_change(measure), len(every), n_resamples=n_resamples, seed=seed), BOOTSTRAP
    return {
        "group": measure.group,
        "of": measure.of,
        "measure": measure.measure,
        "unit": measure.unit,
        "unsteered": plain if of_questions else np.nan,
        "steered": steered if of_questions else np.nan,
        "change": steered - plain,
        "low": low,
        "high": high,
        "interval": how,
        "random": float(random.mean()),
        "random_low": float(random.min()),
        "random_high": float(random.max()),
        "n": measure.n_questions,
    }


def resampled(
    statistic: Callable[[Int[np.ndarray, " question"]], float],
    n_questions: int,
    *,
    n_resamples: int = 2000,
    seed: int | None = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of any statistic of questions, from the resamples of `bootstrap_interval`."""
    n_resamples, rng = check_count("n_resamples", n_resamples), np.random.default_rng(as_seed(seed))
    counts = rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=n_resamples)
    every = np.arange(n_questions)
    found = [statistic(np.repeat(every, count)) for count in counts]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_share_interval(
    before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray
) -> tuple[float, float]:
    """95 % interval of the change of a share, from the same questions before and after; see the module."""
    from scipy.stats import binomtest

    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    n = len(first)
    shares, below, above = [], [], []
    for some in (second, first):
        ends = binomtest(int(some.sum()), n).proportion_ci(method="wilson")
        shares.append(some.mean())
        below.append(some.mean() - ends.low)
        above.append(ends.high - some.mean())
    correlation = _correlation(first, second)
    change = shares[0] - shares[1]
    down = below[0] ** 2 - 2 * correlation * below[0] * above[1] + above[1] ** 2
    up = above[0] ** 2 - 2 * correlation * above[0] * below[1] + below[1] ** 2
    return float(change - np.sqrt(max(down, 0))), float(change + np.sqrt(max(up, 0)))


def _correlation(first: Bool[np.ndarray, " question"], second: Bool[np.ndarray, " question"]) -> float:
    """Of a 2 x 2 table, moved towards 0 by half a count where it is positive; 0 where a margin is empty."""
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    if not margins:
        return 0.0
    product = both * neither - lost * gained
    return (max(product - len(first) / 2, 0) if product > 0 else product) / float(np.sqrt(margins))


def _change(measure: Measure) -> Callable[[Int[np.ndarray, " question"]], float]:
    return lambda some: measure.value(STEERED, some) - measure.value(UNSTEERED, some)
