"""What a check says of answers that are not there, of another kind, right, or wrong in a known way."""

import numpy as np
import pytest
import torch

from caa_lens.lessons import verdicts
from caa_lens.lessons.verdicts import NOT_ANSWERED, RIGHT, exercise, judged, same_text, within, wrong


def number_check(answer):
    @exercise(verdicts.a_number)
    def check(answer):
        mistakes = [(-2.0, "turned"), (lambda: 4.0, "doubled")]
        return judged(answer, 2.0, near=within(0.1), mistakes=mistakes, otherwise="look again")

    return check(answer)


@pytest.mark.parametrize("answer", [..., [..., 1.0], (1.0, ...), {1: ..., 8: 2.0}])
def test_a_placeholder_is_not_answered_yet_and_nothing_is_computed(answer):
    @exercise(verdicts.a_number)
    def check(answer):
        raise AssertionError("computed")

    assert check(answer) is NOT_ANSWERED
    assert repr(check(answer)) == "not answered yet"
    assert not check(answer).right


@pytest.mark.parametrize("answer", [2, 2.05, np.float32(2.0), torch.tensor(2.0), torch.tensor([2.0])])
def test_the_right_answer_is_right_in_any_form_of_a_number(answer):
    assert number_check(answer) == RIGHT
    assert repr(number_check(answer)) == "right"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (-2.0, "wrong: turned"),
        (4, "wrong: doubled"),
        (3, "wrong: look again"),
        ("2", "wrong: expected one number"),
        (True, "wrong: expected one number"),
        (None, "wrong: expected one number"),
        (float("nan"), "wrong: expected one number"),
        ([2.0], "wrong: expected one number"),
        (torch.ones(2), "wrong: expected one number"),
    ],
)
def test_a_wrong_answer_gets_the_hint_of_its_mistake(answer, said):
    assert repr(number_check(answer)).startswith(said)
    assert not number_check(answer).right


def test_a_right_answer_is_right_also_where_a_mistake_comes_to_the_same():
    mistakes = [(1.0, "this would be a mistake")]
    assert judged(1.0, 1.0, near=within(0.1), mistakes=mistakes, otherwise="") == RIGHT


def test_mistakes_are_computed_only_for_answers_that_are_not_right():
    def too_early():
        raise AssertionError("computed")

    assert judged(1.0, 1.0, near=within(0.1), mistakes=[(too_early, "")], otherwise="") == RIGHT


@pytest.mark.parametrize(
    ("read", "answer", "expected"),
    [
        (verdicts.numbers(2), {8: 0.7, 1: 0.9}, [0.9, 0.7]),
        (verdicts.numbers(2), torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (verdicts.numbers(), (1, 2, 3), [1.0, 2.0, 3.0]),
        (verdicts.some_words, ("␣Good", "…rible", "'bad '"), ["good", "rible", "bad"]),
        (verdicts.a_word_and_a_layer, ("␣Disaster", np.int64(29)), ("disaster", 29)),
        (verdicts.a_text, "text", "text"),
    ],
)
def test_answers_are_read_in_the_forms_that_people_write(read, answer, expected):
    assert read(answer) == expected


@pytest.mark.parametrize(
    ("read", "answer"),
    [
        (verdicts.numbers(2), [1.0]),
        (verdicts.numbers(), "1, 2"),
        (verdicts.some_words, "good bad"),
        (verdicts.a_word_and_a_layer, "disaster"),
        (verdicts.a_word_and_a_layer, (29, "disaster")),
        (verdicts.a_text, 3),
        (verdicts.a_function, 3),
        (verdicts.a_vector, [1.0, 2.0]),
        (verdicts.a_vector, torch.ones(2, 3)),
    ],
)
def test_an_answer_of_another_kind_is_wrong_and_no_error(read, answer):
    said = exercise(read)(lambda answer: RIGHT)(answer)
    assert repr(said).startswith("wrong: expected")


def test_texts_agree_but_for_quotes_and_blanks_around_them():
    assert same_text(" 'The party.' ", "The party.")
    assert not same_text("The party", "The party.")


def test_numbers_of_other_shapes_are_not_near():
    assert not within(1e9)([1.0, 2.0], [1.0])
    assert not within(0.1)(torch.tensor([float("nan")]), torch.tensor([1.0]))
    assert wrong("x") != RIGHT
