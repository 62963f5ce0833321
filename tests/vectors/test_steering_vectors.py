"""Steering vectors: where they belong, what they refuse, sets indexed by block. Arithmetic has a test of its own."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers.vectors import random_set

from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

D_MODEL = 6
LAYERS = (3, 7, 20)  # neither positions nor a run, so that an index cannot pass for a block


def vector(direction, *, layer=7, model="m", behavior="v"):
    return SteeringVector.from_direction(torch.tensor(direction), layer, behavior=behavior, model=model)


def vector_set(behavior="a", *, model="m", **options):
    about = {"method": "mean difference", "n_pairs": 12, "expression": behavior}
    return random_set(model=model, behavior=behavior, d_model=D_MODEL, **about, **options)


# ---- one vector -------------------------------------------------------------------------------------------------


def test_moving_to_another_layer_is_on_purpose_and_on_record():
    a = vector_set()
    moved = a[3].at_layer(20)
    assert (moved.layer, moved.hook_name) == (20, "blocks.20.hook_resid_post")
    assert torch.equal(moved.direction, a[3].direction)
    assert moved.provenance.expression == "a[3].at_layer(20)"
    assert torch.equal((moved - a[20]).direction, (a[3].direction.double() - a[20].direction.double()).float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinity_are_refused(bad, dtype):
    with pytest.raises(ValueError, match="a steering vector has 1 NaN or infinite components of 3: extract it again"):
        SteeringVector(direction=torch.tensor([1.0, bad, 2.0]).to(dtype), layer=7)
    with pytest.raises(ValueError, match="steering vectors has 2 NaN or infinite components of 4"):
        SteeringVectors(directions=torch.tensor([[1.0, 2.0], [bad, bad]]).to(dtype), layers=(3, 7))


def test_negative_layers_are_refused():
    with pytest.raises(ValueError, match="0-based block number, got -1: count layers from the first block"):
        vector([1.0, 2.0], layer=-1)
    with pytest.raises(ValueError, match="0-based block number, got -1"):
        vector([1.0, 2.0]).at_layer(-1)
    with pytest.raises(ValueError, match=r"distinct 0-based block numbers in order, got \(-1, 3\)"):
        vector_set(layers=(-1, 3))


def test_what_is_no_direction_is_refused():
    from inspect import unwrap  # without the tests' own type checking

    from caa_lens.vectors.algebra.rules import check_rows

    with pytest.raises(ValueError, match=r"floating-point numbers, got torch.int64: call \.float\(\) on it first"):
        unwrap(check_rows)(torch.tensor([1, 2]), 1, "a steering vector")
    with pytest.raises(ValueError, match=r"needs a 1-dimensional tensor with components, got shape \(1, 2\)"):
        check_rows(torch.ones(1, 2), 1, "a steering vector")
    with pytest.raises(ValueError, match=r"with components, got shape \(0,\)"):
        SteeringVector(direction=torch.ones(0), layer=3)
    with pytest.raises(ValueError, match=r"with components, got shape \(0, 4\)"):
        SteeringVectors(directions=torch.ones(0, 4), layers=())


def test_a_vector_made_by_hand_does_not_follow_its_tensor():
    for tensor in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], requires_grad=True).detach()):
        made = SteeringVector.from_direction(tensor, 7)
        tensor.zero_()
        assert torch.equal(made.direction, torch.tensor([1.0, 2.0]))


def test_a_vector_made_of_a_tensor_that_is_trained_is_that_tensor():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    assert SteeringVector.from_direction(tensor, 7).direction is tensor


def test_vectors_are_immutable():
    with pytest.raises(FrozenInstanceError):
        vector([1.0, 2.0]).layer = 3
    with pytest.raises(FrozenInstanceError):
        vector_set().layers = (1, 2, 3)


def test_changing_the_dtype_and_back_is_exact():
    v = vector_set()[7]
    assert torch.equal(v.to(torch.float64).to(torch.float32).direction, v.direction)
    assert v.to(torch.float64).direction.dtype == torch.float64
    vectors = vector_set()
    assert torch.equal(vectors.to("cpu").to(torch.float64).directions, vectors.directions.double())


# ---- sets -------------------------------------------------------------------------------------------------------


def test_indexing_is_by_block_never_by_list_position():
    vectors = vector_set()
    for row, layer in enumerate(LAYERS):
        assert torch.equal(vectors[layer].direction, vectors.directions[row])
        assert vectors[layer].layer == layer
        assert vectors[layer].hook_name == f"blocks.{layer}.hook_resid_post"
        assert vectors[layer].provenance.expression == f"a[{layer}]"
    for missing in (0, 1, 2, -1, -3, 4):
        assert missing not in vectors
        with pytest.raises(IndexError, match=rf"no vector for layer {missing}: this set has layers 3, 7, 20 \(0-based"):
            vectors[missing]


def test_iterating_gives_every_layer_in_order():
    vectors = vector_set()
    assert [v.layer for v in vectors] == [3, 7, 20]
    assert len(vectors) == 3
    assert torch.equal(torch.stack([v.direction for v in vectors]), vectors.directions)


def test_layers_print_as_runs():
    vectors = vector_set(layers=(0, 1, 2, 3, 7, 20, 21))
    assert "layers=0-3, 7, 20-21" in repr(vectors)


@pytest.mark.parametrize("chosen", [(20, 3), [3, 20, 3], range(3, 21, 17)])
def test_a_subset_keeps_each_layers_own_vector(chosen):
    vectors = vector_set()
    subset = vectors.at(chosen)
    assert subset.layers == (3, 20)
    assert torch.equal(subset[20].direction, vectors.directions[2])
    assert torch.equal(subset[3].direction, vectors.directions[0])
    assert subset.provenance == vectors.provenance


def test_a_subset_of_missing_layers_is_refused():
    with pytest.raises(IndexError, match="no vector for layer 1: this set has layers 3, 7, 20"):
        vector_set().at([3, 1])


def test_collecting_vectors_sorts_them_by_layer_and_undoes_iterating():
    vectors = vector_set()
    again = SteeringVectors.from_vectors([vectors[20], vectors[3], vectors[7]])
    assert again.layers == LAYERS
    assert torch.equal(again.directions, vectors.directions)
    assert again[20].provenance.expression == "a[20]"


def test_collecting_vectors_of_different_origin_records_each():
    a, b = vector_set("a"), vector_set("b", seed=1)
    assert SteeringVectors.from_vectors([b[7], a[3]]).provenance.expression == "{a[3], b[7]}"
    assert SteeringVectors.from_vectors([a[3] - b[3], a[7] - b[7]]).provenance.expression == "a - b"


def test_collecting_what_is_no_set_is_refused():
    a, b = vector_set("a"), vector_set("b", seed=1, model="other")
    with pytest.raises(ValueError, match="cannot make a set of no vectors"):
        SteeringVectors.from_vectors([])
    with pytest.raises(ValueError, match="of different models, m and other"):
        SteeringVectors.from_vectors([a[3], b[7]])
    with pytest.raises(ValueError, match=r"distinct 0-based block numbers in order, got \(3, 3\)"):
        SteeringVectors.from_vectors([a[3], a[3]])


def test_rows_and_layers_must_agree():
    with pytest.raises(ValueError, match="2 directions for 3 layers"):
        SteeringVectors(directions=torch.ones(2, 4), layers=LAYERS)
    with pytest.raises(ValueError, match=r"in order, got \(7, 3\)"):
        SteeringVectors(directions=torch.ones(2, 4), layers=(7, 3))
