"""One vector of several, and several of several."""

import numpy as np
import pytest
import torch
from helpers.vectors import random_set
from hypothesis import given, settings
from hypothesis import strategies as st

from caa_lens.vectors.algebra.combinations import gram_schmidt, mean_vector, normalize_across_behaviors

D_MODEL = 6
LAYERS = (3, 7, 20)  # neither positions nor a run, so that an index cannot pass for a block

laws = settings(deadline=None, derandomize=True, max_examples=20)
seeds = st.integers(0, 10**6)


def vector_set(behavior="a", *, model="m", **options):
    about = {"method": "mean difference", "n_pairs": 12}
    return random_set(model=model, behavior=behavior, d_model=D_MODEL, **about, **options)


def several(seed, n=3, dtype=torch.float32):
    return [vector_set("abcdefgh"[i], seed=seed + i, dtype=dtype) for i in range(n)]


# ---- mean -------------------------------------------------------------------------------------------------------


@laws
@given(seeds, st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1))
def test_a_mean_agrees_with_numpys_average_whatever_the_weights_add_up_to(seed, weights):
    vectors = several(seed)
    stacked = np.stack([v.directions.double().numpy() for v in vectors])
    for given_weights in (weights, [1000 * w for w in weights], None):
        found = mean_vector(*vectors, weights=given_weights)
        expected = np.average(stacked, axis=0, weights=given_weights)
        np.testing.assert_allclose(found.directions.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_mean_of_one_and_of_equals_is_exactly_that_one():
    v = vector_set()
    assert torch.equal(mean_vector(v).directions, v.directions)
    assert torch.equal(mean_vector(v, v, v, v).directions, v.directions)
    assert torch.equal(mean_vector(v, 2 * v, weights=[1, 0]).directions, v.directions)
    assert mean_vector(v[7], vector_set("b", seed=1)[7], weights=[1, 2]).provenance.expression == (
        "mean(a[7], b[7], weights=[1, 2])"
    )


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_cannot_be_meant_are_refused(weights):
    with pytest.raises(ValueError, match="expected 2 weights, none negative and not all 0, got"):
        mean_vector(*several(0, 2), weights=weights)


# ---- Gram-Schmidt -----------------------------------------------------------------------------------------------


@laws
@given(seeds, st.integers(1, D_MODEL))
def test_gram_schmidt_makes_orthonormal_vectors_that_agree_with_the_loop_of_the_textbook(seed, n):
    vectors = several(seed, n, torch.float64)
    found = gram_schmidt(*vectors)
    for layer in LAYERS:
        basis: list[np.ndarray] = []
        for v in vectors:  # subtract the projection on each one before, then normalize
            rest = v[layer].direction.numpy()
            for q in basis:
                rest = rest - (rest @ q) * q
            basis.append(rest / np.linalg.norm(rest))
        matrix = np.stack([one[layer].direction.numpy() for one in found])
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)
        np.testing.assert_allclose(matrix, np.stack(basis), atol=1e-8)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_orthonormal_vectors_are_so_to_the_precision_of_their_dtype_even_of_near_parallel_ones(dtype, atol):
    a, b, c = several(0, dtype=torch.float64)
    close = [a.to(dtype), (a + 0.1 * b).to(dtype), (a + 0.1 * c).to(dtype)]
    found = gram_schmidt(*close)
    for i, v in enumerate(found):
        assert v.directions.dtype == dtype
        for j, w in enumerate(found):
            np.testing.assert_allclose(v @ w, float(i == j), atol=atol, rtol=0)


def test_gram_schmidt_says_what_was_removed_from_what():
    a, b, c = several(0)
    assert [v.provenance.expression for v in gram_schmidt(a[3], b[3], c[3])] == [
        "a[3].normalized(to=1)",
        "b[3].without(a[3]).normalized(to=1)",
        "c[3].without(a[3], b[3]).normalized(to=1)",
    ]


def test_gram_schmidt_refuses_a_vector_that_those_before_it_span():
    a, b, _ = several(0)
    for dependent in (2 * a, a + b, 0.0 * a):
        with pytest.raises(ValueError, match="is zero or a combination of the vectors before it: leave it out"):
            gram_schmidt(a, b, dependent)


# ---- normalisation across behaviors -----------------------------------------------------------------------------


def test_normalizing_across_behaviors_equals_the_papers_formula():
    sets = {name: vector_set(name, seed=i, scale=1.0 + 3 * i) for i, name in enumerate("abc")}
    normalized = normalize_across_behaviors(sets)
    for layer in LAYERS:
        raw = {name: vectors[layer].direction.double() for name, vectors in sets.items()}
        mean_norm = sum(direction.norm() for direction in raw.values()) / 3
        for name, direction in raw.items():
            expected = (direction / direction.norm() * mean_norm).float()
            torch.testing.assert_close(normalized[name][layer].direction, expected, rtol=1e-5, atol=1e-6)
    assert list(normalized) == list("abc")
    assert normalized["b"].provenance.normalisation == "across behaviors: a, b, c"
    # Not across layers: their norms stay as different as they were.
    norms = normalized["a"].norms
    assert norms.max() > 1.1 * norms.min()


def test_normalizing_across_behaviors_twice_changes_nothing_more():
    once = normalize_across_behaviors({"a": vector_set("a"), "b": vector_set("b", seed=1, scale=5.0)})
    twice = normalize_across_behaviors(once)
    torch.testing.assert_close(twice["a"].directions, once["a"].directions, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(once["a"].norms, once["b"].norms, rtol=1e-5, atol=0)


def test_one_behavior_alone_keeps_its_norms():
    vectors = vector_set()
    alone = normalize_across_behaviors({"a": vectors})["a"]
    torch.testing.assert_close(alone.directions, vectors.directions, rtol=1e-6, atol=0)


def test_behaviors_that_cannot_be_compared_are_refused():
    a = vector_set("a")
    with pytest.raises(ValueError, match="'b' has layers 3, 7 of m, expected 3, 7, 20 of m: extract all behaviors"):
        normalize_across_behaviors({"a": a, "b": vector_set("b", layers=(3, 7))})
    with pytest.raises(ValueError, match="of other, expected 3, 7, 20 of m"):
        normalize_across_behaviors({"a": a, "b": vector_set("b", model="other")})
    with pytest.raises(ValueError, match="'b' has a zero vector, which cannot be rescaled"):
        normalize_across_behaviors({"a": a, "b": vector_set("b", scale=0.0)})
    with pytest.raises(ValueError, match="needs at least one set"):
        normalize_across_behaviors({})
