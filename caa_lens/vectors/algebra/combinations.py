"""One vector of several, and several of several; for single vectors and for sets, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from caa_lens.provenance import layer_ranges, one_model
from caa_lens.vectors.algebra import expressions as write
from caa_lens.vectors.algebra import rules, subspaces
from caa_lens.vectors.algebra.arithmetic import VectorAlgebra

V = TypeVar("V", bound=VectorAlgebra)


def mean_vector(first: V, *others: V, weights: Sequence[float | int] | None = None) -> V:
    """sum_i w_i v_i / sum_i w_i, as in `mean(v, w)`; the weights are equal unless given.

    Raises:
        ValueError: unless there is one weight a vector, none negative and not all 0; or the vectors do not belong
            together.
    """
    if isinstance(first, list | tuple):
        raise TypeError("expected vectors one after another, got a list of them: write mean_vector(*vectors)")
    every = (first, *others)
    rules.check_compatible(*every)
    shares = torch.ones(len(every)).double() if weights is None else torch.tensor(weights, dtype=torch.float64)
    if len(shares) != len(every) or not bool((torch.isfinite(shares) & (shares >= 0)).all()) or not bool(shares.any()):
        raise ValueError(f"expected {len(every)} weights, none negative and not all 0, got {weights}")
    texts = [one._text for one in every] + ([] if weights is None else [f"weights={write.numbers(weights)}"])
    rows = torch.tensordot(shares / shares.sum(), torch.stack([one._wide for one in every]), dims=1)
    return first._derived(rows, write.call("mean", *texts), *others)


def gram_schmidt(first: V, *others: V) -> tuple[V, ...]:
    """Orthonormal vectors: of each given one, what those before it do not span, normalized.

    Raises:
        ValueError: if a vector is a combination of those before it, up to the rounding of their dtype.
    """
    every = (first, *others)
    orthogonal = [one.without(*every[:i]) if i else one for i, one in enumerate(every)]
    for one, rest in zip(every, orthogonal, strict=True):
        if not bool(rest._wide.any(dim=-1).all()):
            raise ValueError(f"{one._text} is zero or a combination of the vectors before it: leave it out")
    return tuple(rest.normalized() for rest in orthogonal)


def normalize_across_behaviors(sets: Mapping[str, V]) -> dict[str, V]:
    """Rescale every behavior's vector, layer by layer, to the mean norm of all behaviors' vectors at that layer.

    ||v_b[l]|| becomes mean_b' ||v_b'[l]||, so that one multiplier means one size for all behaviors. Norms still differ
    across layers. Source: paper section 3 (all its evaluations use normalised vectors).

    Raises:
        ValueError: if the sets have different layers or models, or a vector is zero.
    """
    if not sets:
        raise ValueError("normalize_across_behaviors needs at least one set of vectors")
    first = next(iter(sets.values()))
    model: str = first.provenance.model
    for name, vectors in sets.items():
        both = one_model((model, vectors.provenance.model))
        if vectors._layers != first._layers or both is None:
            raise ValueError(
                f"{name!r} has layers {layer_ranges(vectors._layers)} of {vectors.provenance.model}, expected "
                f"{layer_ranges(first._layers)} of {model}: extract all behaviors from one model and "
                "layers"
            )
        if not bool(vectors._wide.any(dim=-1).all()):
            raise ValueError(f"{name!r} has a zero vector, which cannot be rescaled")
        model = both
    mean_norm = torch.stack([subspaces.length(vectors._wide) for vectors in sets.values()]).mean(0).squeeze(-1)
    note = f"across behaviors: {', '.join(sorted(sets))}"
    return {
        name: vectors._with(vectors.normalized(to=mean_norm)._rows, replace(vectors.provenance, normalisation=note))
        for name, vectors in sets.items()
    }
