"""Whether a text came to its end, or was cut."""

import json
import pickle

import pytest

from caa_lens.prompts.checks import as_prompt
from caa_lens.steering.generated_text import GeneratedText, shown
from caa_lens.steering.generation import generate, generate_tokens

pytestmark = pytest.mark.one_kind


def test_a_text_that_the_model_ended_is_shown_as_it_is_and_a_cut_one_with_an_ellipsis(tiny_chat):
    texts = generate(tiny_chat, ["How was it?", "And then?"], max_new_tokens=5)
    assert [text.cut for text in texts] == [True, True]
    assert [text.shown for text in texts] == [text.rstrip() + " …" for text in texts]
    prompt = as_prompt(tiny_chat, "How was it?")
    first = int(next(iter(generate_tokens(tiny_chat, [prompt], max_new_tokens=1))))
    tokenizer = tiny_chat.tokenizer
    before, tokenizer.eos_token = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(first)
    try:
        ended = generate(tiny_chat, "How was it?", max_new_tokens=5)
    finally:
        tokenizer.eos_token = before
    assert (ended, ended.cut, ended.shown) == ("", False, "")


def test_it_is_a_string_everywhere_else():
    text = GeneratedText("one ", cut=True)
    assert text == "one "
    assert json.dumps(text) == '"one "'
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.cut, again.shown) == ("one ", True, "one …")
    assert shown("one", False) == "one"
