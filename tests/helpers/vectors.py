"""Sets of vectors that no model is needed for."""

import torch

from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVectors


def random_set(*, layers=(3, 7, 20), d_model=16, dtype=torch.float32, seed=1, scale=1.0, **about):
    """A random set with some provenance; its layers are neither positions nor a run, unless told otherwise.

    Drawn in float64, so that vectors of that precision have digits which float32 does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = scale * torch.randn(len(layers), d_model, generator=generator, dtype=torch.float64)
    return SteeringVectors(directions=drawn.to(dtype), layers=tuple(layers), provenance=Provenance(**about))
