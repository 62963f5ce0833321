"""Spearman's rank correlation over behaviors, some of which have two rows that are not independent.

A behavior in two forms gives two rows. So behaviors are resampled and exchanged whole, with all their rows:

    interval   percentile bootstrap over behaviors
    p          how often a correlation is as far from 0 when effects are given to other behaviors at random, each to one
               with the same forms
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 3  # behaviors
NO_INTERVAL = "(no interval)"
SURELY = 0.95  # the share of draws in which a column has to vary, for an interval


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; NaN where one of the two does not vary."""
    return float(_correlations(_ranks(x)[:, None], _ranks(y))[0])


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

    Rows in which a number is missing are left out, of all columns alike; of fewer than three behaviors all is NaN.
    `low, high` are the 95 % interval. In a draw a column may not vary, as when one behavior alone differs from the
    others; where that is so in more than 5 % of draws, there is no interval (NaN).
    """
    import pandas as pd

    rows = rows.dropna(subset=[*columns, effect]).sort_values([cluster, form], kind="stable")
    numbers, effects = rows[list(columns)].to_numpy(float), rows[effect].to_numpy(float)
    places = rows[cluster].to_numpy()
    members = [np.flatnonzero(places == one) for one in dict.fromkeys(places)]
    rho, low, high, p = np.full((4, len(columns)), np.nan)
    if len(members) >= FEWEST:
        rng = np.random.default_rng(seed)
        ranks, effect_ranks = _ranks(numbers), _ranks(effects)
        rho = _correlations(ranks, effect_ranks)
        low, high = _interval(numbers, effects, members, n_draws, rng)
        exchanged = _exchanged(ranks, effect_ranks, _exchangeable(rows[form].to_numpy(), members), n_draws, rng)
        as_far = (np.abs(exchanged) >= np.abs(rho) - 1e-12).sum(0)
        p = np.where(np.isnan(rho), np.nan, (as_far + 1) / (n_draws + 1))
    about = {"number": list(columns), "n": len(rows), "behaviors": len(members)}
    return pd.DataFrame({**about, "rho": rho, "low": low, "high": high, "p": p})


def shown(table: "pd.DataFrame", names: Mapping[str, str]) -> "pd.DataFrame":
    """For reading: one row a number, by its name; for each `group` rho with its interval, and p."""
    from experiments.running.comparison import grid

    cells = table.rename(columns={"rho": "mean"}).assign(number=table["number"].map(names))
    found = grid(cells, ["number"], "group", digits=2)
    found = found.replace({r"^nan .*": "", r"\[nan.*": NO_INTERVAL}, regex=True)
    p = cells.pivot(index="number", columns="group", values="p").loc[list(found["number"])]
    for group in dict.fromkeys(cells["group"]):
        found.insert(list(found.columns).index(group) + 1, f"{group}: p", [told_p(one) for one in p[group]])
    return found


def told_p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=0))


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each column of x, `[row column]`, with y; NaN of what does not vary."""
    x, y = x - x.mean(0), y - y.mean()
    sizes = np.sqrt((x**2).sum(0) * (y**2).sum())
    return np.divide(y @ x, sizes, out=np.full(x.shape[1], np.nan), where=sizes > 1e-12)


def _interval(
    numbers: np.ndarray, effects: np.ndarray, members: Sequence[np.ndarray], n_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Of behaviors drawn with replacement, with all their rows: `[end column]`."""
    drawn = np.full((n_draws, numbers.shape[1]), np.nan)
    for draw in range(n_draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn[draw] = _correlations(_ranks(numbers[rows]), _ranks(effects[rows]))
    ends = np.full((2, numbers.shape[1]), np.nan)
    known = np.isfinite(drawn).mean(0) >= SURELY
    ends[:, known] = np.nanquantile(drawn[:, known], [0.025, 0.975], axis=0)
    return ends


def _exchangeable(form: np.ndarray, members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rows of all behaviors that have the same forms, `[behavior row]`, forms in the same order."""
    alike: dict[tuple[str, ...], list[np.ndarray]] = {}
    for rows in members:
        alike.setdefault(tuple(form[rows]), []).append(rows)
    return [np.stack(found) for found in alike.values()]


def _exchanged(
    ranks: np.ndarray, effects: np.ndarray, alike: Sequence[np.ndarray], n_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Correlations where each behavior has the effects of another with the same forms: `[draw column]`."""
    found = np.full((n_draws, ranks.shape[1]), np.nan)
    for draw in range(n_draws):
        given = effects.copy()
        for rows in alike:
            given[rows] = effects[rng.permutation(rows)]
        found[draw] = _correlations(ranks, given)
    return found
