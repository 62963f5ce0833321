"""Models over several devices, partly on the disk, or with packed weights: every function gives the untouched model's numbers.

The model is a small random Llama with grouped queries. What its numbers are, `family_twins.Twin` says: torch's own hooks on a copy
that TransformerLens and this package never saw; of packed weights, on a copy that was packed in the same way.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers.families import demo_tokenizer, hf_of
from helpers.family_checks import CHECKS, Case
from helpers.family_twins import Twin
from helpers.two_devices import devices, over_devices

from caa_lens.models.loading.load import load_model

pytestmark = pytest.mark.bridge

FIRST, SECOND = "card:0", "card:1"
HALVES = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": FIRST,
    "model.layers.2": SECOND,
    "model.layers.3": SECOND,
    "model.norm": SECOND,
    "lm_head": SECOND,
}
BACK_AND_FORTH = HALVES | {"model.layers.1": SECOND, "model.layers.2": FIRST, "lm_head": FIRST}


@pytest.fixture(scope="module")
def twin():
    return Twin(hf_of("llama3"), demo_tokenizer())


def over(device_map):
    return load_model("tiny", hf_model=over_devices(hf_of("llama3"), device_map), tokenizer=demo_tokenizer())


@pytest.fixture(scope="module", params=[HALVES, BACK_AND_FORTH], ids=["halves", "back and forth"])
def over_two(request, twin):
    with devices():
        return Case(name="llama3", model=over(request.param), twin=twin)


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_over_two_devices_every_function_gives_the_numbers_of_one(over_two, check):
    with devices():
        check(over_two)
