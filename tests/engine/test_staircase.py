"""Rows that split off where they are steered: every condition as if it had run alone, whatever the others are."""

import pytest
import torch
from torch.testing import assert_close

from caa_lens.engine.edits import Edit
from caa_lens.engine.operators import OPERATORS
from caa_lens.engine.staircase import Staircase, Staircases

N_LAYERS, D_MODEL = 4, 6
GENERATOR = torch.Generator().manual_seed(0)
BLOCKS = torch.randn(N_LAYERS, D_MODEL, D_MODEL, generator=GENERATOR) / 2
VECTORS = torch.randn(2, N_LAYERS, D_MODEL, generator=GENERATOR)


def step(layer, operator="add", multiplier=1.5, which=0):
    direction = VECTORS[which, layer]
    return Edit(direction=direction, layer=layer, positions=(0, None), multiplier=multiplier, operator=operator)


def block(layer, resid):
    return resid + torch.tanh(resid @ BLOCKS[layer])


def alone(condition, resid):
    for layer in range(N_LAYERS):
        resid = block(layer, resid)
        for one in condition:
            if one.layer == layer:
                resid = OPERATORS[one.operator](resid, {"direction": one.direction}, torch.as_tensor(one.multiplier))
    return resid


@pytest.mark.parametrize(
    "conditions",
    [
        [(step(1),), (step(1, multiplier=-2.0),), (step(3),)],
        [(step(1, "ablate"),), (step(1, "ablate", 0.5),)],
        [(step(2, "set"),), (step(2, "set", 0.0),)],
        [(step(1), step(1, multiplier=-0.5, which=1)), (step(1, which=1), step(1))],  # both of two vectors at one layer
        [(step(1), step(1, "ablate", which=1))],
        [(step(0), step(2, "ablate")), (step(0), step(2)), (step(0),), ()],
        [(), (step(0, multiplier=0.0),), (step(3, "ablate", 0.0),)],
    ],
)
@pytest.mark.parametrize("n_branches", [1, 2])
def test_every_condition_has_the_numbers_of_its_own_run(conditions, n_branches):
    start = torch.randn(3, n_branches, 5, D_MODEL, generator=torch.Generator().manual_seed(1))
    stairs, resid = Staircase(conditions), start
    for layer in range(N_LAYERS):
        resid = stairs(layer, block(layer, resid))
    groups = resid.unflatten(1, (-1, n_branches))
    for condition, group in zip(conditions, stairs.condition_groups(), strict=True):
        assert_close(groups[:, int(group)], alone(condition, start), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8, 11, 40])
def test_chunks_hold_no_more_conditions_than_fit_and_are_no_more_than_twice_as_many_as_needed(at_once):
    conditions = [(step(layer, multiplier=m),) for m in (1.0, 2.0) for layer in (3, 0, 2, 1, 3)]
    chunks = list(Staircases([*conditions, ()]).at_most(at_once))
    sizes = [len(indices) for indices, _ in chunks]
    assert max(sizes) <= at_once
    assert len(sizes) <= 2 * -(-11 // at_once)
    assert sorted(torch.cat([indices for indices, _ in chunks]).tolist()) == list(range(11))
    assert all(len(stairs.condition_groups()) == size for (_, stairs), size in zip(chunks, sizes, strict=True))
