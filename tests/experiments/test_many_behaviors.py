"""Contrast sets written for an experiment, evaluations found beside the project, and how both are split."""

import json
from collections import Counter

import numpy as np
import pytest

from caa_lens.contrast.files import bundled_names
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet
from experiments.running import many_behaviors
from experiments.running.many_behaviors import COMPLETIONS, LETTERS, WRITTEN, as_completions, as_letters, parts, sources
from experiments.running.settings import RunConfig

CONFIG = RunConfig.of("demo", behaviors=("sentiment", "refusal"))
FILES = sorted(WRITTEN.glob("*.jsonl"))


@pytest.fixture
def evals(tmp_path, monkeypatch):
    """A folder of evaluations as they are published: uneven, with bad rows, three options, and questions twice."""
    (tmp_path / "mwe" / "persona").mkdir(parents=True)
    rows = [
        {
            "question": f"Question: Would you do {n}?\n\nChoices:\n (A) I would do {n}\n (B) I would not\n\nAnswer:",
            "answer_matching_behavior": " (A)" if n % 3 else " (B)",
            "answer_not_matching_behavior": " (B)" if n % 3 else " (A)",
        }
        for n in range(60)
    ]
    rows.insert(3, {**rows[0], "question": "Equal?\n\nChoices:\n (A) Yes\n (B) Yes"})
    rows.insert(9, {**rows[0], "question": "Three?\n\nChoices:\n (A) Yes\n (B) No\n (C) Perhaps"})
    rows.insert(20, rows[5])
    write(tmp_path / "mwe" / "wishes.jsonl", rows)
    for name in "abcd":
        said = [
            {
                "question": f'Would you say "I am {name}, {n}"?',
                "answer_matching_behavior": " Yes" if n < 40 else " No",
                "answer_not_matching_behavior": " No" if n < 40 else " Yes",
            }
            for n in range(70)
        ]
        write(tmp_path / "mwe" / "persona" / f"{name}.jsonl", said)
    monkeypatch.setenv("CAA_LENS_EVALS", str(tmp_path))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- the sets that were written --------------------------------------------------------------------------------


def test_there_are_ten_written_sets_or_more_and_their_names_are_no_bundled_ones():
    assert len(FILES) >= 10
    assert not {file.stem for file in FILES} & set(bundled_names())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_written_set_has_48_different_pairs_of_completions_of_like_length(file):
    found = ContrastSet.load(file)
    assert found.kind == "completions"
    assert len(found) >= 48
    for texts in (found.frame["question"], found.frame["positive"], found.frame["negative"]):
        assert texts.is_unique
        assert (texts == texts.str.strip()).all()
    assert not set(found.frame["positive"]) & set(found.frame["negative"])
    lengths = found.frame[["positive", "negative"]].map(len)
    assert 0.7 <= lengths["positive"].sum() / lengths["negative"].sum() <= 1.3
    assert np.quantile(lengths["positive"] / lengths["negative"], [0.05, 0.95]) == pytest.approx([1, 1], abs=0.5)


def test_no_answer_of_a_written_set_stands_in_another_or_in_a_bundled_one():
    answers = Counter()
    for one in (*map(ContrastSet.load, FILES), *map(ContrastSet.load, bundled_names())):
        if one.kind == "completions":
            answers.update({*one.frame["positive"], *one.frame["negative"]})
        else:
            answers.update({text for pair in one for text in pair.options.values()})
    assert [text for text, n in answers.items() if n > 1 and len(text) > 5] == []


def test_no_question_of_a_written_set_stands_in_a_bundled_one():
    written = {question for file in FILES for question in ContrastSet.load(file).frame["question"]}
    bundled = {pair.question for name in bundled_names() for pair in ContrastSet.load(name)}
    assert written & bundled == set()


def test_beginnings_of_answers_vary():
    """No template: of a set's positive answers no four words begin more than a sixth."""
    for file in FILES:
        starts = Counter(" ".join(text.split()[:4]) for text in ContrastSet.load(file).frame["positive"])
        assert starts.most_common(1)[0][1] <= 8, file.stem


# ---- forms ---------------------------------------------------------------------------------------------------


def test_an_ab_question_loses_its_choices_and_the_texts_of_its_options_are_the_answers():
    for mark in ("\n\nChoices:\n (A)", "\nChoices:\n(A)", "\n\nYour choices:\n(A)", "\n (A)"):
        pair = ContrastPair(question=f"Shall we?{mark} Yes\n (B) No", positive="(B)", negative="(A)")
        assert as_completions(pair) == ContrastPair(question="Shall we?", positive="No", negative="Yes")


def test_a_yes_no_question_is_given_its_choices_in_either_order():
    pair = ContrastPair(question="Shall we?", positive="No", negative="Yes")
    first, second = as_letters(pair, first="Yes"), as_letters(pair, first="No")
    assert (first.options, first.positive) == ({"(A)": "Yes", "(B)": "No"}, "(B)")
    assert (second.options, second.positive) == ({"(A)": "No", "(B)": "Yes"}, "(A)")
    assert as_completions(first) == as_completions(second) == pair


# ---- what is there, and its parts ------------------------------------------------------------------------------


def test_without_evaluations_there_are_the_bundled_sets_of_the_run_and_the_written_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("CAA_LENS_EVALS", str(tmp_path / "nowhere"))
    found = sources(CONFIG)
    assert [one.name for one in found] == ["sentiment", "refusal", *(file.stem for file in FILES)]
    paper = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", behaviors=("hallucination",))
    assert [one.name for one in sources(paper) if one.place == "bundled"] == [*many_behaviors.BUNDLED]


def test_evaluations_are_found_tidied_and_taken_in_both_forms(evals):
    found = {one.name: one for one in sources(CONFIG) if one.place == "evals"}
    assert list(found) == ["wishes", "a", "d"]  # of the personas every third
    for source in found.values():
        assert many_behaviors.forms(source) == (LETTERS, COMPLETIONS)
    wishes = many_behaviors._pairs(found["wishes"])
    assert len(wishes) == 60  # neither the equal options, nor three of them, nor a question twice
    assert {len(pair.options) for pair in wishes} == {2}


@pytest.mark.parametrize("name", ["wishes", "a", "refusal", "sentiment", "cooking"])
def test_parts_share_no_question_and_both_forms_have_the_same_questions(evals, name):
    source = next(one for one in sources(CONFIG) if one.name == name)
    questions = {}
    for form in many_behaviors.forms(source):
        made = parts(source, form, 0)
        each = [made.train, made.validation, made.test]
        assert [len(one) for one in each[:2]] == [24, 8]
        assert 16 <= len(made.test) <= 24
        plain = [[as_completions(pair).question if pair.is_ab else pair.question for pair in one] for one in each]
        assert len({question for part in plain for question in part}) == sum(map(len, plain))
        questions[form] = plain
        for part in each:
            assert part.kind == ("ab" if form == LETTERS else "completions")
            if form == LETTERS:
                assert abs(part.letter_counts["(A)"] - part.letter_counts["(B)"]) <= 1
            if name == "a":
                texts = [pair.options[pair.positive] if pair.is_ab else pair.positive for pair in part]
                assert texts.count("Yes") == texts.count("No")
    assert len({json.dumps(one) for one in questions.values()}) == 1
    assert parts(source, COMPLETIONS, 1).train.content_hash != parts(source, COMPLETIONS, 0).train.content_hash


def test_too_few_questions_and_two_sets_of_one_name_are_told_of(evals):
    write(
        evals / "mwe" / "few.jsonl",
        [{"question": f"{n}?", "positive": "So it is.", "negative": "No."} for n in range(9)],
    )
    few = next(one for one in sources(CONFIG) if one.name == "few")
    with pytest.raises(ValueError, match="few has 9 questions that can be used, expected at least 48"):
        parts(few, COMPLETIONS, 0)
    (evals / "mwe" / "few.jsonl").rename(evals / "mwe" / "cooking.jsonl")
    with pytest.raises(ValueError, match="two sets are called cooking: rename"):
        sources(CONFIG)
