"""Numbers that do not fit: steps are refused before a run, scores of NaN told of after it; what may be a number."""

import numpy as np
import pytest
import torch
from helpers.models import random_vectors

from caa_lens.arguments import as_float, as_seed, check_count, check_list
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.overflow import NotFiniteWarning, check_steps
from caa_lens.interpretation.attribution import attribute_logits
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.measures.answers import score_answers
from caa_lens.measures.open_ended.text_measures import measure_texts
from caa_lens.measures.sweeps import sweep
from caa_lens.models.checks import check_model
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate, generate_tokens
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_block import steer
from caa_lens.transfers.across_layers import transfer_layers
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

PAIRS = ContrastSet.from_pairs([("How are you?", "Well.", "Ill."), ("Is it late?", "Yes, it is.", "No.")])


@pytest.fixture(scope="module")
def half(demo_tokenizer, tiny_model):
    return tiny_model(d_vocab=len(demo_tokenizer), n_ctx=256, tokenizer=demo_tokenizer, dtype=torch.float16)


@pytest.fixture(scope="module")
def massive(demo_tokenizer, tiny_model):
    """A stream with one large component, as real ones have: a step that fits by itself may not fit onto it."""
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=256, tokenizer=demo_tokenizer, dtype=torch.float16)
    model.W_E.data[:, 0] = 50000
    return model


def along_it(layer):
    return SteeringVector.from_direction(torch.eye(32)[0], layer)


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895e38), ("float32", 3.4028e38)])
def test_a_step_is_refused_where_the_models_dtype_ends(dtype, largest, tiny_model):
    model = tiny_model(dtype=getattr(torch, dtype), n_layers=2)
    vector = random_vectors(model, layers=[1])[1].normalized()
    vector = vector / float(vector.direction.abs().max())  # its largest component is 1
    fits = Intervention(vector=vector, multiplier=0.99 * largest).edit(0)
    check_steps(model, [fits])
    assert torch.isfinite(fits.apply(torch.zeros(1, 1, 32, dtype=model.cfg.dtype), 0)).all()
    with pytest.raises(ValueError, match=f"at layer 1 makes a step with a component of .*, more than {dtype} holds"):
        check_steps(model, [Intervention(vector=3.0 * vector, multiplier=0.99 * largest).edit(0)])


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_every_use_of_a_multiplier_is_checked_before_the_model_runs(half, operator, monkeypatch):
    vectors = random_vectors(half)
    check_model(half)  # a bridge is compared once with the module inside
    monkeypatch.setattr(half, "forward", lambda *given, **options: pytest.fail("ran"))
    step = Intervention(vector=vectors[2], multiplier=1e6, operator=operator)
    prompt = Prompt.from_tokens([1, 2, 3])
    with pytest.raises(ValueError, match="more than float16 holds"):
        score_answers(half, PAIRS, [(step,)], progress=False)
    with pytest.raises(ValueError, match="more than float16 holds"):
        generate(half, prompt, vectors=[step])
    with pytest.raises(ValueError, match="more than float16 holds"):
        steer(half, step, start=0)
    with pytest.raises(ValueError, match="or load the model in bfloat16 or float32"):
        sweep(half, PAIRS, vectors, multipliers=[1e6], progress=False)
    with pytest.raises(ValueError, match="more than float16 holds"):
        transfer_layers(half, PAIRS, vectors, multiplier=1e6, progress=False)


def test_conditions_whose_scores_are_nan_are_named_and_the_others_are_right(massive):
    vectors = SteeringVectors.from_vectors([along_it(1), along_it(3)])
    with pytest.warns(
        NotFiniteWarning, match=r"4 of 12 .* NaN in float16, under layer 1 x 20000; layer 3 x 20000: use"
    ):
        result = sweep(massive, PAIRS, vectors, multipliers=[20000, 0, -1], progress=False)
    finite = result.frame[result.frame["multiplier"] <= 0]
    assert np.isfinite(finite["margin"]).all()
    expected = sweep(massive, PAIRS, vectors, multipliers=[0, -1], progress=False)
    assert finite["margin"].tolist() == pytest.approx(expected.frame["margin"].tolist(), abs=1e-3)
    assert result.summary()["mean"].isna().sum() == 2


def test_scores_that_are_all_nan_are_an_error(massive):
    step = Intervention(vector=along_it(1), multiplier=20000.0)
    with pytest.raises(ValueError, match="every score of tiny-random-llama is NaN in float16, of 2 pairs under 1"):
        score_answers(massive, PAIRS, [(step,)], progress=False)


def test_what_a_run_gives_that_is_not_finite_is_an_error(massive):
    steering = [(along_it(1), 20000.0)]
    with pytest.raises(ValueError, match="logits of new token 1 of tiny-random-llama are not finite in float16"):
        generate(massive, "How are you?", vectors=steering, max_new_tokens=3)
    with pytest.raises(ValueError, match="residuals of tiny-random-llama are not finite"):
        residual_lens(massive, "How are you?", vectors=steering)
    with pytest.raises(ValueError, match="logit differences of tiny-random-llama are not finite"):
        attribute_logits(massive, [("How are you?", 3, 4)], along_it(1), multiplier=20000, progress=False)
    with steer(massive, *steering, start=0):
        with pytest.raises(ValueError, match="similarities of tiny-random-llama are not finite"):
            token_similarity(massive, "How are you?", along_it(2))
        with pytest.raises(ValueError, match="log-probabilities of the answers of tiny-random-llama are not finite"):
            measure_texts(massive, [("How are you?", "Well.")], progress=False)


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-300, 1e-20])
def test_the_tiniest_temperature_is_greedy(tiny, temperature):
    tiny.W_U.data *= 100  # logits that divided by it are infinite
    prompts = [Prompt.from_tokens([1, 2, 3])]
    greedy = torch.stack(list(generate_tokens(tiny, prompts, max_new_tokens=8)))
    found = torch.stack(list(generate_tokens(tiny, prompts, max_new_tokens=8, temperature=temperature)))
    assert found.tolist() == greedy.tolist()


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_is_none_is_refused(tiny_chat, temperature):
    with pytest.raises((TypeError, ValueError), match="temperature must be"):
        list(generate_tokens(tiny_chat, [Prompt.from_tokens([1, 2])], temperature=temperature))


def test_no_seed_draws_a_fresh_one():
    assert len({as_seed(None) for _ in range(20)}) == 20
    assert as_seed(np.int64(7)) == 7
    pairs = ContrastSet.from_pairs([(f"Is {n}?", "Yes.", "No.") for n in range(40)])
    assert len({pairs.split(test=20, seed=None)[0].content_hash for _ in range(4)}) == 4


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "1", float("nan")])
def test_what_another_generator_would_take_for_another_seed_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed must be"):
        as_seed(seed)


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", None, [1], float("nan"), float("inf"), 10**400, 1j])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises((TypeError, ValueError), match="size must be"):
        as_float("size", value)


@pytest.mark.parametrize("value", [np.float32(2), np.int64(2), torch.tensor(2), torch.tensor(2.0), np.array(2), 2])
def test_one_number_of_numpy_or_torch_is_that_number(value):
    assert as_float("size", value) == 2.0
    assert check_list("multipliers", [value], float) == [2.0]
    assert type(check_list("layers", [value], int)[0]) is int
    if "float" not in str(getattr(value, "dtype", "")):
        assert check_count("k", value) == 2
        assert type(check_count("k", value)) is int
