"""Every function on a `TransformerBridge` of every family: the twin's numbers, or a refusal that docs/families.md tells."""

import pytest
from helpers.families import DECODERS, FAMILIES, OTHERS, RECURRENT, bridge_of, demo_tokenizer, hf_of
from helpers.family_checks import CHECKS, Case, by_name
from helpers.family_pages import found_of, row_of, written_rows
from helpers.family_twins import Twin

pytestmark = pytest.mark.bridge


@pytest.fixture(scope="module", params=[*DECODERS, *RECURRENT])
def case(request):
    return Case(
        name=request.param, model=bridge_of(request.param), twin=Twin(hf_of(request.param), demo_tokenizer())
    )


@by_name
def test_a_bridge_gives_the_twins_numbers_or_refuses(case, check):
    found_of(case, check)


def test_the_page_of_families_says_what_was_found(case):
    assert written_rows()[case.name] == row_of(case), "run: python docs/families.py"
