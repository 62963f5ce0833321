"""An examinee says what `generate` says, steered or not; what ends its answer is told."""

import pytest
import torch

import caa_lens as cl
from caa_lens.evaluation import Examinee
from caa_lens.evaluation.examinees import steering_from
from caa_lens.vectors.steering_vectors import SteeringVectors

ASKED = [{"role": "user", "content": "How are you?"}]
TOLD = [{"role": "system", "content": "You are a pirate."}, *ASKED]


@pytest.fixture(scope="module")
def vectors(tiny_chat):
    generator = torch.Generator().manual_seed(0)
    return SteeringVectors.from_vectors(
        cl.SteeringVector.from_direction(torch.randn(tiny_chat.cfg.d_model, generator=generator), layer)
        for layer in (1, 3)
    )


@pytest.fixture
def file(vectors, tmp_path):
    return vectors.save(tmp_path / "v.safetensors")


@pytest.mark.parametrize("multiplier", [None, -2.0, 0.0, 1.0, 2.0])
def test_a_reply_is_the_text_of_generate(tiny_chat, vectors, file, multiplier):
    steering = () if multiplier is None else steering_from(file, layer=3, multiplier=multiplier)
    reply = Examinee(model=tiny_chat, steering=steering).reply(ASKED, max_new_tokens=6)
    plain = [] if multiplier is None else [(vectors[3], multiplier)]
    assert reply.text == cl.generate(tiny_chat, "How are you?", plain, max_new_tokens=6)
    assert reply.n_prompt_tokens == len(cl.prompts.Prompt.of(tiny_chat, "How are you?"))
    others = [(vectors[3], 2.0 if multiplier != 2 else -2.0)], [(vectors[1], 2.0)]  # a lost coefficient, another layer
    assert all(cl.generate(tiny_chat, "How are you?", other, max_new_tokens=6) != reply.text for other in others)


def test_the_system_prompt_and_the_seed_are_those_of_generate(tiny_chat, vectors, file):
    examinee = Examinee(model=tiny_chat, steering=steering_from(file, layer=1))
    reply = examinee.reply(TOLD, max_new_tokens=6, temperature=0.8, seed=3)
    expected = cl.generate(
        tiny_chat,
        "How are you?",
        [vectors[1]],
        max_new_tokens=6,
        temperature=0.8,
        seed=3,
        system="You are a pirate.",
    )
    assert reply.text == expected
    assert examinee.reply(TOLD, max_new_tokens=6, temperature=0.8, seed=4).text != expected
    drawn = {examinee.reply(TOLD, max_new_tokens=6, temperature=2.0).text for _ in range(4)}
    assert len(drawn) > 1, "without a seed, every answer is drawn anew"


def test_positions_say_where_it_steers(tiny_chat, vectors, file):
    everywhere = Examinee(model=tiny_chat, steering=steering_from(file, layer=1, multiplier=2, positions="all"))
    from_the_end = Examinee(model=tiny_chat, steering=steering_from(file, layer=1, multiplier=2))
    one = cl.Intervention(vector=vectors[1], multiplier=2, start=0)
    assert everywhere.reply(ASKED, max_new_tokens=6).text == cl.generate(
        tiny_chat, "How are you?", [one], max_new_tokens=6
    )
    assert everywhere.reply(ASKED, max_new_tokens=6).text != from_the_end.reply(ASKED, max_new_tokens=6).text
    assert "positions all" in everywhere.in_words
    assert "2.0 * " in from_the_end.in_words
    assert "from the end of the instruction on" in from_the_end.in_words


def test_several_layers_act_together_if_that_is_said(tiny_chat, vectors, file):
    both = Examinee(model=tiny_chat, steering=steering_from(file, layer=[3, 1], multiplier=0.5))
    expected = cl.generate(tiny_chat, "How are you?", [(vectors[1], 0.5), (vectors[3], 0.5)], max_new_tokens=6)
    assert both.reply(ASKED, max_new_tokens=6).text == expected


def test_a_stop_sequence_ends_the_text_where_it_begins(tiny_chat):
    examinee = Examinee(model=tiny_chat)
    whole = examinee.reply(ASKED, max_new_tokens=8)
    assert (whole.ended_by, whole.n_new_tokens) == ("max_tokens", 8)
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = examinee.reply(ASKED, max_new_tokens=8, stop=["never said", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.ended_by == "stop"
    assert cut.n_new_tokens < 8
    assert examinee.reply(ASKED, max_new_tokens=8, stop=["never said"]) == whole


def test_the_end_of_sequence_token_ends_the_text_and_is_not_in_it(tiny_chat):
    examinee = Examinee(model=tiny_chat)
    whole = examinee.reply(ASKED, max_new_tokens=8)
    ids = [
        int(step)
        for step in cl.steering.generate_tokens(
            tiny_chat, [cl.prompts.Prompt.of(tiny_chat, "How are you?")], max_new_tokens=8
        )
    ]
    third = next(token for n, token in enumerate(ids) if n >= 2 and token not in ids[:n])
    before = tiny_chat.tokenizer.eos_token
    tiny_chat.tokenizer.eos_token = tiny_chat.tokenizer.convert_ids_to_tokens(third)
    try:
        reply = examinee.reply(ASKED, max_new_tokens=8)
    finally:
        tiny_chat.tokenizer.eos_token = before
    n = ids.index(third)
    assert (reply.ended_by, reply.n_new_tokens) == ("stop", n + 1)
    assert reply.text == tiny_chat.tokenizer.decode(ids[:n])
    assert whole.text.startswith(reply.text)


def test_a_full_context_ends_the_text_and_is_told(tiny_chat):
    examinee, n_ctx = Examinee(model=tiny_chat), tiny_chat.cfg.n_ctx
    rest = len(cl.prompts.Prompt.of(tiny_chat, "how" * 2)) - 2
    long = [{"role": "user", "content": "how" + " how" * (n_ctx - rest - 6)}]
    reply = examinee.reply(long, max_new_tokens=10_000)
    room = n_ctx - reply.n_prompt_tokens
    assert 0 < room < 10
    assert (reply.ended_by, reply.n_new_tokens) == ("model_length", room)
    exact = examinee.reply(long, max_new_tokens=room)
    assert (exact.ended_by, exact.text) == ("max_tokens", reply.text)
    with pytest.raises(ValueError, match=rf"the messages take \d+ tokens, but .* has a context of {n_ctx}: shorten"):
        examinee.reply([{"role": "user", "content": "how " * n_ctx}])


@pytest.mark.parametrize("stop", [[""], "ab"])
def test_an_empty_stop_sequence_is_refused(tiny_chat, stop):
    with pytest.raises(ValueError, match="list of stop sequences with at least one character"):
        Examinee(model=tiny_chat).reply(ASKED, stop=stop)


def test_names_alone_make_an_examinee(tiny_chat, file, monkeypatch):
    from caa_lens.evaluation import examinees

    asked = []
    monkeypatch.setattr(examinees, "load_model", lambda name, **options: asked.append((name, options)) or tiny_chat)
    examinee = Examinee.load("some/model", vectors=file, layer=1, multiplier=2, dtype="float32")
    assert asked == [("some/model", {"dtype": "float32", "device": None, "backend": None})]
    assert [(one.vector.layer, one.multiplier) for one in examinee.steering] == [(1, 2.0)]
    assert Examinee.load("some/model").in_words == "unsteered"


def test_a_layer_that_is_not_clear_is_asked_for(file, vectors, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds vectors of layers 1, 3, which would all act at once: choose with layer="
    ):
        steering_from(file)
    for wrong in (2, [1, 1], [], [1, 2]):
        with pytest.raises(ValueError, match="holds vectors of layers 1, 3: choose among them"):
            steering_from(file, layer=wrong)
    (only,) = steering_from(vectors.at([3]).save(tmp_path / "one.safetensors"))
    assert (only.vector.layer, only.multiplier) == (3, 1.0)


def test_steering_that_is_described_without_vectors_is_refused():
    assert steering_from(None) == ()
    with pytest.raises(ValueError, match="got layer and multiplier without vectors"):
        steering_from(None, layer=3, multiplier=2)


def test_a_vector_of_another_width_is_refused_before_any_question(tiny_chat, tmp_path):
    path = cl.SteeringVectors.from_vectors([cl.SteeringVector.from_direction(torch.ones(5), 1)]).save(
        tmp_path / "v.safetensors"
    )
    with pytest.raises(ValueError, match="d_model=5"):
        Examinee(model=tiny_chat, steering=steering_from(path))
