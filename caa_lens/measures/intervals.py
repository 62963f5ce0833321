"""Percentile bootstrap intervals over questions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from caa_lens.arguments import as_float, as_seed, check_count


def mean_with_interval(
    frame: pd.DataFrame, cells: Sequence[str], value: str, *, n_resamples: int = 2000, seed: int | None = 0
) -> pd.DataFrame:
    """Mean of a column over questions in every cell, with its 95 % interval: the cell's columns, `mean, low, high`.

    Args:
        frame: one row a cell and `question`; every cell has the same questions.
        cells: the columns that name a cell.
        value: the column to average.

    Raises:
        ValueError: for no rows, or cells that have not the same questions, once each.
    """
    if not len(frame):
        raise ValueError("the frame has no rows: there is nothing to average")
    counts = frame.groupby(list(cells), sort=False)["question"].agg(["size", "nunique"])
    n_questions = frame["question"].nunique()
    if not (counts == n_questions).all(axis=None):
        raise ValueError(
            f"the cells of {', '.join(cells)} have {counts['nunique'].min()} to {counts['size'].max()} rows for "
            f"{n_questions} questions, expected every question once in each"
        )
    table = frame.pivot(index="question", columns=list(cells), values=value)
    low, high = bootstrap_interval(table.to_numpy(), n_resamples=n_resamples, seed=seed)
    index = table.columns.to_frame(index=False)
    return pd.DataFrame({**index, "mean": table.to_numpy().mean(0), "low": low, "high": high})


def bootstrap_interval(
    values: np.ndarray, *, n_resamples: int = 2000, seed: int | None = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the column means of `values`, `[question cell]`.

    Questions are resampled whole, so that all cells of a resample see the same questions. With 0 resamples, or one
    question, the interval is NaN.

    Raises:
        TypeError: for a number of resamples, or a seed, that is no whole number.
        ValueError: for a negative one, or a level outside of 0 to 1.
    """
    n_resamples, seed = check_count("n_resamples", n_resamples, least=0), as_seed(seed)
    if n_resamples > 10**7:
        raise ValueError("n_resamples must be at most 10**7: 2000 are enough for an interval")
    if not 0 < as_float("level", level) < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    n_questions = values.shape[0]
    if n_resamples == 0 or n_questions < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=n_resamples)
    means = counts @ values / n_questions  # [resample cell]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
