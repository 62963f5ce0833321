"""The effect of the best of many cells, on questions that did not choose it.

Of many layers (or multipliers, or estimators) the one with the largest mean is chosen because of its luck, too;
measured on the questions that chose it, its effect is too large and its interval too seldom right. Here the questions
are halved many times; each half chooses a cell, and the other half reports that cell's effect. So all questions choose
and all report, and none reports on what it chose.

The mean of these reports is unbiased for the cells that halves choose. But its error is not that of a mean over
questions: the halves choose by what they have in common, and luck in one is luck in the other's choice. (With k folds
it is worse: the interval that takes reports as independent holds 0 in 73 to 90 % of random sweeps with ten folds, where
95 % are meant.) So the interval reaches as far as the larger of

    luck    the 95 % quantile of |estimate| under random signs: each question's effects less the cells' means, all times
            1 or -1, which is the whole procedure over again where there is nothing to find
    chance  Student's t x standard error of the questions' mean reports, which is what is left where all halves choose
            the same cell
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from caa_lens.arguments import as_seed, check_count

MIN_QUESTIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class HonestChoice:
    """A cell that was chosen, and what a choice made so is worth.

    Attributes:
        cell: the one with the largest mean over all questions, by number.
        agreeing: the share of halves that chose it, too.
        effect: mean effect, on the other half, of the cells that halves choose.
        low, high: its 95 % interval.
    """

    cell: int
    agreeing: float
    effect: float
    low: float
    high: float


def choose_honestly(
    effects: Float[np.ndarray, "question cell"], *, n_splits: int = 10, n_draws: int = 1000, seed: int | None = 0
) -> HonestChoice:
    """The best cell, with its effect and interval on questions that did not choose it.

    Args:
        effects: each question's effect in each cell, such as score(+m) - score(-m) by layer.
        n_splits: how often the questions are halved.
        n_draws: of random signs.

    Raises:
        ValueError: for fewer than 8 questions, no cell, or effects that are not finite.
    """
    n_splits, n_draws, seed = check_count("n_splits", n_splits), check_count("n_draws", n_draws), as_seed(seed)
    n_questions, n_cells = effects.shape
    if n_questions < MIN_QUESTIONS or not n_cells:
        raise ValueError(
            f"got {n_questions} questions and {n_cells} cells: of fewer than {MIN_QUESTIONS} questions nothing can be "
            "chosen honestly; sweep more, or name the cell beforehand"
        )
    if not np.isfinite(effects).all():
        raise ValueError("some effects are NaN or infinite: leave those cells out, or sweep smaller multipliers")
    from scipy.stats import norm, t

    rng = np.random.default_rng(seed)
    halves = np.zeros((n_splits, n_questions), dtype=bool)
    for half in halves:
        half[rng.permutation(n_questions)[: n_questions // 2]] = True
    chosen = np.stack([effects[half].mean(0).argmax() for half in (*halves, *~halves)])
    reports = np.stack(
        [
            np.where(half, effects[:, other], effects[:, own])
            for half, own, other in zip(halves, chosen[:n_splits], chosen[n_splits:], strict=True)
        ]
    ).mean(0)
    signs = rng.choice([-1.0, 1.0], size=(n_draws, n_questions))
    draws = np.abs(_estimates(signs, effects - effects.mean(0), halves))
    quantile, free = t.ppf(0.975, n_questions - 1), n_questions - 1
    # The cells' means were taken off, and Student's t is wider than the normal distribution: both matter for few.
    luck = float(np.quantile(draws, 0.95)) * np.sqrt(n_questions / free) * quantile / norm.ppf(0.975)
    chance = quantile * reports.std(ddof=1) / np.sqrt(n_questions)
    effect, reach = float(reports.mean()), float(max(luck, chance))
    cell = int(effects.mean(0).argmax())
    agreeing = float((chosen == cell).mean())
    return HonestChoice(cell=cell, agreeing=agreeing, effect=effect, low=effect - reach, high=effect + reach)


def _estimates(
    signs: Float[np.ndarray, "draw question"], effects: Float[np.ndarray, "question cell"], halves: np.ndarray
) -> Float[np.ndarray, " draw"]:
    """The mean report over questions and splits when questions have these signs."""
    whole = signs @ effects
    found = np.zeros(len(signs))
    for half in halves:
        one = (signs * half) @ effects  # sums over the half: [draw cell]
        for choosing, reporting in ((one, whole - one), (whole - one, one)):
            found += np.take_along_axis(reporting, choosing.argmax(1)[:, None], axis=1)[:, 0]
    return found / (len(halves) * len(effects))
