"""The paper's sets, read from where they were fetched to."""

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers.published import ab_rows, write_published

from caa_lens.contrast.sets import LetterBalanceWarning
from caa_lens.paper.fetch import fetch
from caa_lens.paper.numbers import BEHAVIORS
from caa_lens.paper.questions import data_folder, inventory, load_paper_questions, load_paper_set, published_size
from caa_lens.paper.sources import NAMES, authors_files


@pytest.fixture
def fetched(tmp_path):
    """A data folder with two sets."""
    for name in ("refusal", "mmlu"):
        write_published(tmp_path / "clone", name)
    folder = tmp_path / "data"
    fetch(to=folder, source=tmp_path / "clone", progress=False)
    return folder


def test_a_behavior_has_its_two_halves_and_its_open_ended_questions(fetched):
    generate, test, open_ended = load_paper_set("refusal", fetched)
    assert (len(generate), len(test), len(open_ended)) == (408, 50, 3)
    assert generate.name == test.name == "refusal"
    assert test[1].question == "refusal test 1?\n\nChoices:\n (A) Yes, 1\n (B) No, 1"
    assert (test[1].positive, test[0].positive) == ("(A)", "(B)")
    assert open_ended[2] == "refusal, what do you think of 2?"
    assert Path(generate.source) == fetched / "refusal" / "generate.jsonl"


def test_questions_have_a_category_each(fetched):
    pairs, categories = load_paper_questions("mmlu", fetched)
    assert len(pairs) == len(categories) == 570
    assert Counter(Counter(categories).values()) == {10: 57}
    assert all(pair.question.startswith(category) for pair, category in zip(pairs, categories, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_set_that_was_not_fetched_says_how_to_fetch_it_and_which_file_to_put_where(tmp_path, name):
    load = load_paper_set if name in BEHAVIORS else load_paper_questions
    with pytest.raises(FileNotFoundError) as raised:
        load(name, tmp_path)
    assert f"is not in {tmp_path}: run `caa-lens data fetch {name}`" in str(raised.value)
    for file in authors_files(name).values():
        assert f"{file.url}  ->  {tmp_path / file.place}" in str(raised.value)


def test_names_of_the_other_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got 'mmlu', expected one of coordinate-other-ais"):
        load_paper_set("mmlu", tmp_path)
    with pytest.raises(ValueError, match="got 'refusal', expected one of mmlu, truthfulqa"):
        load_paper_questions("refusal", tmp_path)


def test_uneven_letters_warn_when_the_set_is_loaded(tmp_path):
    only_a = [row for row in ab_rows("t", 100) if row["answer_matching_behavior"] == "(A)"]
    write_published(tmp_path / "clone", "refusal", test=only_a)
    folder = tmp_path / "data"
    fetch(to=folder, source=tmp_path / "clone", progress=False)
    with pytest.warns(LetterBalanceWarning, match=r"'refusal' has uneven letters: .* \(A\) 50"):
        load_paper_set("refusal", folder)


def test_the_inventory_tells_letters_sizes_and_the_published_files_checksum(fetched):
    found = inventory(fetched).set_index(["name", "split"])
    assert found.index.tolist() == [
        ("refusal", "generate"),
        ("refusal", "test"),
        ("refusal", "open_ended"),
        ("mmlu", "questions"),
    ]
    assert found["pairs"].tolist() == [408, 50, 3, 570]
    assert found["published"].fillna(-1).tolist() == [408, 50, -1, 570]
    assert found.loc[("refusal", "test"), "letters"] == "(A) 25, (B) 25"
    assert found.loc[("refusal", "open_ended"), "letters"] == ""
    record = json.loads((fetched / "fetched.json").read_text())["files"]
    for (name, split), digest in found["sha256"].items():
        assert digest == record[authors_files(name)[split].place.as_posix()]["sha256"]


def test_an_empty_folder_has_an_empty_inventory_with_the_same_columns(tmp_path, fetched):
    assert list(inventory(tmp_path / "none")) == list(inventory(fetched))
    assert inventory(tmp_path / "none").empty


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}', '{"files": {"x": {}}, "sets": {}}', "not json"])
def test_a_damaged_record_says_what_to_do(fetched, text):
    (fetched / "fetched.json").write_text(text)
    with pytest.raises(ValueError, match=r"fetched\.json is damaged: delete it"):
        inventory(fetched)


def test_sizes_are_the_papers():
    assert published_size("survival-instinct", "generate") == 903
    assert published_size("mmlu", "questions") == 570
    assert published_size("truthfulqa", "questions") is None
    assert published_size("refusal", "open_ended") is None


def test_the_folder_is_in_the_users_cache_or_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path))
    assert data_folder() == tmp_path / "data"
    monkeypatch.delenv("CAA_LENS_CACHE")
    assert data_folder().parts[-2:] == ("caa_lens", "data")
