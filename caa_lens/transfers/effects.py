"""What all transfers share: the measure, and effects read by source and target.

A frame of effects has among its columns `source, target, question, effect, cosine`; `cosine` is that of the source's
vector with the target's own, NaN where the target has none.
"""

import numpy as np
import pandas as pd

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import Scores
from caa_lens.measures.intervals import mean_with_interval


def effect_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean effect over questions: one row a source, one column a target, each ascending."""
    return frame.pivot_table(index="source", columns="target", values="effect", aggfunc="mean")


def effect_summary(frame: pd.DataFrame, n_resamples: int, seed: int | None) -> pd.DataFrame:
    """Mean effect with its 95 % bootstrap interval over questions: `source, target, mean, low, high, cosine`."""
    cells = ["source", "target"]
    means = mean_with_interval(frame, cells, "effect", n_resamples=n_resamples, seed=seed)
    return means.merge(frame[[*cells, "cosine"]].drop_duplicates(cells), on=cells, how="left")


def check_measure(test: ContrastSet, measure: str | None) -> None:
    """Raises `ValueError` for a measure that the test set's answers do not have."""
    have = ["p_matching", "margin"] if test.kind == "ab" else ["margin"]
    if measure is not None and measure not in have:
        raise ValueError(f"measure {measure!r} is not to be had of this test set: expected {' or '.join(have)}")


def measured(scores: Scores, measure: str | None) -> tuple[str, np.ndarray]:
    """Name and values `[pair condition]` of the asked-for measure; the scores' own metric by default."""
    if measure is None or measure == scores.metric:
        return scores.metric, scores.values.numpy()
    return "margin", (scores.positive - scores.negative).numpy()
