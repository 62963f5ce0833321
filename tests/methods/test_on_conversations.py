"""Methods that are fitted on questions take conversations: the words are said behind the last message."""

from inspect import unwrap

import pytest
import torch
from helpers.twins import streams
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.contrast.messages import followed_by
from caa_lens.methods import inferaligner, instruction
from caa_lens.methods.candidates import _fit_inferaligner
from caa_lens.prompts.prompt_formats import Prompt

pytestmark = pytest.mark.one_kind

TALK = [
    {"role": "user", "content": "Hi. Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Say more, please."},
]
PIRATE = [{"role": "system", "content": "You are a pirate."}, *TALK]
HOW = {"prompt_format": None, "progress": False}


def last_streams(model, questions):
    """`[question layer d_model]`: the streams at the prompts' last tokens, one prompt at a time."""
    return torch.stack([streams(model, list(Prompt.of(model, one).tokens))[:, -1] for one in questions])


def test_an_instruction_is_given_behind_the_last_message(tiny_chat):
    questions = [TALK, "How was it?", PIRATE]
    told = [
        [*TALK[:2], {"role": "user", "content": "Say more, please. Be rude."}],
        "How was it? Be rude.",
        [*PIRATE[:3], {"role": "user", "content": "Say more, please. Be rude."}],
    ]
    assert [followed_by(one, "Be rude.") for one in questions][1] == told[1]
    found = instruction.fit(tiny_chat, questions, instruction="Be rude.", layers=[1, 2], **HOW)
    change = (last_streams(tiny_chat, told) - last_streams(tiny_chat, questions)).mean(0)[[1, 2]]
    assert_close(found.direction.to(change), torch.nn.functional.normalize(change, dim=-1), rtol=1e-3, atol=1e-4)


def test_gates_are_read_at_the_end_of_conversations(tiny_chat):
    data = ([TALK, "Stay a while!"], [PIRATE, "Go away!"])
    found = inferaligner.fit(tiny_chat, data, layers=[1], **HOW)
    of_prompts = tuple([Prompt.of(tiny_chat, one) for one in some] for some in data)
    again = inferaligner.fit(tiny_chat, of_prompts, layers=[1], **HOW)
    assert_close(found.gate, again.gate, rtol=0, atol=0)
    expected = last_streams(tiny_chat, data[0]).mean(0)[1] - last_streams(tiny_chat, data[1]).mean(0)[1]
    assert_close(found.guide[0].to(expected), expected, rtol=1e-3, atol=1e-4)
    assert found.opened(tiny_chat, [TALK, PIRATE]).shape == (2, 1)
    pairs = cl.ContrastSet.from_pairs([(TALK, "a b", "c d"), ("Why?", "a b", "c d")])
    fits = _fit_inferaligner(("Be kind.", "Be rude."), HOW)(tiny_chat, pairs, [1], 0)
    assert fits


def test_methods_are_not_compared_in_words_where_a_question_has_a_system_prompt_of_its_own(tiny_chat):
    pairs = cl.ContrastSet.from_pairs([(f"Why {n}?", f"a b {n}", f"c d {n}") for n in range(16)], name="some")
    test = cl.ContrastSet.from_pairs([(PIRATE, f"a b {n}", f"c d {n}") for n in range(8)], name="test")
    with pytest.raises(ValueError, match="beside the message of the system 'You are a pirate"):
        cl.compare(tiny_chat, pairs, test, ["CAA"], words=("Be kind.", "Be rude."), layers=[1], progress=False)


def test_texts_without_a_format_are_no_messages(tiny_chat):
    from caa_lens.methods import linear_act

    with pytest.raises(TypeError, match="expected texts, which stand in no prompt format, got a list of dict"):
        unwrap(linear_act.fit)(tiny_chat, ([TALK], ["Why not?"]), layers=[1], progress=False)
