"""The bundled questions, and what an answer in words names."""

from collections import Counter

import pytest

from caa_lens.evaluation.questions import load_easy_questions, named_first


def test_every_question_has_four_choices_and_every_letter_is_right_as_often():
    questions = load_easy_questions()
    assert len({one.question for one in questions}) == len(questions) == 20
    assert all(len(set(one.choices)) == 4 for one in questions)
    assert Counter(one.answer for one in questions) == dict.fromkeys("ABCD", 5)
    assert questions[0].right == "Paris"
    assert questions[0].in_words == "What is the capital city of France? Berlin, Paris, Madrid or Rome?"


@pytest.mark.parametrize("question", load_easy_questions(), ids=lambda one: one.question)
def test_a_choice_is_told_by_itself_and_no_question_names_one(question):
    for one in question.choices:
        assert named_first(f"I think it is {one.lower()}.", question.choices) == one
    assert named_first(question.question, question.choices) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Paris, not Rome.", "Paris"),
        ("rome or Paris", "Rome"),
        ("Parisians live there.", None),
        ("It is 100 degrees.", "100"),
        ("It is 1000 degrees.", None),
        ("New York City", "New York City"),
        ("", None),
    ],
)
def test_the_choice_that_is_named_first_as_a_word_of_its_own_counts(text, named):
    assert named_first(text, ["Rome", "Paris", "0", "100", "New York", "New York City"]) == named
