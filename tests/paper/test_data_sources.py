"""Where the sets are published, and what the published files become."""

import json
import re
from collections import Counter

import pandas as pd
import pytest
from helpers.published import question_rows
from hypothesis import given
from hypothesis import strategies as st

from caa_lens.contrast.files import ContrastFileError
from caa_lens.contrast.pair import ContrastPair
from caa_lens.paper import sources as data_sources
from caa_lens.paper.numbers import BEHAVIORS
from caa_lens.paper.sources import NAMES, authors_files, original_files, split_anew, two_option_rows

EVERY = [file for name in NAMES for file in (*authors_files(name).values(), *original_files(name).values())]


def test_every_address_names_a_full_commit_and_no_two_files_share_a_place():
    assert all(re.fullmatch(r"[0-9a-f]{40}", file.revision) and file.revision in file.url for file in EVERY)
    assert all(file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in EVERY)
    assert len({file.place for file in EVERY}) == len({file.url for file in EVERY}) == len(EVERY)


def test_the_authors_have_three_files_a_behavior_and_one_a_list_of_questions():
    assert {name: len(authors_files(name)) for name in NAMES} == dict.fromkeys(BEHAVIORS, 3) | {
        "mmlu": 1,
        "truthfulqa": 1,
    }
    assert [name for name in NAMES if not original_files(name)] == ["hallucination", "refusal"]


rows = st.lists(st.integers(0, 30), max_size=40).map(
    lambda numbers: [{"question": f"q{n}", "positive": str(i)} for i, n in enumerate(numbers)]
)


@given(rows=rows, n_generate=st.integers(0, 20), n_test=st.integers(0, 20), seed=st.integers(0, 5))
def test_a_new_split_is_disjoint_without_repetition_and_the_same_for_the_same_seed(rows, n_generate, n_test, seed):
    generate, test = split_anew(rows, n_generate, n_test, seed)
    questions = [row["question"] for row in generate + test]
    distinct = {row["question"] for row in rows}
    assert len(set(questions)) == len(questions)
    assert set(questions) <= distinct
    assert len(test) == min(n_test, len(distinct))
    assert len(generate) == min(n_generate, len(distinct) - len(test))
    assert split_anew(rows, n_generate, n_test, seed) == (generate, test)


def test_another_seed_draws_another_test_set():
    rows = [{"question": str(i)} for i in range(100)]
    assert split_anew(rows, 50, 50, seed=0) != split_anew(rows, 50, 50, seed=1)


def test_the_authors_questions_keep_their_text_letters_and_category(tmp_path):
    file = tmp_path / "truthful_qa.json"
    file.write_text(json.dumps(question_rows(["Myths"], 2)))
    assert two_option_rows("truthfulqa", file) == [
        {
            "question": "Myths 0?\n\nChoices:\n(A) One 0\n(B) Two 0",
            "positive": "(B)",
            "negative": "(A)",
            "category": "Myths",
        },
        {
            "question": "Myths 1?\n\nChoices:\n(A) One 1\n(B) Two 1",
            "positive": "(A)",
            "negative": "(B)",
            "category": "Myths",
        },
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "the top level is a dict"),
        ("[]", "no rows"),
        ("<html>Sign in</html>", "not a JSON list"),
        ('["x"]', "item 1, prompt"),
        ('[{"prompt": "q", "correct": "(A)", "incorrect": 3, "category": "c"}]', "item 1, incorrect"),
    ],
)
def test_a_file_that_is_no_list_of_questions_is_told(tmp_path, text, message):
    file = tmp_path / "mmlu.json"
    file.write_text(text)
    with pytest.raises(ContrastFileError, match=re.escape(message)):
        two_option_rows("mmlu", file)


@pytest.fixture
def mmlu(tmp_path):
    rows = [
        {
            "question": f" {subject} {i}? ",
            "subject": f"subject {subject:02}",
            "choices": [f"right {subject} {i}" if j == i % 4 else f"wrong {subject} {i} {j}" for j in range(4)],
            "answer": i % 4,
        }
        for subject in range(57)
        for i in range(14)
    ]
    file = tmp_path / "mmlu.parquet"
    pd.DataFrame(rows).to_parquet(file)
    return file


def test_mmlu_is_cut_to_ten_questions_of_57_subjects_right_against_wrong(mmlu):
    rows = two_option_rows("mmlu", mmlu)
    assert Counter(Counter(row["category"] for row in rows).values()) == {10: 57}
    assert len({row["question"] for row in rows}) == 570
    for row in rows:
        pair = ContrastPair(question=row["question"], positive=row["positive"], negative=row["negative"])
        subject = f"{int(row['category'][-2:])} "
        assert pair.question.startswith(subject)
        assert pair.options[pair.positive].startswith("right " + subject)
        assert pair.options[pair.negative].startswith("wrong " + subject)
    letters = Counter(row["positive"] for row in rows)
    assert abs(letters["(A)"] - 285) < 60  # five standard deviations of a fair coin


def test_the_cut_depends_on_the_seed_alone(mmlu):
    assert two_option_rows("mmlu", mmlu, seed=3) == two_option_rows("mmlu", mmlu, seed=3)
    assert two_option_rows("mmlu", mmlu, seed=3) != two_option_rows("mmlu", mmlu, seed=4)


def test_truthfulqa_takes_every_question_with_its_best_answer_and_never_a_wrong_one_that_equals_it(tmp_path):
    file = tmp_path / "validation.parquet"
    rows = [
        {
            "question": f"Q{i}?",
            "best_answer": f"best {i}",
            "incorrect_answers": [f"best {i} ", f"bad {i}", f"worse {i}"],
            "category": f"c{i % 3}",
            "type": "x",
        }
        for i in range(30)
    ]
    rows.append({**rows[0], "question": "No wrong one?", "incorrect_answers": ["best 0"]})
    pd.DataFrame(rows).to_parquet(file)
    found = two_option_rows("truthfulqa", file)
    assert [row["category"] for row in found] == [f"c{i % 3}" for i in range(30)]
    wrong = set()
    for i, row in enumerate(found):
        pair = ContrastPair(question=row["question"], positive=row["positive"], negative=row["negative"])
        assert pair.options[pair.positive] == f"best {i}"
        wrong.add(pair.options[pair.negative].split()[0])
    assert wrong == {"bad", "worse"}


@pytest.mark.parametrize("name", data_sources.QUESTIONS)
def test_a_broken_or_foreign_table_is_told(tmp_path, name):
    broken, foreign = tmp_path / "broken.parquet", tmp_path / "foreign.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    pd.DataFrame({"text": ["x"]}).to_parquet(foreign)
    for file in (broken, foreign):
        with pytest.raises(ContrastFileError, match="expected a table with the columns question"):
            two_option_rows(name, file)
