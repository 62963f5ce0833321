"""On a bridge of every family every function gives the twin's numbers, or refuses as docs/families.md says."""

import pytest
import torch
import transformers
from helpers.families import FAMILIES, OTHERS, absent_here, bridge_of, run_here, wrong_here
from helpers.family_checks import AB, LONG, by_name, case_of
from helpers.family_pages import absent_row, found_of, row_of, written_rows
from helpers.models import ROOT, random_vectors
from helpers.twins import ENTRIES, run_with_one_vector_at_layer_1

import caa_lens as cl

pytestmark = pytest.mark.bridge


@pytest.fixture(scope="module", params=run_here())
def case(request):
    if request.param in absent_here():
        pytest.skip("this TransformerLens does not load it")
    return case_of(request.param)


@by_name
def test_a_bridge_gives_the_twins_numbers_or_refuses(case, check):
    if case.name in wrong_here() and check.__name__ in ("hook", "hook_generate"):
        pytest.skip("a hook knows no model: in the model's own run it gets the model's own, wrong numbers")
    found = found_of(case, check)
    assert found.refused or case.name not in wrong_here()


@pytest.mark.parametrize("name", ["cohere", "cohere2"])
def test_what_transformer_lens_3_computes_otherwise_is_what_is_said_of_it(name):
    case = case_of(name)
    tokens = case.twin.text(LONG).tokens
    with torch.no_grad():
        error = (case.model(torch.tensor([tokens]))[0] - case.twin.run(tokens).logits).abs().max()
    assert (error > 0.5) == (name in wrong_here())
    assert error > 0.5 or error < 1e-4


PINNED = f"transformers=={transformers.__version__}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(not PINNED, reason="the page is of the pinned transformers")
def test_the_page_of_families_says_what_was_found(case):
    assert written_rows().get(case.name) == row_of(case), "run: python docs/families.py"


def test_the_page_of_families_has_every_family():
    rows = written_rows()
    assert list(rows) == list(FAMILIES), "run: python docs/families.py"
    for name in absent_here():
        assert rows[name] == absent_row(name)


@pytest.fixture(scope="module", params=OTHERS)
def other(request):
    if request.param in absent_here():
        pytest.skip("this TransformerLens does not run it")
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
