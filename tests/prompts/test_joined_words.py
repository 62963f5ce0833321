"""An answer that follows a text without the blank between two words is told, and nothing else is."""

import warnings

import pytest

import caa_lens as cl
from caa_lens.prompts import JoinedWordsWarning, Prompt
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import resolve_format


def said(model, question, answer, prompt_format="raw"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Prompt.of(model, question, answer, prompt_format=prompt_format)
    return [str(one.message) for one in caught if one.category is JoinedWordsWarning]


@pytest.mark.parametrize(("question", "answer"), [("I feel", "great"), ("Is it late?", "Stay!"), ("It is (so)", "9")])
def test_a_missing_blank_is_told_with_the_words_that_it_joins(tiny_chat, question, answer):
    (one,) = said(tiny_chat, question, answer)
    assert repr(question.split()[-1] + answer.split()[0]) in one
    assert "' ' + pair.positive" in one


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("I feel", " great"),
        ("I feel ", "great"),
        ('He said: "', "yes"),
        ("I feel", "."),
        ("I feel", ""),
        ("我很", "好"),
    ],
)
def test_what_needs_no_blank_is_not_told(tiny_chat, question, answer):
    assert said(tiny_chat, question, answer) == []


def test_a_format_that_puts_something_between_both_says_nothing(tiny_chat):
    assert said(tiny_chat, "I feel", "great", "llama2-base") == []


def test_pairs_of_whole_texts_are_counted_once(tiny_chat):
    texts = [{"positive": "I feel great", "negative": "I feel bad"}, {"positive": "So, she", "negative": "So, he"}]
    pairs = cl.ContrastSet.from_pairs(texts, name="told")
    with pytest.warns(JoinedWordsWarning, match=r"4 of 4 answers follow .*'feelgreat'") as caught:
        encode_pairs(tiny_chat, pairs, resolve_format(tiny_chat, "raw"))
    assert len([one for one in caught if one.category is JoinedWordsWarning]) == 1
