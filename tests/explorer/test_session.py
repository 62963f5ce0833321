"""The explorer's session: texts of `generate`, colours of `token_similarity`, and the lens of `logit_lens`."""

from dataclasses import replace

import pytest
import torch
from helpers.models import random_vectors

import caa_lens as cl
from caa_lens.engine import read_residuals
from caa_lens.explorer import Asked, Coloured, Finished, LensRead, Piece, Session
from caa_lens.explorer import session as module
from caa_lens.explorer.session import BusyError
from caa_lens.steering.generation import generate_tokens

QUESTION = "How was your day?"
ASKED = Asked(prompt=QUESTION, layer=2, multiplier=3.0, max_new_tokens=40)


@pytest.fixture
def session(tiny_chat):
    return Session(tiny_chat, random_vectors(tiny_chat, layers=[1, 2]), controls=3)


def texts(events):
    """Both texts, as their pieces make them."""
    found = {"unsteered": "", "steered": ""}
    for event in events:
        if isinstance(event, Piece):
            found[event.side] += event.text
    return found


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_both_texts_are_those_that_generate_writes_one_by_one(session, temperature):
    asked = replace(ASKED, temperature=temperature, seed=3)
    found = texts(session.write(replace(asked, lens=False)))
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3}
    assert found["unsteered"] == cl.generate(session.model, QUESTION, **options)
    steered = cl.generate(session.model, QUESTION, vectors=[(session.vectors[2], 3.0)], **options)
    assert found["steered"] == steered
    assert found["steered"] != found["unsteered"]


def test_tokens_come_in_turns(session):
    sides = [event.side for event in of_kind(session.write(replace(ASKED, max_new_tokens=5, lens=False)), Piece)]
    assert sides[:10] == ["unsteered", "steered"] * 5


def test_the_colours_are_cosines_of_the_unsteered_stream_of_each_tokens_place(session):
    model, events = session.model, list(session.write(replace(ASKED, lens=False)))
    prompt, v = cl.prompts.Prompt.of(model, QUESTION), session.vectors[2].direction
    ids = {
        "unsteered": generate_tokens(model, [prompt], max_new_tokens=40),
        "steered": generate_tokens(model, [prompt], vectors=[(session.vectors[2], 3.0)], max_new_tokens=40),
    }
    last = {event.side: event for event in of_kind(events, Coloured)}
    for side, steps in ids.items():
        tokens = [int(step) for step in steps]
        whole = cl.prompts.Prompt.from_tokens([*prompt.tokens, *tokens])
        places = [replace(whole, read=(i, i + 1)) for i in range(len(prompt), len(whole))]
        h = torch.cat(list(read_residuals(model, places, layers=[2])))[:, 0]
        expected = torch.nn.functional.cosine_similarity(h, v.to(h)[None], dim=-1)
        found = torch.tensor([cosine for _, cosine in last[side].tokens])
        torch.testing.assert_close(found, expected.cpu(), rtol=1e-5, atol=1e-6)
        assert "".join(text for text, _ in last[side].tokens) == texts(events)[side]
    assert last["steered"].bound == last["unsteered"].bound
    assert last["steered"].bound == pytest.approx(max(abs(c) for one in last.values() for _, c in one.tokens))


def test_colours_come_while_a_text_grows_and_again_at_its_end(session):
    lengths = [
        len(one.tokens) for one in of_kind(session.write(replace(ASKED, lens=False)), Coloured) if one.side == "steered"
    ]
    assert lengths == [16, 32, 40]


def test_the_lens_is_the_causal_one_of_the_layer_and_is_read_once(session):
    events = list(session.write(ASKED))
    pending, read = of_kind(events, LensRead)
    assert (pending.lens, pending.layer, read.layer) == (None, 2, 2)
    expected = cl.logit_lens(session.model, session.vectors, layers=[2], k=10, reading="causal", controls=3)
    assert read.lens.frame.equals(expected.frame)
    assert [one.lens for one in of_kind(session.write(ASKED), LensRead)] == [read.lens]
    assert session.lens(1) is not read.lens


def test_a_text_is_stopped_in_the_middle_with_its_colours_and_without_a_lens(session):
    seen = []
    for event in session.write(ASKED):
        seen.append(event)
        if len(of_kind(seen, Piece)) == 9:
            session.stop()
    assert len(of_kind(seen, Piece)) <= 11  # at most what completes a character
    assert [one.why for one in of_kind(seen, Finished)] == ["stopped", "stopped"]
    assert [len(one.tokens) for one in of_kind(seen, Coloured)] == [5, 4]
    assert not of_kind(seen, LensRead)
    assert not session.busy
    whole = texts(session.write(replace(ASKED, lens=False)))  # nothing of the half of a text was kept
    assert whole["unsteered"] == cl.generate(session.model, QUESTION, max_new_tokens=40)


def test_one_text_is_written_at_a_time_and_one_that_is_let_go_makes_room(session):
    first = session.write(ASKED)
    next(first)
    with pytest.raises(BusyError, match="another text is being written"):
        next(session.write(ASKED))
    first.close()
    assert not session.busy
    assert len(of_kind(session.write(replace(ASKED, lens=False)), Finished)) == 2


def test_a_text_says_why_it_ended(session, monkeypatch):
    assert [one.why for one in of_kind(session.write(replace(ASKED, lens=False)), Finished)] == ["length", "length"]
    end = next(generate_tokens(session.model, [cl.prompts.Prompt.of(session.model, QUESTION)], max_new_tokens=1))
    monkeypatch.setattr(type(session.model.tokenizer), "eos_token_id", int(end), raising=False)
    events = list(session.write(replace(ASKED, max_new_tokens=6, multiplier=0.0, lens=False)))
    assert [one.why for one in of_kind(events, Finished)] == ["end", "end"]
    assert not of_kind(events, Piece)
    again = list(session.write(replace(ASKED, max_new_tokens=6, multiplier=0.0, lens=False)))
    assert [one.why for one in of_kind(again, Finished)] == ["end", "end"]


def test_the_unsteered_text_is_kept_until_it_would_be_another_one(session, monkeypatch):
    written = []

    def counting(model, prompts, *, vectors=(), **options):
        written.append("steered" if vectors else "unsteered")
        return generate_tokens(model, prompts, vectors=vectors, **options)

    monkeypatch.setattr(module, "generate_tokens", counting)

    def write(**changes):
        written.clear()
        found = texts(session.write(replace(ASKED, **changes, lens=False)))
        return written.copy(), found["unsteered"]

    both, first = write()
    assert both == ["unsteered", "steered"]
    assert write(layer=1) == (["steered"], first)
    assert write(multiplier=-1) == (["steered"], first)
    for changes in ({"prompt": "Why?"}, {"max_new_tokens": 7}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}):
        assert write(**changes)[0] == ["unsteered", "steered"], changes
    assert write() == (["unsteered", "steered"], first)
    layer = session.model.blocks[0]
    hook = session.model.hook_dict["blocks.1.hook_resid_post"].register_forward_hook(lambda *given: None)
    try:
        with pytest.warns(UserWarning, match="hooks"):
            assert write()[0] == ["unsteered", "steered"]
    finally:
        hook.remove()
    write()
    parameter = next(layer.parameters())
    with torch.no_grad():
        parameter.mul_(1.5)
    try:
        assert write()[0] == ["unsteered", "steered"]
        assert write()[1] == cl.generate(session.model, QUESTION, max_new_tokens=40)
    finally:
        with torch.no_grad():
            parameter.div_(1.5)


def test_with_a_multiplier_of_0_both_texts_are_the_same(session):
    found = texts(session.write(replace(ASKED, multiplier=0, lens=False)))
    assert found["steered"] == found["unsteered"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "a" * 2001}, "has 2001 characters, at most 2000"),
        ({"layer": 0}, "no vector of layer 0: the layers are 1-2"),
        ({"multiplier": 4.1}, "multiplier must be from -4 to 4, got 4.1"),
        ({"multiplier": float("nan")}, "multiplier must be finite"),
        ({"max_new_tokens": 201}, "at most 200, got 201"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"prompt": "word " * 399, "max_new_tokens": 200}, "the model's context is 512"),
        ({"prompt": "\ud83d"}, "surrogate"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_runs(session, changes, message):
    ran = []
    counter = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, given: ran.append(module))
    try:
        with pytest.raises(ValueError, match=message):
            list(session.write(replace(ASKED, **changes)))
    finally:
        counter.remove()
    assert not ran
    assert not session.busy


@pytest.mark.one_kind
def test_a_session_takes_a_file_one_vector_or_a_set(tiny_chat, tmp_path):
    vectors = random_vectors(tiny_chat, layers=[1, 3])
    file = vectors.save(tmp_path / "v.safetensors")
    assert Session(tiny_chat, str(file)).vectors.directions.equal(vectors.directions)
    assert Session(tiny_chat, file).layers == (1, 3)
    assert Session(tiny_chat, vectors[3]).layers == (3,)


@pytest.mark.one_kind
def test_what_no_session_can_be_made_of_is_said(tiny_chat, tiny_model):
    vectors = random_vectors(tiny_chat)
    other = random_vectors(tiny_model(d_model=16))
    with pytest.raises(ValueError, match=r"d_model=16.*extract them from this model"):
        Session(tiny_chat, other)
    with pytest.raises(ValueError, match=r"layers \[2\] are zero"):
        Session(
            tiny_chat,
            cl.SteeringVectors.from_vectors([vectors[1], cl.SteeringVector.from_direction(torch.zeros(32), 2)]),
        )
    with pytest.raises(ValueError, match="least and the greatest"):
        Session(tiny_chat, vectors, multipliers=(1, 1))
    with pytest.raises(TypeError, match="no tokenizer"):
        Session(tiny_model(), random_vectors(tiny_model()))


@pytest.mark.one_kind
def test_vectors_of_another_model_of_the_same_width_are_noted(tiny_chat):
    vectors = random_vectors(tiny_chat)
    assert Session(tiny_chat, vectors).note == ""
    elsewhere = replace(vectors, provenance=replace(vectors.provenance, model="another-model"))
    assert "The vectors are of another-model, and the model is tiny-random-llama" in Session(tiny_chat, elsewhere).note


def test_a_model_without_a_chat_template_is_explored_too(tiny_model, demo_tokenizer):
    import copy

    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = None
    model = tiny_model(d_vocab=len(tokenizer), n_ctx=128, tokenizer=tokenizer)
    session = Session(model, random_vectors(model), controls=0)
    with pytest.warns(UserWarning, match="nothing says how"):
        found = texts(session.write(replace(ASKED, max_new_tokens=5)))
    with pytest.warns(UserWarning, match="nothing says how"):
        assert found["unsteered"] == cl.generate(model, QUESTION, max_new_tokens=5)


def test_a_session_leaves_no_hook_and_no_vector_changed(session):
    before = session.vectors.directions.clone()
    writing = session.write(ASKED)
    for _ in range(7):
        next(writing)
    writing.close()
    list(session.write(replace(ASKED, max_new_tokens=3)))
    from caa_lens.models.structure import structure_of

    assert structure_of(session.model).hooked is None
    assert session.vectors.directions.equal(before)
