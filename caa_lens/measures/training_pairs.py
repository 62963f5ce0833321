"""Held out or not: whether vectors are scored on pairs that they were extracted from."""

import warnings
from typing import Any

from caa_lens.contrast.sets import ContrastSet
from caa_lens.provenance import PAIR_HASHES


class TrainingPairsWarning(UserWarning):
    """Vectors are scored on pairs that they were extracted from, which flatters them."""


def count_training_pairs(test: ContrastSet, *vectors: Any) -> int:
    """How many pairs of a test set any vectors, or fitted methods, came from; of those that list none, all or none."""
    trained: set[str] = set()
    for one in vectors:
        if listed := one.provenance.details.get(PAIR_HASHES):
            trained |= set(listed.split())
        elif test.content_hash == one.provenance.dataset_hash:
            return len(test)
    return sum(pair in trained for pair in test.pair_hashes)


def warn_of_training_pairs(test: ContrastSet, *vectors: Any, name: str = "") -> None:
    """Warns where pairs of the test set are among those that any of the vectors were extracted from.

    Args:
        name: which test set, where there are several.
    """
    if n_pairs := count_training_pairs(test, *vectors):
        warnings.warn(
            f"{n_pairs} of the {len(test)} pairs scored{f' in {name!r}' if name else ''} are among those that the "
            "vectors were extracted from, which flatters them: extract from train and score test of train, test = "
            "pairs.split(test=0.2)",
            TrainingPairsWarning,
            stacklevel=3,
        )
