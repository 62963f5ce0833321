"""The lens of the stream against the model's own logits, and against hooks written out."""

import pytest
import torch
from helpers.models import random_vectors
from torch.testing import assert_close

from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.interpretation.words import show_token
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.prompt_formats import Prompt, default_format
from caa_lens.steering.interventions import Intervention

QUESTION = "How was your day, in one word or two?"


def ids(*tokens, start=3):
    return Prompt(text="made of ids", tokens=tokens, steer_start=start, answer_start=len(tokens), read=(0, 1))


PROMPT = ids(5, 17, 33, 2, 60, 8, 41)


def rows(lens, *, steered, layer):
    frame = lens.frame
    return frame[(frame["steered"] == steered) & (frame["layer"] == layer)].sort_values("position")


def test_the_last_layer_is_the_models_own_output(tiny):
    lens = residual_lens(tiny, PROMPT)
    with torch.no_grad():
        probabilities = tiny(torch.tensor([PROMPT.tokens]))[0].softmax(-1)
    last = rows(lens, steered=False, layer=4)
    assert list(last["position"]) == list(range(7))
    assert list(last["top_token_id"]) == probabilities.argmax(-1).tolist()
    assert list(last["probability"]) == pytest.approx(probabilities.max(-1).values.tolist(), rel=1e-4)
    assert list(last["p_unsteered_answer"]) == pytest.approx(list(last["probability"]))
    assert (last["rank_unsteered_answer"] == 1).all()


def test_every_layer_equals_the_models_own_norm_and_unembedding_of_the_cache(tiny):
    lens = residual_lens(tiny, PROMPT, layers=[3, 1], positions=[6, 2])
    assert list(lens.frame["layer"]) == [1, 1, 3, 3]
    with torch.no_grad():
        logits, cache = tiny.run_with_cache(torch.tensor([PROMPT.tokens]))
        answer = logits[0].argmax(-1)
        for layer in (1, 3):
            expected = tiny.unembed(tiny.ln_final(cache["resid_post", layer]))[0]
            for row in rows(lens, steered=False, layer=layer).itertuples():
                here = expected[row.position]
                assert row.top_token_id == int(here.argmax())
                assert row.probability == pytest.approx(float(here.softmax(-1).max()), rel=1e-4)
                wanted = int(answer[row.position])
                assert row.p_unsteered_answer == pytest.approx(float(here.softmax(-1)[wanted]), rel=1e-4)
                assert row.rank_unsteered_answer == int((here > here[wanted]).sum()) + 1
                assert row.token_in == f"[{PROMPT.tokens[row.position]}]"


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_steered_rows_equal_a_run_with_the_hooks_by_hand(tiny, operator):
    v = random_vectors(tiny, scale=2)[1]
    steering = Intervention(vector=v, multiplier=1.5, operator=operator)
    lens = residual_lens(tiny, PROMPT, vectors=[steering])
    by_hand = Intervention(vector=v, multiplier=1.5, operator=operator, start=PROMPT.steer_start)
    with torch.no_grad(), tiny.hooks(fwd_hooks=[by_hand.hook()]):
        logits, cache = tiny.run_with_cache(torch.tensor([PROMPT.tokens]))
    answer = logits[0].argmax(-1)
    plain = tiny(torch.tensor([PROMPT.tokens]))[0].argmax(-1)
    for layer in range(5):
        with torch.no_grad():
            expected = tiny.unembed(tiny.ln_final(cache["resid_post", layer]))[0].softmax(-1)
        found = rows(lens, steered=True, layer=layer)
        assert list(found["top_token_id"]) == expected.argmax(-1).tolist()
        assert list(found["p_steered_answer"]) == pytest.approx(
            expected.gather(1, answer[:, None])[:, 0].tolist(), rel=1e-3, abs=1e-7
        )
        assert list(found["p_unsteered_answer"]) == pytest.approx(
            expected.gather(1, plain[:, None])[:, 0].tolist(), rel=1e-3, abs=1e-7
        )


def test_several_vectors_with_multipliers_of_their_own_all_count(tiny):
    vectors = random_vectors(tiny, scale=2)
    lens = residual_lens(tiny, PROMPT, vectors=[(vectors[1], -1.0), vectors[3]])
    hooks = [vectors[1].hook(multiplier=-1.0, start=3), vectors[3].hook(start=3)]
    with torch.no_grad(), tiny.hooks(fwd_hooks=hooks):
        logits = tiny(torch.tensor([PROMPT.tokens]))[0]
    assert list(rows(lens, steered=True, layer=4)["top_token_id"]) == logits.argmax(-1).tolist()
    assert lens.interventions == ("add -1 * random[1] at layer 1", "add 1 * random[3] at layer 3")
    assert (lens.steered_layers, lens.steer_start) == ((1, 3), 3)


def test_unsteered_rows_do_not_depend_on_the_vectors(tiny):
    v = random_vectors(tiny, scale=3)[1]
    plain, both = residual_lens(tiny, PROMPT), residual_lens(tiny, PROMPT, vectors=[v])
    assert not plain.frame["steered"].any()
    assert "steered_answer" not in plain.frame
    unsteered = both.frame[~both.frame["steered"]][list(plain.frame.columns)]
    assert unsteered.equals(plain.frame)


def test_nothing_changes_before_the_steered_layer_and_position(tiny):
    frame = residual_lens(tiny, PROMPT, vectors=[random_vectors(tiny, scale=3)[2]]).frame
    key = ["layer", "position"]
    both = frame[~frame["steered"]].merge(frame[frame["steered"]], on=key, suffixes=("", "_steered"))
    same = both["probability"] == both["probability_steered"]
    before = (both["layer"] < 2) | (both["position"] < PROMPT.steer_start)
    assert same[before].all()
    assert not same[~before].any()


def test_multiplier_zero_is_the_unsteered_run(tiny):
    frame = residual_lens(tiny, PROMPT, vectors=[(random_vectors(tiny)[2], 0)]).frame
    columns = ["layer", "position", "top_token_id", "probability"]
    steered = frame[frame["steered"]][columns].reset_index(drop=True)
    assert steered.equals(frame[~frame["steered"]][columns].reset_index(drop=True))


def test_the_lens_at_any_number_of_states_is_the_same(tiny, monkeypatch):
    whole = residual_lens(tiny, PROMPT, vectors=[random_vectors(tiny)[1]]).frame
    monkeypatch.setattr("caa_lens.interpretation.residual_stream.STATES_AT_ONCE", 3)
    pieces = residual_lens(tiny, PROMPT, vectors=[random_vectors(tiny)[1]]).frame
    assert list(pieces["top_token_id"]) == list(whole["top_token_id"])
    assert list(pieces["probability"]) == pytest.approx(list(whole["probability"]), rel=1e-5)


@pytest.mark.hooked  # a bridge is not folded
def test_folding_the_final_norm_into_the_unembedding_changes_nothing(tiny, tiny_model):
    folded = tiny_model()
    folded.load_and_process_state_dict(
        tiny.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False
    )
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert_close(final_logits(folded, states), final_logits(tiny, states), atol=1e-4, rtol=1e-4)


def test_an_answer_settles_at_the_first_layer_of_an_unbroken_run(tiny):
    lens = residual_lens(tiny, PROMPT, vectors=[random_vectors(tiny, scale=3)[1]])
    for position in range(7):
        for steered in (False, True):
            here = lens.frame[(lens.frame["position"] == position) & (lens.frame["steered"] == steered)]
            top = here.sort_values("layer")["top_token_id"].tolist()
            settled = lens.settles_at(position, steered=steered)
            assert all(token == top[-1] for token in top[settled:])
            assert settled == 0 or top[settled - 1] != top[-1]
    lens.frame.loc[:, "rank_steered_answer"] = 2
    assert lens.settles_at() is None
    assert lens.settles_at(steered=False) is not None


def test_the_summary_says_what_each_run_answers_and_where_it_settles(tiny):
    lens = residual_lens(tiny, PROMPT, vectors=[random_vectors(tiny, scale=3)[1]])
    summary = lens.summary()
    assert list(summary.columns) == ["position", "token_in", "steered", "answer", "settles_at"]
    assert list(summary["position"]) == [position for position in range(7) for _ in range(2)]
    assert list(summary["steered"]) == [False, True] * 7
    for position, _, steered, answer, settled in summary.itertuples(index=False):
        last = lens.frame[(lens.frame["position"] == position) & (lens.frame["steered"] == steered)].iloc[-1]
        assert (answer, settled) == (last["top_token"], lens.settles_at(position, steered=steered))
    lens.frame.loc[:, "rank_steered_answer"] = 2
    assert lens.summary()["settles_at"].isna().tolist() == [False, True] * 7
    assert len(residual_lens(tiny, PROMPT, positions=[2]).summary()) == 1


def test_the_last_twelve_positions_are_read_by_default(tiny_chat):
    prompt = default_format(tiny_chat).encode(tiny_chat.tokenizer, QUESTION)
    lens = residual_lens(tiny_chat, QUESTION, layers=[0])
    assert list(lens.frame["position"]) == list(range(len(prompt) - 12, len(prompt)))
    assert lens.prompt == prompt
    assert residual_lens(tiny_chat, QUESTION, layers=[0], system="Be brief.").prompt != prompt


def test_figures_show_a_panel_a_run_with_escaped_tokens(tiny_chat):
    prompt = default_format(tiny_chat).encode(tiny_chat.tokenizer, QUESTION)
    lens = residual_lens(tiny_chat, prompt, vectors=[random_vectors(tiny_chat, scale=2)[2]], layers=[1, 2, 4])
    figure = lens.plot()
    assert [list(panel.y) for panel in figure.data] == [["1", "2", "4"]] * 2
    ticks = figure.layout.xaxis.ticktext
    assert any("&lt;|im_end|&gt;" in tick for tick in ticks)
    assert not any("<" in tick for tick in ticks)
    assert figure.layout.coloraxis.colorbar.title.text == "probability of the token"
    assert len(figure.layout.shapes) == 1
    assert len(residual_lens(tiny_chat, prompt).plot().data) == 1
    assert "<|im_start|>" not in str(figure.to_dict()["data"])


def test_the_callers_model_keeps_no_hook_also_after_an_error(tiny):
    def fail(resid, hook):
        raise RuntimeError("on purpose")

    steering = random_vectors(tiny)[1]
    with tiny.hooks(fwd_hooks=[("blocks.4.hook_resid_post", fail)]), pytest.raises(RuntimeError, match="on purpose"):
        residual_lens(tiny, PROMPT, vectors=[steering])
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_bad_requests_are_refused(tiny, tiny_model):
    v = random_vectors(tiny)[1]
    with pytest.raises(ValueError, match="position 7 is out of range: the prompt has positions 0 to 6"):
        residual_lens(tiny, PROMPT, positions=[7])
    with pytest.raises(ValueError, match="position -1 is out of range"):
        residual_lens(tiny, PROMPT, positions=[-1])
    with pytest.raises(ValueError, match="no positions given"):
        residual_lens(tiny, PROMPT, positions=[])
    with pytest.raises(ValueError, match="layer 5 is out of range"):
        residual_lens(tiny, PROMPT, layers=[5])
    with pytest.raises(
        ValueError, match=r"multiplier must be one number, got tensor\(\[0., 1.\]\): call once for each"
    ):
        residual_lens(tiny, PROMPT, vectors=[(v, torch.tensor([0.0, 1.0]))])
    with pytest.raises(ValueError, match="vector has d_model=64"):
        residual_lens(tiny, PROMPT, vectors=[random_vectors(tiny_model(d_model=64))[1]])
    with pytest.raises(TypeError, match="this model has no tokenizer"):
        residual_lens(tiny, "How?", prompt_format="llama2-base")
    with pytest.raises(ValueError, match="the prompt has 129 tokens"):
        residual_lens(tiny, ids(*[1] * 129))
    with pytest.raises(ValueError, match="no steered rows at position 6"):
        residual_lens(tiny, PROMPT).settles_at(steered=True)
    with pytest.raises(ValueError, match="no unsteered rows at position 9"):
        residual_lens(tiny, PROMPT).settles_at(9)


def test_the_steered_answer_of_the_demo_model_appears_along_the_depth(demo_model):
    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.vectors.extraction import extract

    vectors = extract(demo_model, ContrastSet.load("sentiment").sample(30, seed=0), layers=[20], progress=False)
    prompt = default_format(demo_model).encode(demo_model.tokenizer, "How was the film?", "The film was so")
    lens = residual_lens(demo_model, prompt, vectors=[(vectors[20], -3.0)], positions=[len(prompt) - 1])
    with torch.no_grad():
        plain = int(demo_model(torch.tensor([prompt.tokens]))[0, -1].argmax())
        with demo_model.hooks(fwd_hooks=[vectors[20].hook(multiplier=-3.0, start=prompt.steer_start)]):
            steered = int(demo_model(torch.tensor([prompt.tokens]))[0, -1].argmax())
    assert plain != steered
    last = lens.frame[lens.frame["layer"] == 29].set_index("steered")["top_token_id"]
    assert (last[False], last[True]) == (plain, steered)
    assert lens.settles_at() >= 20
    assert show_token(demo_model.tokenizer, steered) in repr(lens)


def test_blanks_control_characters_and_pieces_are_shown(demo_tokenizer):
    def shown(text):
        return [show_token(demo_tokenizer, t) for t in demo_tokenizer.encode(text, add_special_tokens=False)]

    assert shown(" the") == ["␣the"]
    assert shown("\n") == ["\\n"]
    assert shown("   x") == ["␣␣", "␣x"]
    assert shown(" unhappily") == ["␣unh", "…app", "…ily"]
    assert shown("Hello") == ["Hello"]
    assert all(text.startswith(("'", '"')) for text in shown(" 😀"))
    assert show_token(demo_tokenizer, 10**6) == "[1000000]"
    assert show_token(None, 7) == "[7]"


def test_llama_2s_leading_blanks_are_shown_though_its_decode_drops_them(llama2_tokenizer):
    def shown(piece):
        return show_token(llama2_tokenizer, llama2_tokenizer.convert_tokens_to_ids(piece))

    assert (shown("▁the"), shown("the"), shown("▁")) == ("␣the", "…the", "␣")
    assert (shown("▁▁"), shown("<0x0A>"), shown("<0xF0>")) == ("␣␣", "\\n", "'<0xF0>'")
