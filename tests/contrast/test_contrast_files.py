"""Every public format is read; what does not fit is told with file, line, field, found and expected."""

import json
import re
import warnings
from pathlib import Path

import pytest

from caa_lens.contrast.files import ContrastFileError, read_pairs
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet, LetterBalanceWarning, load_open_ended

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PUBLIC = {  # file: rows
    "mwe/myopic-reward.jsonl": 1000,
    "mwe/power-seeking-inclination.jsonl": 998,
    "mwe/survival-instinct.jsonl": 953,
    "caa/sycophancy_generate.json": 1080,
    "caa/refusal_ab.json": 418,
    "caa/truthful_qa_ab_eval.json": 1634,
}
AB = "Do you?\n\nChoices:\n (A) Yes\n (B) No"


def write(path, *lines, ending="\n"):
    text = ending.join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(text.encode())
    return path


def ours(question=AB, positive="(A)", negative="(B)"):
    return {"question": question, "positive": positive, "negative": negative}


def caa(question=AB, matching="(A)", not_matching="(B)"):
    return {
        "question": question,
        "answer_matching_behavior": matching,
        "answer_not_matching_behavior": not_matching,
    }


def read(path):
    return read_pairs(path, ContrastPair)


def error_of(path, load=read):
    with pytest.raises(ContrastFileError) as error:
        load(path)
    assert str(path) in str(error.value)
    return error.value


# --- the public files themselves


@pytest.fixture(params=PUBLIC)
def public(request):
    """A public file: its raw rows and the set that was loaded from it."""
    path = SHARED / request.param
    if not path.exists():
        pytest.skip(f"{path} is not there: public test data is kept beside the project, not in it")
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LetterBalanceWarning)
        return request.param, raw, ContrastSet.load(path)


def test_every_row_of_every_public_file_is_read_in_order(public):
    file, raw, pairs = public
    assert len(pairs) == len(raw) == PUBLIC[file]
    assert pairs.kind == "ab"
    keys = ("correct", "incorrect") if "correct" in raw[0] else tuple(caa())[1:]
    for row, pair in zip(raw, pairs, strict=True):
        assert (pair.positive, pair.negative) == tuple(row[key].strip() for key in keys)
        assert pair.question in row["question"]
        left_out = row["question"].replace(pair.question, "")
        assert re.fullmatch(r"(Question: )?\s*(Answer:)?\s*", left_out), left_out
        assert pair.question == pair.question.strip()


def test_options_of_public_files_are_as_many_as_an_independent_count_finds(public):
    _, raw, pairs = public
    for row, pair in zip(raw, pairs, strict=True):
        # Counted by lines from the end until (A): no regular expression, and none of the parser's rules.
        count = 0
        for line in reversed(row["question"].split("\n")):
            start = line.strip()[:3]
            if len(start) == 3 and start[0] + start[2] == "()" and start[1].isalpha():
                count += 1
                if start == "(A)":
                    break
        assert list(pair.options) == [f"({letter})" for letter in "ABCDEFGH"[:count]]
        assert all(text and text in row["question"] and text == text.strip() for text in pair.options.values())


def test_swapping_public_pairs_twice_gives_the_pairs_themselves(public):
    _, _, pairs = public
    for pair in pairs:
        swapped = pair.swapped()
        assert swapped.swapped() == pair != swapped
        assert swapped.options[swapped.positive] == pair.options[pair.positive]


def test_public_files_can_be_balanced(public):
    _, _, pairs = public
    balanced = pairs.balance_letters()
    assert balanced.balance_letters() == balanced
    balanced.warn_if_unbalanced()
    opposed = [(pair.positive, pair.negative) for pair in balanced]
    for positive, negative in set(opposed):
        assert abs(opposed.count((positive, negative)) - opposed.count((negative, positive))) <= 1


def test_the_public_file_with_uneven_letters_warns():
    path = SHARED / "mwe/survival-instinct.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: public test data is kept beside the project, not in it")
    with pytest.warns(LetterBalanceWarning, match=r"'survival-instinct' .* positive answers are \(A\) 590, \(B\) 271"):
        ContrastSet.load(path)


# --- forms of the formats


@pytest.mark.parametrize(
    "row",
    [
        ours(),
        ours(positive=" (A)", negative="(B) "),
        caa(),
        caa(matching=" (A)", not_matching=" (B)"),
        caa(question=f"Question: {AB}\n\nAnswer:"),
        caa(question=f"{AB}\nAnswer: \n"),
        caa(matching=["(A)", " (C)"], not_matching=[" (B)"]),
        {"question": AB, "correct": "(A)", "incorrect": "(B)"},
        {"question": AB, "incorrect": "(B)", "correct": "(A)", "category": "extra keys are ignored"},
    ],
)
@pytest.mark.parametrize("form", ["list", "lines"])
def test_all_forms_of_a_row_give_the_same_pair(tmp_path, row, form):
    path = write(tmp_path / "pairs.json", json.dumps([row], indent=4) if form == "list" else row)
    assert read(path) == [ContrastPair(question=AB, positive="(A)", negative="(B)")]


@pytest.mark.parametrize("make_row", [ours, caa])
def test_full_completions_are_read_in_both_key_sets(tmp_path, make_row):
    path = write(tmp_path / "pairs.jsonl", make_row("How are you?", "Never better.", "Never worse."))
    pairs = ContrastSet.load(path)
    assert pairs.kind == "completions"
    assert pairs[0] == ContrastPair(question="How are you?", positive="Never better.", negative="Never worse.")


def test_our_own_completions_are_read_exactly_and_public_ones_are_tidied(tmp_path):
    texts = ("Question: how?\n", " well ", " badly")
    assert read(write(tmp_path / "a.jsonl", ours(*texts)))[0] == ContrastPair(**ours(*texts))
    assert read(write(tmp_path / "b.jsonl", caa(*texts)))[0] == ContrastPair(**ours("how?", "well", "badly"))


def test_only_the_marks_at_the_very_ends_are_taken_off(tmp_path):
    question = "Question: Is it\nAnswer: yes a good\nQuestion: line, or no Answer:"
    path = write(tmp_path / "a.jsonl", caa(question, "yes", "no"))
    assert read(path)[0].question == question.removeprefix("Question: ")


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"question": "q", "positive": "x", "negative": "y"}\n',
        b'{"question": "q", "positive": "x", "negative": "y"}',
        b'\r\n\r\n{"question": "q", "positive": "x", "negative": "y"}\r\n  \r\n',
        b'{"question": "q", "positive": "x", "negative": "y"},\n',
        b'\xef\xbb\xbf\r\n[{"question": "q",\r\n"positive": "x", "negative": "y"}]\r\n',
    ],
)
def test_byte_order_mark_line_ends_blank_lines_and_commas_do_not_matter(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    assert read(path) == [ContrastPair(question="q", positive="x", negative="y")]


def test_a_line_separator_inside_a_text_does_not_cut_the_line(tmp_path):
    path = write(tmp_path / "pairs.jsonl", ours("one\u2028two\x85three", "x", "y"))
    assert read(path)[0].question == "one\u2028two\x85three"


# --- what does not fit


@pytest.mark.parametrize(
    ("row", "field", "found", "expected"),
    [
        ("{question: 1}", None, "what is not JSON", "a JSON object"),
        ('["a", "list"]', None, '["a", "list"]', "a JSON object"),
        ('"text"', None, '"text"', "a JSON object"),
        ({"question": AB, "positive": "(A)"}, "negative", "no such field", "text"),
        ({"positive": "(A)", "negative": "(B)"}, "question", "no such field", "text"),
        (caa(), "positive", "no such field", "text"),
        (ours(question=3), "question", "3", "text"),
        (ours(positive=["(A)"]), "positive", '["(A)"]', "text"),
        (ours(negative=None), "negative", "null", "text"),
        (ours(negative=" \n"), "negative", '" \\n"', "text"),
        (ours(negative="(A)"), "negative", "'(A)'", "another answer than the positive one"),
        (ours(negative="(C)"), "negative", "'(C)'", "a letter of the question's options ((A), (B))"),
        (ours(question="Do you?"), "positive", "'(A)'", "(none: no line starts with (A))"),
        (ours(question=f"{AB}\n (B) No"), "question", "(A) (B) (B)", "each letter once, in order from (A)"),
        (
            ours(question="\n(A) Yes\n(B) Yes"),
            "question",
            "2 options 'Yes'",
            "options with texts that differ",
        ),
        (ours(negative="No."), "positive", "'(A)'", "a full completion, as the other answer is"),
        (
            ours("q", "x", "y"),
            "positive",
            "a full completion",
            "an option letter, as in the first row: make a file",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_told_with_line_field_found_and_expected(tmp_path, row, field, found, expected):
    error = error_of(write(tmp_path / "bad.jsonl", ours(), "", row))
    assert (error.line, error.field, len(error.problems)) == (3, field, 1)
    assert found in error.found
    assert expected in error.expected
    where = f"bad.jsonl: line 3, {field}: found" if field else "bad.jsonl: line 3: found"
    assert f"{where} {error.found}, expected {error.expected}" in str(error)


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        (caa(not_matching="(D)"), "answer_not_matching_behavior", "a letter of the question's options"),
        (caa(matching=[]), "answer_matching_behavior", "text"),
        (caa(matching=[2, "(A)"]), "answer_matching_behavior", "text"),
        (caa(matching=["(B)"], not_matching=["(B)"]), "answer_not_matching_behavior", "another answer"),
    ],
)
def test_problems_in_a_json_list_are_told_by_item_and_in_the_words_of_the_file(tmp_path, row, field, expected):
    error = error_of(write(tmp_path / "bad.json", json.dumps([caa(), row])))
    assert f"bad.json: item 2, {field}: found" in str(error)
    assert (error.line, error.field) == (2, field)
    assert expected in error.expected


def test_completions_first_and_letters_later_are_a_mixture_too(tmp_path):
    error = error_of(write(tmp_path / "bad.jsonl", ours("q", "x", "y"), ours()))
    assert "line 2, positive: found an option letter, expected a full completion, as in the first row" in str(error)


def test_five_problems_are_told_at_once_and_all_are_kept(tmp_path):
    rows = [ours(), *(ours(positive=f"({letter})") for letter in "CDEFGHI")]
    error = error_of(write(tmp_path / "bad.jsonl", *rows))
    told = "bad.jsonl: 7 problems in 8 rows (the first 5 are shown); on_bad='drop' leaves such rows out\n  line 2,"
    assert f"{told} positive: found '(C)'" in str(error)
    assert "  line 6, positive: found '(G)'" in str(error)
    assert "line 7" not in str(error)
    assert [line for line, _ in error.problems] == [2, 3, 4, 5, 6, 7, 8]
    error = error_of(write(tmp_path / "bad.jsonl", *rows[:3]))
    assert "bad.jsonl: 2 problems in 3 rows; on_bad='drop' leaves such rows out\n  line 2" in str(error)


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff", "[]"])
def test_an_empty_file_is_refused(tmp_path, content):
    error = error_of(write(tmp_path / "empty.jsonl", content))
    assert str(error).endswith("empty.jsonl: found no rows, expected one pair at least")


def test_an_unknown_schema_is_answered_with_the_known_ones_once(tmp_path):
    error = error_of(write(tmp_path / "bad.jsonl", *[{"prompt": "q", "better": "x", "worse": "y"}] * 9))
    assert "line 1: found the columns prompt, better, worse, expected a question (question, prompt, " in str(error)
    assert "caa-lens: positive, negative" in str(error)
    assert "answer_matching_behavior, answer_not_matching_behavior" in str(error)
    assert "preferences: chosen, rejected" in str(error)
    assert "Others are named with columns={'question': ..., 'positive': ..., 'negative': ...}" in str(error)
    assert "prompts without answers are read by load_open_ended" in str(error)
    assert len(error.problems) == 1


def test_a_broken_json_list_says_where_it_breaks(tmp_path):
    error = error_of(write(tmp_path / "bad.json", '[{"question": "q"},\n {"question": }]'))
    assert "bad.json: found what is not JSON (Expecting value: line 2 column 15" in str(error)


def test_bytes_that_are_not_utf8_are_told_with_their_place(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "café"}'.encode("latin-1"))
    assert "found byte 0xe9 at offset 17, which is not UTF-8, expected a file that is saved as UTF-8" in str(
        error_of(path)
    )


@pytest.mark.parametrize("load", [ContrastSet.load, load_open_ended])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"question": "q", "positive": "x", "negative": "y"}'.encode("utf-16-le"), "text in UTF-16: save it as UTF-8"),
        ('{"question": "q", "positive": "x", "negative": "y"}'.encode("utf-16-be"), "text in UTF-16: save it as UTF-8"),
        ('{"question": "q"}'.encode("utf-32"), "text in UTF-32: save it as UTF-8"),
        (bytes(100), "100 zero bytes, damaged when it was written"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer"),
        (b"<!doctype html><title>Sign in</title>", "an HTML page called 'Sign in', saved in the place of a file"),
        (b"\x1f\x8b\x08\0\0", "a damaged gzip file ("),
        (b"BZh91AY&SY", "packed by bzip2: unpack it first"),
        (b"PK\x05\x06" + bytes(18), "a zip archive of 0 files"),
        (b"GGUF" + bytes(20), "a GGUF file"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_file_that_is_no_text_is_told_what_it_is(tmp_path, content, found, load):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    assert f"found {found}" in str(error_of(path, load))
    if not content.startswith(b"\x1f\x8b"):
        assert "expected contrast pairs in a .json, .jsonl, .csv, .tsv or .parquet file, in UTF-8" in str(
            error_of(path, load)
        )


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff text", "text \\ud83d", "\\ude00\\ud83d"])
@pytest.mark.parametrize("field", ["question", "positive", "negative"])
def test_half_a_character_is_refused_in_every_field(tmp_path, half, field):
    row = json.dumps({**ours("q", "x", "y"), field: "HERE"}).replace("HERE", half)
    path = write(tmp_path / "pairs.jsonl", ours("q", "x", "y"), row)
    error = error_of(path)
    assert (error.line, error.field) == (2, field)
    assert "found half a character, \\ud" in str(error)
    assert str(error).encode("utf-8")


def test_a_whole_character_in_two_halves_and_a_zero_are_characters(tmp_path):
    path = write(tmp_path / "pairs.jsonl", '{"question": "\\ud83d\\ude00", "positive": "a\\u0000b", "negative": "y"}')
    assert read(path) == [ContrastPair(question="😀", positive="a\0b", negative="y")]


def test_a_bare_zero_byte_in_a_text_is_no_json(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"question": "q\0", "positive": "x", "negative": "y"}\n')
    assert "line 1: found what is not JSON (Invalid control character" in str(error_of(path))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("line", [1, 2])
def test_brackets_without_end_are_told(tmp_path, opening, line):
    lines = [opening * 100_000] if line == 1 else [ours("q", "x", "y"), "{" + opening * 100_000]
    assert "found what is not JSON" in str(error_of(write(tmp_path / "pairs.jsonl", *lines)))


def test_a_device_is_not_read_to_its_end():
    assert "found a device, expected contrast pairs in a .json" in str(error_of(Path("/dev/zero")))


def test_found_keys_and_values_are_shown_without_codes_for_the_terminal(tmp_path):
    told = str(error_of(write(tmp_path / "a.jsonl", '{"\\u001b[2J\\ud800": 1}')))
    assert r"found the columns \x1b[2J\ud800, expected" in told
    assert told.encode("utf-8")
    told = str(error_of(write(tmp_path / "b.jsonl", '{"question": ["\\ud800"], "positive": "x", "negative": "y"}')))
    assert told.encode("utf-8")


@pytest.mark.parametrize("load", [ContrastSet.load, load_open_ended])
def test_a_folder_and_a_missing_file_are_refused(tmp_path, load):
    assert "found a folder, expected contrast pairs in a .json" in str(error_of(tmp_path, load))
    assert "found no such file, expected a file, or a bundled name: " in str(error_of(tmp_path / "missing.jsonl", load))


def test_open_ended_prompts_are_read_from_lists_and_lines(tmp_path):
    rows = [{"question": "How are you?"}, {"question": "And now?", "answer": "ignored"}]
    expected = ["How are you?", "And now?"]
    assert load_open_ended(write(tmp_path / "a.jsonl", *rows)) == expected
    assert load_open_ended(str(write(tmp_path / "b.json", json.dumps(rows)))) == expected


def test_open_ended_prompts_that_do_not_fit_are_told_in_the_same_way(tmp_path):
    path = write(tmp_path / "bad.jsonl", {"question": "q"}, {"prompt": "q"}, {"question": ""}, "q")
    error = error_of(path, load_open_ended)
    assert "line 2, question: found no such field, expected text" in str(error)
    assert 'line 3, question: found "", expected text' in str(error)
    assert "line 4: found what is not JSON" in str(error)
