"""The effect of the best of many cells, on questions that did not choose it.

Of many layers (or multipliers, or estimators) the one with the largest mean is chosen because of its luck, too;
measured on the questions that chose it, its effect is too large and its interval too seldom right. Here the questions
are dealt into folds, some times over; the others than a fold's choose a cell, and the fold reports that cell's effect.
So all questions choose and all report, and none reports on what it chose.

The mean report is unbiased for the cells that are chosen so. But its error is not that of a mean over questions: the
parts choose by what they have in common, and luck in one fold is luck in the choice of the others. (The interval that
takes reports as independent holds 0 in 82 to 92 % of random sweeps with five folds, where 95 % are meant, and more
folds are worse.) So the interval reaches as far as the larger of

    luck    the 95 % quantile of |estimate| under random signs: each question's effects less the cells' means, all times
            1 or -1, which is the whole procedure over again where there is nothing to find
    chance  Student's t x standard error of the questions' mean reports, which is what is left where every part chooses
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
        choices: the cell that each part chose.
        effect: mean report, of questions on cells that others chose.
        low, high: its 95 % interval.
    """

    cell: int
    choices: tuple[int, ...]
    effect: float
    low: float
    high: float

    @property
    def agreeing(self) -> float:
        """The share of parts that chose the cell, too."""
        return self.choices.count(self.cell) / len(self.choices)


def choose_honestly(
    effects: Float[np.ndarray, "question cell"],
    *,
    n_folds: int = 5,
    n_times: int = 4,
    n_draws: int = 1000,
    seed: int | None = 0,
) -> HonestChoice:
    """The best cell, with its effect and interval on questions that did not choose it.

    Args:
        effects: each question's effect in each cell, such as score(+m) - score(-m) by layer.
        n_folds: parts that report, each on what all others choose.
        n_times: how often the questions are dealt into folds.
        n_draws: of random signs.

    Raises:
        ValueError: for fewer than 8 questions, no cell, effects that are not finite, or one fold.
    """
    n_folds, n_times = check_count("n_folds", n_folds, least=2), check_count("n_times", n_times)
    n_draws, seed = check_count("n_draws", n_draws), as_seed(seed)
    n_questions, n_cells = effects.shape
    if n_questions < max(MIN_QUESTIONS, n_folds) or not n_cells:
        raise ValueError(
            f"got {n_questions} questions and {n_cells} cells: of fewer than {max(MIN_QUESTIONS, n_folds)} questions "
            "nothing can be chosen honestly; sweep more, choose on others (validation=), or name the cell beforehand"
        )
    if not np.isfinite(effects).all():
        raise ValueError("some effects are NaN or infinite: leave those cells out, or sweep smaller multipliers")
    from scipy.stats import norm, t

    rng = np.random.default_rng(seed)
    dealt = [rng.permutation(n_questions) % n_folds for _ in range(n_times)]
    folds = [own == fold for own in dealt for fold in range(n_folds)]
    choices = [int(effects[~fold].mean(0).argmax()) for fold in folds]
    reports = np.zeros(n_questions)
    for fold, cell in zip(folds, choices, strict=True):
        reports[fold] += effects[fold, cell] / n_times
    signs = rng.choice([-1.0, 1.0], size=(n_draws, n_questions))
    draws = np.abs(_estimates(signs, effects - effects.mean(0), folds)) / n_times
    quantile, free = t.ppf(0.975, n_questions - 1), n_questions - 1
    # The cells' means were taken off, and Student's t is wider than the normal distribution: both matter for few.
    luck = float(np.quantile(draws, 0.95)) * np.sqrt(n_questions / free) * quantile / norm.ppf(0.975)
    chance = quantile * reports.std(ddof=1) / np.sqrt(n_questions)
    effect, reach = float(reports.mean()), float(max(luck, chance))
    return HonestChoice(
        cell=int(effects.mean(0).argmax()),
        choices=tuple(choices),
        effect=effect,
        low=effect - reach,
        high=effect + reach,
    )


def _estimates(
    signs: Float[np.ndarray, "draw question"], effects: Float[np.ndarray, "question cell"], folds: list[np.ndarray]
) -> Float[np.ndarray, " draw"]:
    """The sum of all folds' reports by the number of questions, when questions have these signs."""
    whole = signs @ effects
    found = np.zeros(len(signs))
    for fold in folds:
        own = (signs * fold) @ effects  # sums over the fold: [draw cell]
        found += np.take_along_axis(own, (whole - own).argmax(1)[:, None], axis=1)[:, 0]
    return found / len(effects)
