"""Contributions sum to what the model itself does, measured here by plain forwards over the whole vocabulary."""

import numpy as np
import pytest
import torch
from helpers.models import random_vectors
from helpers.steering import streams
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation.attribution import attribute_logits
from caa_lens.prompts.prompt_formats import Prompt, default_format, encode_letters
from caa_lens.vectors.steering_vectors import SteeringVector

AB = ContrastSet.from_pairs(
    [
        ("Is it good?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)"),
        ("Would you say that a long question is answered as well?\n\nChoices:\n (A) Yes\n (B) No", "(B)", "(A)"),
        ("Which?\n\nChoices:\n (A) This\n (B) That\n (C) Neither", "(C)", "(A)"),
    ],
    name="letters",
)


def prompt(tokens, steer_start=2):
    n = len(tokens)
    return Prompt(text="", tokens=tuple(tokens), steer_start=steer_start, answer_start=n, read=(n - 1, n))


QUESTIONS = [
    (prompt((5, 9, 3, 17, 60)), 7, 11),
    (prompt((8, 2, 40, 33, 21, 50, 4), 5), 1, 30),
    (prompt((3, 4, 5)), 9, 2),
]
SWAPPED = [(text, b, a) for text, a, b in QUESTIONS]


def measured(model, question, v, m):
    """Logit difference of one unpadded question, steered by a hook that edits in the plainest way."""
    text, a, b = question

    def add(resid, hook):
        return torch.cat([resid[:, : text.steer_start], resid[:, text.steer_start :] + m * v.direction], dim=1)

    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([text.tokens]), fwd_hooks=[(v.hook_name, add)])[0, -1]
    return float(logits[a] - logits[b])


def folded_twin(model):
    from helpers.models import tiny_model

    twin = tiny_model(n_key_value_heads=model.cfg.n_key_value_heads)
    twin.load_and_process_state_dict(
        model.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return twin


def contributions(result):
    table = result.frame.pivot(index="question", columns="component", values="contribution")
    return torch.from_numpy(table.to_numpy().copy())


def assert_components_sum_to_the_models_own_change(model, layer):
    v = random_vectors(model)[layer]
    result = attribute_logits(model, QUESTIONS, v, multiplier=1.5, batch_size=2)
    for i, question in enumerate(QUESTIONS):
        before, after = (measured(model, question, v, m) for m in (0, 1.5))
        change = result.changes.loc[i]
        assert (change["unsteered"], change["steered"]) == pytest.approx((before, after), rel=1e-3, abs=1e-3)
        of_question = result.frame[result.frame["question"] == i]
        assert of_question["contribution"].sum() == pytest.approx(after - before, rel=1e-3, abs=1e-4)
    assert result.explained == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("n_key_value_heads", [2, None])
def test_components_sum_to_the_change_that_the_model_itself_makes(layer, n_key_value_heads, tiny_model):
    assert_components_sum_to_the_models_own_change(tiny_model(n_key_value_heads=n_key_value_heads), layer)


@pytest.mark.hooked  # a bridge is not folded
@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("n_key_value_heads", [2, None])
@pytest.mark.parametrize("fold", [False, True])
def test_components_sum_to_the_change_also_with_a_bias_and_folded(layer, n_key_value_heads, fold, tiny_model):
    model = tiny_model(n_key_value_heads=n_key_value_heads)
    model.b_U.data = torch.randn(64)
    assert_components_sum_to_the_models_own_change(folded_twin(model) if fold else model, layer)


@pytest.mark.hooked  # a bridge is not folded
def test_folding_the_final_norm_into_the_unembedding_changes_no_contribution(tiny):
    v = random_vectors(tiny)[1]
    plain, folded = (contributions(attribute_logits(model, QUESTIONS, v)) for model in (tiny, folded_twin(tiny)))
    assert_close(folded, plain, atol=1e-4, rtol=1e-3)


def test_the_last_layers_vector_acts_by_its_direct_path_and_the_norms_scale_only(tiny):
    result = attribute_logits(tiny, QUESTIONS, random_vectors(tiny)[4])
    assert list(result.summary()["component"]) == ["vector 4", "norm scale"]
    assert result.explained == pytest.approx(1, rel=1e-3)


def test_the_direct_path_and_the_norms_scale_by_hand(tiny):
    v, m = random_vectors(tiny)[2], 2.0
    frame = attribute_logits(tiny, QUESTIONS, v, multiplier=m).frame.set_index(["question", "component"])[
        "contribution"
    ]
    for i, (text, a, b) in enumerate(QUESTIONS):
        final = []
        for multiplier in (0, m):
            hook = v.hook(multiplier=multiplier, start=text.steer_start)
            with torch.no_grad(), tiny.hooks(fwd_hooks=[hook]):
                final.append(streams(tiny, [text.tokens])[-1, 0, -1])
        before, after = ((x.pow(2).mean() + tiny.cfg.eps).sqrt() for x in final)
        u = (tiny.ln_final.w * (tiny.W_U[:, a] - tiny.W_U[:, b])).detach()
        assert frame[i, "vector 2"] == pytest.approx(float(m * v.direction @ u / after), rel=1e-3)
        assert frame[i, "norm scale"] == pytest.approx(float(final[0] @ u * (1 / after - 1 / before)), rel=1e-3)


def test_a_block_that_the_vector_does_not_reach_contributes_nothing(tiny):
    for block in tiny.blocks[3:]:
        for weight in (block.attn.W_O, block.mlp.W_out):
            weight.data.zero_()
    result = attribute_logits(tiny, QUESTIONS, random_vectors(tiny)[2])
    later = result.frame[result.frame["kind"].isin(["attn", "mlp"])]
    assert set(later["layer"]) == {3, 4}
    assert (later["contribution"] == 0).all()


def test_multiplier_zero_contributes_exactly_nothing(tiny):
    result = attribute_logits(tiny, QUESTIONS, random_vectors(tiny)[1], multiplier=0)
    assert (result.frame["contribution"] == 0).all()
    assert (result.changes["change"] == 0).all()
    assert np.isnan(result.direct_share)
    assert np.isnan(result.explained)
    assert "logit difference +0" in result.plot().layout.title.text


def test_exchanging_the_two_tokens_negates_everything(tiny):
    v = random_vectors(tiny)[1]
    ours, theirs = attribute_logits(tiny, QUESTIONS, v), attribute_logits(tiny, SWAPPED, v)
    assert_close(contributions(theirs), -contributions(ours), atol=1e-6, rtol=1e-4)
    assert theirs.total == pytest.approx(-ours.total, rel=1e-4)
    assert theirs.direct_share == pytest.approx(ours.direct_share, rel=1e-3)


def test_batches_and_order_of_questions_change_nothing(tiny):
    v = random_vectors(tiny)[1]
    together, alone = (contributions(attribute_logits(tiny, QUESTIONS, v, batch_size=size)) for size in (3, 1))
    assert_close(together, alone, atol=1e-5, rtol=1e-3)
    backwards = contributions(attribute_logits(tiny, QUESTIONS[::-1], v))
    assert_close(backwards.flip(0), alone, atol=1e-5, rtol=1e-3)


def test_pairs_are_read_at_the_opening_bracket_by_their_letters(tiny_chat):
    v = random_vectors(tiny_chat)[3]
    result = attribute_logits(tiny_chat, AB, v)
    chosen = default_format(tiny_chat)
    by_hand = []
    for pair in AB:
        letters = (pair.positive[1], pair.negative[1])
        opened, ids = encode_letters(chosen, tiny_chat.tokenizer, pair.question, letters)
        by_hand.append((opened, *ids))
    assert_close(contributions(attribute_logits(tiny_chat, by_hand, v)), contributions(result))
    assert result.changes["change"][0] == pytest.approx(
        measured(tiny_chat, by_hand[0], v, 1) - measured(tiny_chat, by_hand[0], v, 0), rel=1e-3, abs=1e-4
    )
    assert result.settings["test_hash"] == AB.content_hash


def test_a_prompt_with_two_words_is_read_after_the_instruction(tiny_chat):
    v, tokenizer = random_vectors(tiny_chat)[3], tiny_chat.tokenizer
    text = default_format(tiny_chat).encode(tokenizer, "Good?")
    ids = [tokenizer.encode(word)[0] for word in ("Yes", "No")]
    by_words = attribute_logits(tiny_chat, [("Good?", "Yes", "No")], v)
    assert_close(contributions(by_words), contributions(attribute_logits(tiny_chat, [(text, *ids)], v)))
    assert np.isnan(by_words.summary()["low"]).all()  # one question has no interval


def test_the_summary_is_the_mean_in_the_order_of_depth(tiny):
    result = attribute_logits(tiny, QUESTIONS, random_vectors(tiny)[2])
    summary = result.summary()
    assert list(summary["component"]) == ["vector 2", "attn 3", "mlp 3", "attn 4", "mlp 4", "norm scale"]
    assert list(summary["layer"].dropna()) == [2, 3, 3, 4, 4]
    assert summary["mean"].sum() == pytest.approx(result.total, rel=1e-3)
    assert (summary["low"] <= summary["mean"]).all()
    assert (summary["mean"] <= summary["high"]).all()
    assert result.by_kind()["vector"] == pytest.approx(summary["mean"][0])
    assert result.direct_share == pytest.approx(summary["mean"][0] / result.total)


def test_the_bars_show_the_summary_and_escape_the_behavior(tiny):
    v = SteeringVector.from_direction(random_vectors(tiny)[2].direction, layer=2, behavior="<b>bold</b>")
    result = attribute_logits(tiny, QUESTIONS, v)
    figure = result.plot()
    shown = {name: value for bar in figure.data for name, value in zip(bar.x, bar.y, strict=True)}
    assert shown == dict(zip(result.summary()["component"], result.summary()["mean"], strict=True))
    assert "&lt;b&gt;bold" in figure.layout.title.text
    assert f"{result.total:+.3g}" in figure.layout.title.text


def test_the_callers_model_and_vector_are_left_as_they_were(tiny):
    v = random_vectors(tiny)[2]
    direction, weights = v.direction.clone(), {k: t.clone() for k, t in tiny.state_dict().items()}
    attribute_logits(tiny, QUESTIONS, v)
    assert torch.equal(v.direction, direction)
    assert all(torch.equal(t, weights[k]) for k, t in tiny.state_dict().items())
    assert not any(point.fwd_hooks for point in tiny.hook_points())


def test_bad_requests_are_refused(tiny, tiny_chat, tiny_model):
    vectors = random_vectors(tiny)
    completions = ContrastSet.from_pairs([("How was it?", "Lovely.", "Bad.")], name="texts")
    with pytest.raises(ValueError, match=r"'texts' has completions.*use A/B pairs, or give"):
        attribute_logits(tiny_chat, completions, random_vectors(tiny_chat)[1])
    with pytest.raises(ValueError, match="no questions given"):
        attribute_logits(tiny, [], vectors[1])
    with pytest.raises(ValueError, match="are the same token, 7"):
        attribute_logits(tiny, [(QUESTIONS[0][0], 7, 7)], vectors[1])
    with pytest.raises(ValueError, match="token id 64 is out of range"):
        attribute_logits(tiny, [(QUESTIONS[0][0], 7, 64)], vectors[1])
    with pytest.raises(ValueError, match="'not one token' is 3 tokens"):
        attribute_logits(tiny_chat, [("Good?", "not one token", "No")], random_vectors(tiny_chat)[1])
    with pytest.raises(ValueError, match="vector has d_model=64"):
        attribute_logits(tiny, QUESTIONS, random_vectors(tiny_model(d_model=64))[1])
    tiny.cfg.output_logits_soft_cap = 30.0
    with pytest.raises(ValueError, match="caps its logits at 30"):
        attribute_logits(tiny, QUESTIONS, vectors[1])


def test_a_late_sentiment_vector_speaks_for_itself_and_an_early_one_through_the_blocks_above(demo_model):
    from caa_lens.vectors.extraction import extract

    vectors = extract(demo_model, ContrastSet.load("sentiment").sample(30, seed=0), layers=[12, 27], progress=False)
    questions = [(f"How was the {x}? Answer with one word.", "Good", "Bad") for x in ("film", "food", "trip")]
    early, late = (attribute_logits(demo_model, questions, vectors[layer], multiplier=2) for layer in (12, 27))
    assert early.total > 0.5
    assert late.total > 0.5
    assert early.explained == pytest.approx(1, rel=0.01)
    assert late.explained == pytest.approx(1, rel=0.01)
    assert late.direct_share > 0.5 > early.direct_share
