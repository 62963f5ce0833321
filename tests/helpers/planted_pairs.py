"""Made-up activations of pairs: noise, a planted direction, a planted answer letter."""

import numpy as np
import torch

from caa_lens.engine.pair_reading import PairActivations
from caa_lens.provenance import Provenance

ORDERS = (("A", "B"), ("B", "A"))


def activations_of(values, letters=None, layers=None, **details):
    """`PairActivations` of an array `[pair side layer d_model]`."""
    values = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return PairActivations(
        values=values,
        norms=values.norm(dim=-1),
        layers=tuple(layers or range(values.shape[2])),
        letters=letters or (("", ""),) * len(values),
        provenance=Provenance(model="m", behavior="b", expression="b", n_pairs=len(values), details=details),
    )


def planted(
    n_pairs=20,
    *,
    size=0.0,
    letter=None,
    letter_spread=0.0,
    n_first=None,
    against=0,
    n_layers=2,
    d_model=40,
    falling=0.0,
    layers=None,
    seed=0,
):
    """Differences of noise of mean square 1, plus `size` along one direction, plus `letter` along another.

    Args:
        size: length of the shared direction in units of the noise's length.
        letter: length of the letter's effect; None makes completions. `letter_spread` varies it from pair to pair.
        n_first: how many pairs have A as the positive answer; half of them by default.
        against: how many pairs have the direction the other way round.
        falling: the power with which the noise's standard deviation falls over the dimensions.
    """
    rng = np.random.default_rng(seed)
    scale = np.arange(1, d_model + 1.0) ** -falling
    scale /= np.linalg.norm(scale)
    direction, letter_direction = rng.standard_normal((2, d_model)) * scale
    direction /= np.linalg.norm(direction)
    letter_direction /= np.linalg.norm(letter_direction)
    differences = rng.standard_normal((n_pairs, n_layers, d_model)) * scale
    differences += np.where(np.arange(n_pairs) < against, -size, size)[:, None, None] * direction
    letters = None
    if letter is not None:
        first = np.arange(n_pairs) % 2 == 0 if n_first is None else np.arange(n_pairs) < n_first
        strength = letter * (1 + letter_spread * rng.standard_normal(n_pairs))
        differences += (np.where(first, 1, -1) * strength)[:, None, None] * letter_direction
        letters = tuple(ORDERS[0] if one else ORDERS[1] for one in first)
    middles = rng.standard_normal((n_pairs, n_layers, d_model))
    values = np.stack([middles + differences / 2, middles - differences / 2], axis=1)
    return activations_of(values, letters, layers)
