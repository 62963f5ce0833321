"""Pairs that cancel: extraction tells, and no lens makes words of it."""

import re
import warnings

import pytest
import torch
from helpers.models import random_vectors

from caa_lens import extract, logit_lens, word_ranks
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet
from caa_lens.vectors.extraction import ZeroVectorWarning, logistic_probe, mean_difference, pca_of_differences
from caa_lens.vectors.steering_vectors import SteeringVectors

ROWS = [
    ("How are you?", "Fine, thanks.", "Bad."),
    ("Why?", "Because it is.", "No."),
    ("What now, then?", "Yes.", "I do not"),
]
EXCHANGED = [(question, negative, positive) for question, positive, negative in ROWS]


@pytest.mark.parametrize("estimator", [mean_difference, pca_of_differences, logistic_probe])
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_pairs_and_their_exchanged_selves_are_told(estimator, batch_size, tiny_chat):
    pairs = ContrastSet.from_pairs([*ROWS, *EXCHANGED], name="both ways")
    said = (
        "the vectors of 'both ways' are zero, or rounding, at layers 0-4: 6 pairs are also there with their answers ex"
    )
    with pytest.warns(ZeroVectorWarning, match=re.escape(said)):
        extract(tiny_chat, pairs, estimator=estimator, batch_size=batch_size, progress=False)


def test_some_pairs_exchanged_and_pairs_that_nearly_cancel_are_not(tiny_chat):
    extract(tiny_chat, ContrastSet.from_pairs([*ROWS, *EXCHANGED[:2]]), progress=False)  # warnings are errors here
    extract(
        tiny_chat, ContrastSet.from_pairs(ROWS), estimator=lambda p, n: 1e-9 * mean_difference(p, n), progress=False
    )


def test_answers_of_the_same_tokens_are_told(demo_tokenizer, tiny_model):
    import copy

    from tokenizers import normalizers

    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    model = tiny_model(d_vocab=len(tokenizer), tokenizer=tokenizer)
    pairs = ContrastSet.from_pairs([("Why?", "It is.", "IT IS."), ("Well?", "Yes, it is.", "YES, it is.")])
    with pytest.warns(ZeroVectorWarning, match=r"at layers 0-4: the pairs cancel.*answers of the same tokens"):
        vectors = extract(model, pairs, progress=False)
    assert vectors.directions.norm() < 1e-5  # rounding, not zero


def test_an_estimator_of_ones_own_is_told_of_zeros_only(tiny_chat):
    with pytest.warns(ZeroVectorWarning, match="at layers 0-4"):
        extract(tiny_chat, ContrastSet.from_pairs(ROWS), estimator=lambda p, n: torch.zeros(32), progress=False)


def test_balanced_letters_of_the_real_model_do_not_cancel(demo_model):
    question = "Is it good?\n\nChoices:\n (A) Yes\n (B) No"
    pair = ContrastPair(question=question, positive="(A)", negative="(B)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(demo_model, ContrastSet(name="x", pairs=(pair, pair.swapped())), progress=False)


@pytest.mark.parametrize("reading", ["direct", "normed", "in_context"])
def test_the_lens_of_a_zero_vector_is_refused_and_that_of_the_other_layers_is_not(reading, tiny_chat):
    vectors = random_vectors(tiny_chat)
    directions = vectors.directions.clone()
    directions[[1, 3]] = 0
    some = SteeringVectors(directions=directions, layers=vectors.layers, provenance=vectors.provenance)
    options = {"reading": reading, "pairs": ContrastSet.from_pairs(ROWS)}
    for read in (
        lambda **more: logit_lens(tiny_chat, some, **options, **more),
        lambda **more: word_ranks(tiny_chat, some, ["good"], **options, **more),
    ):
        with pytest.raises(
            ValueError, match=r"zero vectors promote no token over another: leave out the layers \[1, 3\]"
        ):
            read()
        assert set(read(layers=[0, 2, 4]).frame["layer"]) == {0, 2, 4}
