"""Spearman's rank correlation over behaviors, some of which have two rows that are not independent.

A behavior in two forms gives two rows. So behaviors are resampled and exchanged whole, with all their rows:

    interval   percentile bootstrap over behaviors
    p          how often a correlation is as far from 0 when effects are given to other behaviors at random, each to one
               with the same forms
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; NaN where one of the two does not vary."""
    from scipy.stats import rankdata

    return float(_correlations(rankdata(x)[:, None], rankdata(y))[0])


def rank_correlations(
    rows: "pd.DataFrame",
    columns: Sequence[str],
    effect: str,
    *,
    cluster: str = "behavior",
    form: str = "form",
    n_draws: int = 2000,
    seed: int = 0,
) -> "pd.DataFrame":
    """Each column's rank correlation with the effect: `number, n, behaviors, rho, low, high, p`.

    Rows in which a number is missing are left out, of all columns alike. `low, high` are the 95 % interval; draws in
    which a column does not vary have no correlation and are left out of it.
    """
    import pandas as pd
    from scipy.stats import rankdata

    rows = rows.dropna(subset=[*columns, effect]).sort_values([cluster, form], kind="stable")
    numbers, effects = rows[list(columns)].to_numpy(float), rows[effect].to_numpy(float)
    places = rows[cluster].to_numpy()
    members = [np.flatnonzero(places == one) for one in dict.fromkeys(places)]
    rng = np.random.default_rng(seed)
    if len(members) < 3:
        own = np.full(len(columns), np.nan)
        return _table(columns, rows, members, own, np.full((1, len(own)), np.nan), own)
    ranks, effect_ranks = rankdata(numbers, axis=0), rankdata(effects)
    own = _correlations(ranks, effect_ranks)
    resampled, exchanged = np.full((2, n_draws, len(columns)), np.nan)
    by_forms = _exchangeable(rows[form].to_numpy(), members)
    for draw in range(n_draws):
        drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        resampled[draw] = _correlations(rankdata(numbers[drawn], axis=0), rankdata(effects[drawn]))
        given = effect_ranks.copy()
        for alike in by_forms:  # [behavior row]
            given[alike] = effect_ranks[rng.permutation(alike)]
        exchanged[draw] = _correlations(ranks, given)
    as_far = (np.abs(exchanged) >= np.abs(own) - 1e-12).sum(0)
    p = np.where(np.isnan(own), np.nan, (as_far + 1) / (n_draws + 1))
    found = _table(columns, rows, members, own, resampled, p)
    assert isinstance(found, pd.DataFrame)
    return found


def _table(columns, rows, members, own, resampled, p) -> "pd.DataFrame":  # type: ignore[no-untyped-def]
    import pandas as pd

    known = np.isfinite(resampled).any(0)
    ends = np.full((2, len(columns)), np.nan)
    ends[:, known] = np.nanquantile(resampled[:, known], [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "number": list(columns),
            "n": len(rows),
            "behaviors": len(members),
            "rho": own,
            "low": ends[0],
            "high": ends[1],
            "p": p,
        }
    )


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each column of x, `[row column]`, with y."""
    x, y = x - x.mean(0), y - y.mean()
    sizes = np.sqrt((x**2).sum(0) * (y**2).sum())
    return np.divide(y @ x, sizes, out=np.full(x.shape[1], np.nan), where=sizes > 1e-12)


def _exchangeable(form: np.ndarray, members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rows of all behaviors that have the same forms, `[behavior row]`, forms in the same order."""
    alike: Mapping[tuple[str, ...], list[np.ndarray]] = {}
    for rows in members:
        alike.setdefault(tuple(form[rows]), []).append(rows)  # type: ignore[attr-defined]
    return [np.stack(found) for found in alike.values()]
