"""The bundled sets contrast the behavior and nothing else: not letters, lengths or single words."""

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from statistics import mean

import pytest

from caa_lens.contrast.sets import ContrastSet, bundled_names, load_open_ended

NAMES = ["formality", "refusal", "sentiment", "sycophancy"]

# Words that carry grammar, not a stance. "I", "not" and "won't" are here too: nobody refuses without them.
GRAMMAR = """
    a an the and or but so as if because than then that this these those
    i me my you your we us our he him his she her it its they them their one
    i'm i'd i'll i've you'd you're you've it's they're that's
    is are was were be been am do does did have has had can could will would should may
    can't won't don't isn't doesn't not no yes
    of to in on at for with from by about into over out up off down
    there here what which who how when where
    every each any some all more most only just
"""
STOP_WORDS = frozenset(GRAMMAR.split())

named = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def pairs(name):
    return ContrastSet.load(name)  # a letter warning would be an error


def answers(pairs, side):
    """What each answer says: the completion, or the text behind the letter."""
    return [pair.options.get(getattr(pair, side), getattr(pair, side)) for pair in pairs]


def stem(question):
    return question.split("\n\nChoices:")[0]


def words(text):
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)*", text.lower())


def test_exactly_these_sets_are_bundled():
    assert bundled_names() == NAMES


@named
def test_a_set_is_large_enough_to_train_on_60_and_test_on_20(name, pairs):
    assert len(pairs) >= 80
    train, test = pairs.split(test=20)
    assert len(train) >= 60
    assert len(test) == 20


@named
def test_pairs_are_of_the_kind_that_is_promised(name, pairs):
    assert pairs.kind == ("ab" if name in ("refusal", "sycophancy") else "completions")
    assert (pairs.name, pairs.source) == (name, f"bundled:{name}")


@pytest.mark.parametrize("name", ["refusal", "sycophancy"])
def test_answer_letters_are_exactly_even_and_have_no_pattern(name, pairs):
    assert pairs.letter_counts == {"(A)": len(pairs) / 2, "(B)": len(pairs) / 2}
    repeats = sum(before.positive == after.positive for before, after in pairwise(pairs))
    assert 0.35 < repeats / (len(pairs) - 1) < 0.65, "letters alternate or come in blocks"
    assert all(list(pair.options) == ["(A)", "(B)"] for pair in pairs)
    assert all("\n\nChoices:\n (A) " in pair.question for pair in pairs)


@named
def test_no_question_or_answer_comes_twice(name, pairs):
    questions = [stem(pair.question).casefold() for pair in pairs]
    assert [question for question, n in Counter(questions).items() if n > 1] == []
    said = [answer.casefold() for side in ("positive", "negative") for answer in answers(pairs, side)]
    assert [answer for answer, n in Counter(said).items() if n > 1] == []


@named
def test_open_ended_prompts_are_many_distinct_and_not_among_the_pairs(name, pairs):
    prompts = load_open_ended(name)
    assert len(prompts) >= 20
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    assert not {prompt.casefold() for prompt in prompts} & {stem(pair.question).casefold() for pair in pairs}


@named
def test_texts_are_plain_ascii_in_single_quotes_without_stray_blanks(name, pairs):
    texts = [text for pair in pairs for text in (stem(pair.question), pair.positive, pair.negative)]
    texts += answers(pairs, "positive") + answers(pairs, "negative") + load_open_ended(name)
    for text in texts:
        assert text == text.strip()
        assert text.isascii(), text
        assert text.isprintable(), text
        assert '"' not in text, text
        assert "  " not in text, text
        assert re.search(r"[.!?)']\Z", text), f"no closing mark: {text}"


@named
def test_a_file_holds_the_documented_keys_and_nothing_more(name):
    folder = files("caa_lens.contrast") / "data"
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(list(json.loads(line)) == ["question", "positive", "negative"] for line in lines)
    lines = (folder / f"{name}_open_ended.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(list(json.loads(line)) == ["question"] for line in lines)


@named
def test_length_does_not_tell_the_sides_apart(name, pairs):
    differences = [
        len(positive.split()) - len(negative.split())
        for positive, negative in zip(answers(pairs, "positive"), answers(pairs, "negative"), strict=True)
    ]
    assert abs(mean(differences)) < 0.5
    assert max(map(abs, differences)) <= 4
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    assert max(longer, shorter) < len(pairs) / 2, "always guessing the longer, or the shorter, answer would be right"


@named
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_no_single_word_tells_the_sides_apart(name, side, pairs):
    """No word but stop words is in more than a tenth of one side's answers."""
    counts = Counter(word for answer in answers(pairs, side) for word in set(words(answer)) - STOP_WORDS)
    assert {word: n for word, n in counts.items() if n > len(pairs) / 10} == {}


@named
def test_no_opening_word_tells_the_sides_apart(name, pairs):
    for side in ("positive", "negative"):
        opening, n = Counter(words(answer)[0] for answer in answers(pairs, side)).most_common(1)[0]
        assert n <= len(pairs) / 4, f"{n} {side} answers open with {opening!r}"
