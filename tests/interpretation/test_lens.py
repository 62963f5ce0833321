"""The logit lens of vectors against the unembedding itself."""

import json

import pytest
import torch
from helpers.models import demo_hugging_face, random_vectors
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation.lens import lens_scores, logit_lens, word_ranks
from caa_lens.interpretation.words import word_tokens
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import default_format
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVector

QUESTION = "Which one?\n\nChoices:\n (A) Yes\n (B) No"
PAIRS = ContrastSet.from_pairs([(QUESTION, "(A)", "(B)"), ("Really, which?" + QUESTION[10:], "(B)", "(A)")])
COMPLETIONS = ContrastSet.from_pairs([("How was it?", "It was a great day.", "Bad."), ("And you?", "Fine!", "Tired.")])


def all_scores(result, layer):
    """Score of every token at a layer, by token id, from a lens that kept all of them."""
    frame = result.frame[(result.frame["layer"] == layer) & (result.frame["side"] == "promoted")]
    return torch.tensor(frame.sort_values("token_id")["score"].to_numpy(), dtype=torch.float32)


WORDS = [
    "the",
    "a",
    "of",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "have",
    "from",
    "or",
    "one",
    "had",
    "by",
]


def scores_of_words(model, vector, **options):
    ranks = word_ranks(model, vector, WORDS, reading="in_context", pairs=PAIRS, **options)
    return torch.tensor(ranks.frame["score"].to_numpy(), dtype=torch.float32)


def real_states(model, pairs, layer):
    """The averaged residual of each prompt's read span, one prompt at a time through TransformerLens' own cache."""
    states = []
    for sides in encode_pairs(model, pairs, default_format(model)):
        for prompt in sides:
            _, cache = model.run_with_cache(torch.tensor([prompt.tokens]))
            states.append(cache["resid_post", layer][0, slice(*prompt.read)].mean(0))
    return states


def model_lens(model, state):
    return model.unembed(model.ln_final(state[None, None]))[0, 0]


@pytest.mark.parametrize("reading", ["direct", "normed"])
def test_the_lens_of_a_tokens_own_unembedding_direction_puts_that_token_first(reading, tiny_model):
    model = tiny_model(d_model=64)
    centred = model.W_U - model.W_U.mean(1, keepdim=True)
    for token in (0, 17, 63):
        # The direction that the final norm's weight turns into the token's unembedding direction.
        v = SteeringVector.from_direction(centred[:, token] / model.ln_final.w, layer=2)
        frame = logit_lens(model, v, k=3, reading=reading).frame
        assert frame.query("side == 'promoted' and rank == 1")["token_id"].item() == token


def test_scores_equal_a_direct_computation_with_hugging_face_modules(demo_model):
    hf = demo_hugging_face()
    v = random_vectors(demo_model, seed=3)[7].direction
    with torch.no_grad():
        normed = hf.lm_head(hf.model.norm(v[None, None]))[0, 0]
        direct = hf.lm_head(v * hf.model.norm.weight)
    assert_close(lens_scores(demo_model, v, "normed"), normed - normed.mean(), atol=1e-3, rtol=1e-4)
    assert_close(lens_scores(demo_model, v, "direct"), direct - direct.mean(), atol=1e-3, rtol=1e-4)


@pytest.mark.hooked  # a bridge is not folded
def test_folding_the_final_norm_into_the_unembedding_changes_no_score(tiny_model):
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
    train, test = ContrastSet.load("sentiment").sample(34, seed=0).split(test=4, seed=0)
    vectors = extract(demo_model, train, layers=[26, 29], progress=False)
    good, bad = ["beautiful", "delight", "wonderful", "joy", "happy"], ["ugly", "worse", "terrible", "sad", "failure"]
    normed = word_ranks(demo_model, vectors, good + bad)
    assert set(normed.frame["pieces"]) == {1}
    margins = normed.margin(good, bad)
    assert list(margins["layer"]) == [26, 29]
    assert (margins["margin"] > 10).all()
    in_context = word_ranks(demo_model, vectors, good + bad, reading="in_context", pairs=test)
    assert (in_context.margin(good, bad)["margin"] > 1).all()
    for layer in (26, 29):
        scores = lens_scores(demo_model, vectors[layer].direction, "normed")
        at = {word: demo_model.tokenizer.encode(" " + word)[0] for word in good + bad}
        by_hand = scores[[at[w] for w in good]].mean() - scores[[at[w] for w in bad]].mean()
        assert margins.set_index("layer")["margin"][layer] == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("pairs", [PAIRS, COMPLETIONS], ids=["letters", "completions"])
def test_in_context_equals_a_loop_over_prompts_through_the_models_own_modules(tiny_chat, pairs):
    vectors, m = random_vectors(tiny_chat).at([1, 3]), -2.0
    result = logit_lens(tiny_chat, vectors, k=10**6, reading="in_context", pairs=pairs, multiplier=m)
    for layer in (1, 3):
        shifts, changes = [], []
        with torch.no_grad():
            for state in real_states(tiny_chat, pairs, layer):
                before = model_lens(tiny_chat, state)
                after = model_lens(tiny_chat, state + m * vectors[layer].direction)
                shifts.append(after - before)
                changes.append(after.softmax(-1) - before.softmax(-1))
        expected = torch.stack(shifts).mean(0)
        assert_close(all_scores(result, layer), expected - expected.mean(), atol=1e-4, rtol=1e-4)
        top = result.frame[(result.frame["layer"] == layer) & (result.frame["side"] == "promoted")][:50]
        change = torch.stack(changes).mean(0)[top["token_id"].tolist()]
        assert_close(torch.tensor(top["probability"].to_numpy(), dtype=torch.float32), change, atol=1e-6, rtol=1e-3)


def test_in_context_equals_hugging_face_modules_at_a_real_residual(demo_model):
    hf = demo_hugging_face()
    v = random_vectors(demo_model, scale=0.5, seed=4)[20]
    result = logit_lens(demo_model, v, k=10**6, reading="in_context", pairs=PAIRS[:1], multiplier=3)
    shifts = []
    with torch.no_grad():
        for prompt in encode_pairs(demo_model, PAIRS[:1], default_format(demo_model))[0]:
            hidden = hf(torch.tensor([prompt.tokens]), output_hidden_states=True).hidden_states[21]
            state = hidden[0, prompt.read[0]]
            shifts.append(hf.lm_head(hf.model.norm(state + 3 * v.direction)) - hf.lm_head(hf.model.norm(state)))
    expected = torch.stack(shifts).mean(0)
    assert_close(all_scores(result, 20), expected - expected.mean(), atol=2e-3, rtol=1e-3)


def test_in_context_of_a_small_multiplier_is_the_derivative_of_the_lens(tiny_chat):
    v, m = random_vectors(tiny_chat)[2], 1e-2
    result = logit_lens(tiny_chat, v, k=10**6, reading="in_context", pairs=PAIRS, multiplier=m)

    def lens(state):  # without TransformerLens' hook points, which do not go through jvp
        scale = (state.pow(2).mean() + tiny_chat.cfg.eps).sqrt()
        return (state / scale * tiny_chat.ln_final.w.detach()) @ tiny_chat.W_U.detach()

    slopes = [torch.func.jvp(lens, (s.detach(),), (v.direction,))[1] for s in real_states(tiny_chat, PAIRS, 2)]
    slope = torch.stack(slopes).mean(0)
    slope = slope - slope.mean()
    assert (all_scores(result, 2) / m - slope).norm() < 0.02 * slope.norm()


@pytest.mark.hooked  # a bridge is not folded
def test_folding_the_final_norm_changes_no_reading_in_context(tiny_chat, tiny_model):
    folded = tiny_model(d_vocab=tiny_chat.cfg.d_vocab, n_ctx=512, tokenizer=tiny_chat.tokenizer)
    folded.load_and_process_state_dict(
        tiny_chat.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False
    )
    v = random_vectors(tiny_chat)[1]
    ours, theirs = (
        logit_lens(model, v, k=10**6, reading="in_context", pairs=PAIRS, background=3) for model in (tiny_chat, folded)
    )
    assert_close(all_scores(ours, 1), all_scores(theirs, 1), atol=1e-4, rtol=1e-3)


def test_background_equals_a_loop_over_the_directions_and_their_negatives(tiny_chat):
    v, n, seed = 3 * random_vectors(tiny_chat)[2], 4, 5
    random = torch.randn(n, tiny_chat.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    loop = []
    for direction in torch.cat([random, -random]):
        u = SteeringVector.from_direction(direction / direction.norm() * v.norm, layer=2)
        loop.append(scores_of_words(tiny_chat, u))
    expected = scores_of_words(tiny_chat, v) - torch.stack(loop).mean(0)
    assert_close(scores_of_words(tiny_chat, v, background=n, seed=seed), expected, atol=1e-4, rtol=1e-3)
    settings = word_ranks(tiny_chat, v, ["no"], reading="in_context", pairs=PAIRS, background=n, seed=seed).settings
    assert (settings["background"], settings["seed"]) == ("4", "5")
    assert settings["pairs_hash"] == PAIRS.content_hash


def test_background_correction_shrinks_the_lens_of_a_random_direction(tiny_chat):
    v = 2 * random_vectors(tiny_chat, seed=9)[2]
    assert scores_of_words(tiny_chat, v, background=64).norm() < scores_of_words(tiny_chat, v).norm()


def test_the_multiplier_scales_direct_and_leaves_normed_its_sign(tiny):
    v = random_vectors(tiny)[2]
    for reading, factor in (("direct", -3), ("normed", -1)):
        plain = all_scores(logit_lens(tiny, v, k=64, reading=reading), 2)
        scaled = all_scores(logit_lens(tiny, v, k=64, reading=reading, multiplier=-3), 2)
        assert_close(scaled, factor * plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("reading", ["direct", "normed"])
def test_a_words_own_unembedding_direction_ranks_it_first_and_its_negative_last(tiny_chat, reading):
    token = tiny_chat.tokenizer.encode(" happy")[0]
    centred = tiny_chat.W_U - tiny_chat.W_U.mean(1, keepdim=True)
    # In 32 dimensions a longer neighbour could win on the dot product; the Gram-whitened direction cannot lose.
    own = torch.linalg.solve(centred @ centred.T, centred[:, token]) / tiny_chat.ln_final.w
    v = SteeringVector.from_direction(own, layer=3)
    ranks = word_ranks(tiny_chat, v, ["happy"], reading=reading)
    assert ranks.frame[["layer", "word", "token", "token_id", "pieces", "rank"]].to_dict("records") == [
        {"layer": 3, "word": "happy", "token": "␣happy", "token_id": token, "pieces": 1, "rank": 1}
    ]
    assert word_ranks(tiny_chat, -v, ["happy"], reading=reading).frame["rank"].item() == ranks.d_vocab


def test_ranks_and_scores_are_those_of_the_full_lens(tiny_chat):
    vectors = random_vectors(tiny_chat).at([4, 1])
    frame = word_ranks(tiny_chat, vectors, ["happy", "unhappily"]).frame
    assert list(frame["layer"]) == [1, 1, 4, 4]
    whole = logit_lens(tiny_chat, vectors, k=tiny_chat.cfg.d_vocab).frame.query("side == 'promoted'")
    both = frame.merge(whole, on=["layer", "token_id"], suffixes=("", "_of_lens"))
    assert len(both) == 4
    assert list(both["rank"]) == list(both["rank_of_lens"])
    assert list(both["score"]) == pytest.approx(list(both["score_of_lens"]))


def test_a_word_of_several_tokens_stands_by_its_first_and_says_so(tiny_chat):
    row = word_ranks(tiny_chat, random_vectors(tiny_chat)[0], [" unhappily "]).frame.iloc[0]
    pieces = tiny_chat.tokenizer.encode(" unhappily")
    assert (row["token_id"], row["pieces"], row["token"]) == (pieces[0], len(pieces), "␣unh")
    assert row["pieces"] > 1


def test_words_of_llama_2_are_found_behind_the_blank_that_sentencepiece_adds(llama2_tokenizer):
    happy = llama2_tokenizer.convert_tokens_to_ids("▁happy")
    assert word_tokens(llama2_tokenizer, "happy") == (happy,)
    assert llama2_tokenizer.convert_ids_to_tokens(word_tokens(llama2_tokenizer, "unhappily")[0]) == "▁unh"


def test_the_margin_is_the_difference_of_mean_scores(tiny_chat):
    ranks = word_ranks(tiny_chat, random_vectors(tiny_chat), ["good", "happy", "bad"], layers=[2, 4])
    margin = ranks.margin(["good", "happy"], ["bad"])
    scores = ranks.frame.set_index(["layer", "word"])["score"]
    for row in margin.itertuples():
        by_hand = (scores[row.layer, "good"] + scores[row.layer, "happy"]) / 2 - scores[row.layer, "bad"]
        assert row.margin == pytest.approx(by_hand)
    with pytest.raises(ValueError, match=r"\['sad'\] were not ranked: expected some of"):
        ranks.margin(["good"], ["sad"])


def test_words_that_cannot_be_ranked_are_refused(tiny, tiny_chat):
    vectors = random_vectors(tiny_chat)
    with pytest.raises(ValueError, match="no words given: expected at least one"):
        word_ranks(tiny_chat, vectors, [])
    with pytest.raises(ValueError, match="got ' ' among the words, expected some text"):
        word_ranks(tiny_chat, vectors, ["happy", " "])
    with pytest.raises(TypeError, match="expected a list of words, got the string 'happy': put it into a list"):
        word_ranks(tiny_chat, vectors, "happy")
    with pytest.raises(TypeError, match="this model has no tokenizer"):
        word_ranks(tiny, random_vectors(tiny), ["happy"])


def test_figures_show_tokens_as_text_and_layers_by_their_number(tiny_chat):
    vectors = random_vectors(tiny_chat).at([0, 1, 4])
    tag = tiny_chat.tokenizer.encode("<b>", add_special_tokens=False)[0]
    own = torch.linalg.solve(tiny_chat.W_U @ tiny_chat.W_U.T, tiny_chat.W_U[:, tag]) / tiny_chat.ln_final.w
    tagged = SteeringVector.from_direction(own, layer=2, behavior="<i>")
    figure = logit_lens(tiny_chat, tagged, k=3).plot()
    assert figure.data[0].text[0][0] == tiny_chat.tokenizer.decode([tag]).replace("<", "&lt;").replace(">", "&gt;")
    assert "<i>" not in figure.layout.title.text
    figure = logit_lens(tiny_chat, vectors, k=3).plot()
    assert [list(panel.y) for panel in figure.data] == [["0", "1", "4"]] * 2
    assert [panel.title.text for panel in (figure.layout.xaxis, figure.layout.yaxis)] == [
        "rank (1 is the extreme)",
        "layer (0-based block)",
    ]
    curves = word_ranks(tiny_chat, vectors, ["happy", "<b>"]).plot()
    assert {line.name.split(" (")[0] for line in curves.data} == {"happy", "&lt;b&gt;"}
    runs = {tuple(line.x) for line in curves.data}
    assert runs == {(0, 1), (4,)}, "layers 1 and 4 are further apart than 0 and 1: no line between them"
    assert curves.layout.yaxis.range[0] > curves.layout.yaxis.range[1]
    json.loads(curves.to_json())


def test_tables_in_notebooks_are_escaped(tiny_chat):
    tag = tiny_chat.tokenizer.encode("<b>", add_special_tokens=False)[0]
    own = torch.linalg.solve(tiny_chat.W_U @ tiny_chat.W_U.T, tiny_chat.W_U[:, tag]) / tiny_chat.ln_final.w
    lens = logit_lens(tiny_chat, SteeringVector.from_direction(own, layer=2))
    shown = tiny_chat.tokenizer.decode([tag])
    assert "<" in shown
    assert shown in repr(lens)
    assert shown.replace("<", "&lt;").replace(">", "&gt;") in lens._repr_mimebundle_()["text/html"]
    assert "&lt;b&gt;" in word_ranks(tiny_chat, random_vectors(tiny_chat), ["<b>"])._repr_mimebundle_()["text/html"]


def test_the_callers_vectors_and_hooks_are_left_alone(tiny_chat):
    vectors = random_vectors(tiny_chat)
    before = vectors.directions.clone()
    logit_lens(tiny_chat, vectors, reading="in_context", pairs=PAIRS, multiplier=2, background=2)
    assert torch.equal(vectors.directions, before)
    assert not any(point.fwd_hooks for point in tiny_chat.hook_dict.values())


def test_bad_requests_are_refused(tiny, tiny_model):
    with pytest.raises(ValueError, match="unknown reading 'tuned': expected one of direct, normed, in_context"):
        logit_lens(tiny, random_vectors(tiny), reading="tuned")
    with pytest.raises(ValueError, match="vectors have d_model=64, but 'tiny-random-llama' has d_model=32"):
        logit_lens(tiny, random_vectors(tiny_model(d_model=64)))
    vectors = random_vectors(tiny)
    with pytest.raises(ValueError, match="reading 'in_context' needs real residuals: give a ContrastSet as pairs="):
        logit_lens(tiny, vectors, reading="in_context")
    with pytest.raises(ValueError, match="call logit_lens"):
        lens_scores(tiny, vectors[0].direction, "in_context")
    with pytest.raises(ValueError, match="background=8 has nothing to correct in reading 'normed'"):
        logit_lens(tiny, vectors, background=8)
    with pytest.raises(ValueError, match="background must be a number of random directions, 0 for none, got -1"):
        logit_lens(tiny, vectors, background=-1)
    with pytest.raises(ValueError, match="multiplier must be a finite number other than 0, got 0"):
        logit_lens(tiny, vectors, multiplier=0)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        logit_lens(tiny, vectors, k=0)
    with pytest.raises(ValueError, match="layer 5 is out of range"):
        logit_lens(tiny, vectors, layers=[5])
    with pytest.raises(IndexError, match="no vector for layer 2"):
        logit_lens(tiny, vectors.at([1, 3]), layers=[2])


@pytest.mark.hooked  # what a bridge runs is in its module
def test_a_final_norm_without_a_formula_is_refused(tiny):
    vectors = random_vectors(tiny)
    tiny.ln_final = torch.nn.BatchNorm1d(tiny.cfg.d_model)
    with pytest.raises(ValueError, match="the final norm of 'tiny-random-llama' is a BatchNorm1d, expected RMSNorm"):
        logit_lens(tiny, vectors)
