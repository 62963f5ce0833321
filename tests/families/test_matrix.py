"""On a bridge of every family every function gives the twin's numbers, or refuses as docs/families.md says."""

import pytest
from helpers.families import DECODERS, OTHERS, RECURRENT, bridge_of
from helpers.family_checks import AB, by_name, case_of
from helpers.family_pages import found_of, row_of, written_rows
from helpers.models import random_vectors
from helpers.twins import ENTRIES, run_with_one_vector_at_layer_1

import caa_lens as cl

pytestmark = pytest.mark.bridge


@pytest.fixture(scope="module", params=[*DECODERS, *RECURRENT])
def case(request):
    return case_of(request.param)


@by_name
def test_a_bridge_gives_the_twins_numbers_or_refuses(case, check):
    found_of(case, check)


def test_the_page_of_families_says_what_was_found(case):
    assert written_rows().get(case.name) == row_of(case), "run: python docs/families.py"


@pytest.fixture(scope="module", params=OTHERS)
def other(request):
    return bridge_of(request.param)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_that_does_not_write_from_left_to_right_is_refused(other, entry):
    with pytest.raises((TypeError, ValueError), match=r"encoder|BERT|T5|from left to right|causal"):
        run_with_one_vector_at_layer_1(entry, other)


def test_nothing_is_read_of_a_model_that_does_not_write_from_left_to_right(other):
    with pytest.raises((TypeError, ValueError), match=r"encoder|BERT|T5|from left to right|causal"):
        cl.extract(other, AB, progress=False)
    with pytest.raises((TypeError, ValueError), match=r"encoder|BERT|T5|from left to right|causal"):
        cl.logit_lens(other, random_vectors(other))
