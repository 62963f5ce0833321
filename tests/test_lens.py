"""The logit lens of vectors against the unembedding itself."""

import pytest
import torch
from helpers import random_vectors, tiny_model
from torch.testing import assert_close

from caa_lens.lens import lens_scores, logit_lens, show_token
from caa_lens.vectors import SteeringVector


@pytest.mark.parametrize("reading", ["direct", "normed"])
def test_the_lens_of_a_tokens_own_unembedding_direction_puts_that_token_first(reading):
    model = tiny_model(d_model=64)
    centred = model.W_U - model.W_U.mean(1, keepdim=True)
    for token in (0, 17, 63):
        # The direction that the final norm's weight turns into the token's unembedding direction.
        v = SteeringVector.from_direction(centred[:, token] / model.ln_final.w, layer=2)
        frame = logit_lens(model, v, k=3, reading=reading).frame
        assert frame.query("side == 'promoted' and rank == 1")["token_id"].item() == token


def test_scores_equal_a_direct_computation_with_hugging_face_modules(demo_model):
    from transformers import AutoModelForCausalLM

    from caa_lens.demo_model import demo_model_path

    hf = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    v = random_vectors(demo_model, seed=3)[7].direction
    with torch.no_grad():
        normed = hf.lm_head(hf.model.norm(v[None, None]))[0, 0]
        direct = hf.lm_head(v * hf.model.norm.weight)
    assert_close(lens_scores(demo_model, v, "normed"), normed - normed.mean(), atol=1e-3, rtol=1e-4)
    assert_close(lens_scores(demo_model, v, "direct"), direct - direct.mean(), atol=1e-3, rtol=1e-4)


def test_folding_the_final_norm_into_the_unembedding_changes_no_score():
    from transformer_lens import HookedTransformer

    model = tiny_model()
    folded: HookedTransformer = tiny_model()
    folded.load_and_process_state_dict(
        model.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    v = random_vectors(model)[1].direction
    assert not hasattr(folded.ln_final, "w") or bool((folded.ln_final.w == 1).all())
    for reading in ("direct", "normed"):
        assert_close(lens_scores(folded, v, reading), lens_scores(model, v, reading), atol=1e-4, rtol=1e-4)


def test_negating_a_vector_exchanges_promoted_and_suppressed(tiny):
    v = random_vectors(tiny)[3]
    plus, minus = logit_lens(tiny, v, k=5).frame, logit_lens(tiny, -v, k=5).frame
    for side, other in (("promoted", "suppressed"), ("suppressed", "promoted")):
        ours = plus[plus["side"] == side]
        theirs = minus[minus["side"] == other]
        assert list(ours["token_id"]) == list(theirs["token_id"])
        assert list(ours["score"]) == pytest.approx([-s for s in theirs["score"]])


def test_the_direct_reading_is_linear_and_the_normed_one_scale_free(tiny):
    v = random_vectors(tiny)[3].direction
    assert_close(lens_scores(tiny, 3 * v, "direct"), 3 * lens_scores(tiny, v, "direct"), atol=1e-4, rtol=1e-4)
    assert_close(lens_scores(tiny, 3 * v, "normed"), lens_scores(tiny, v, "normed"), atol=1e-3, rtol=1e-3)


def test_layers_are_never_mislabelled_when_only_some_were_extracted(tiny):
    everything, some = random_vectors(tiny), random_vectors(tiny).at([1, 3, 4])
    whole, part = logit_lens(tiny, everything, k=2).frame, logit_lens(tiny, some, k=2, layers=[4, 1]).frame
    assert sorted(set(part["layer"])) == [1, 4]
    for layer in (1, 4):
        assert list(part[part["layer"] == layer]["token_id"]) == list(whole[whole["layer"] == layer]["token_id"])


def test_probabilities_are_the_softmax_of_the_scores(tiny):
    frame = logit_lens(tiny, random_vectors(tiny)[2], k=64).frame
    assert frame[frame["side"] == "promoted"]["probability"].sum() == pytest.approx(1, abs=1e-5)


def test_late_sentiment_vectors_promote_positive_words_over_negative_ones(demo_model):
    from caa_lens.contrast import ContrastSet
    from caa_lens.extraction import extract

    vectors = extract(demo_model, ContrastSet.load("sentiment").sample(30, seed=0), layers=[26, 29], progress=False)
    encode = demo_model.tokenizer.encode
    good = [encode(w)[0] for w in (" beautiful", " delight", " wonderful", " joy", " happy") if len(encode(w)) == 1]
    bad = [encode(w)[0] for w in (" ugly", " worse", " terrible", " sad", " failure") if len(encode(w)) == 1]
    assert len(good) >= 3
    assert len(bad) >= 3
    for layer in (26, 29):
        scores = lens_scores(demo_model, vectors[layer].direction, "normed")
        assert scores[good].mean() > scores[bad].mean() + 1


def test_blanks_and_control_characters_are_shown(demo_tokenizer):
    assert show_token(demo_tokenizer, demo_tokenizer.encode(" the")[0]) == "␣the"
    assert "\n" not in show_token(demo_tokenizer, demo_tokenizer.encode("\n")[0])
    assert show_token(None, 7) == "[7]"


def test_bad_requests_are_refused(tiny):
    with pytest.raises(ValueError, match="unknown reading 'tuned': expected one of direct, normed"):
        logit_lens(tiny, random_vectors(tiny), reading="tuned")
    with pytest.raises(ValueError, match="vectors have d_model=64, but 'tiny-random-llama' has d_model=32"):
        logit_lens(tiny, random_vectors(tiny_model(d_model=64)))
