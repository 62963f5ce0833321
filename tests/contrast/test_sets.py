"""Contrast pairs and sets: swapping, balancing and splitting lose nothing, and what is uneven is said."""

import re
import warnings
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet, LetterBalanceWarning, bundled_names, load_open_ended

LETTERS = "ABCDEFGH"


def ab_pair(positive="A", negative="B", *, texts=("Yes", "No"), stem="Do you?", closing=""):
    options = "\n".join(f" ({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))
    question = f"{stem}\n\nChoices:\n{options}{closing}"
    return ContrastPair(question=question, positive=f"({positive})", negative=f"({negative})")


def ab_set(positives, name="test"):
    """A two-option set with these positive letters; every pair has a question of its own."""
    other = {"A": "B", "B": "A"}
    pairs = (ab_pair(letter, other[letter], stem=f"Question {i}?") for i, letter in enumerate(positives))
    return ContrastSet(name=name, pairs=tuple(pairs))


def completion_set(n, name="test"):
    return ContrastSet.from_pairs([(f"Question {i}?", f"good {i}", f"bad {i}") for i in range(n)], name=name)


# Texts that could be mistaken for structure: brackets and letters inside, line breaks, not only ASCII.
texts = st.text(alphabet="ab .,()AB\né\u2028", min_size=1, max_size=12).filter(
    lambda t: t.strip() and not re.search(r"\n[ \t]*\n|^[ \t]*\([A-Z]\)", t, re.MULTILINE)
)


@st.composite
def ab_rows(draw):
    n = draw(st.integers(2, 8))
    options = draw(st.lists(texts, min_size=n, max_size=n, unique_by=str.strip))
    positive, negative = draw(st.permutations(LETTERS[:n]))[:2]
    indents = draw(st.lists(st.sampled_from(["", " ", "\t"]), min_size=n, max_size=n))
    gaps = draw(st.lists(st.sampled_from([" ", "", "  "]), min_size=n, max_size=n))
    between = draw(st.sampled_from(["\n", "\n\n", " \n", "\r\n"]))
    lines = [
        f"{indent}({letter}){gap}{text.strip()}"
        for indent, letter, gap, text in zip(indents, LETTERS, gaps, options, strict=False)
    ]
    stem = draw(st.sampled_from(["Well?\n\nChoices:\n", "Is it (A) or (B)?\n", "Of these:\n(A) x\n(B) y\nwhich?\n\n"]))
    closing = draw(st.sampled_from(["", "\n", "\n\nAnswer with (A) or (B)."]))
    question = stem + between.join(lines) + closing
    # Texts only: with runtime checks on, making the pair draws random numbers, which hypothesis forbids here.
    return {"question": question, "positive": f"({positive})", "negative": f"({negative})"}


@settings(deadline=None)
@given(ab_rows())
def test_swapping_twice_gives_the_pair_itself(row):
    pair = ContrastPair(**row)
    assert pair.swapped().swapped() == pair


@settings(deadline=None)
@given(ab_rows())
def test_swapping_exchanges_two_texts_and_keeps_what_each_answer_says(row):
    pair = ContrastPair(**row)
    swapped = pair.swapped()
    assert (swapped.positive, swapped.negative) == (pair.negative, pair.positive)
    assert swapped.options[swapped.positive] == pair.options[pair.positive]
    assert swapped.options[swapped.negative] == pair.options[pair.negative]
    others = pair.options.keys() - {pair.positive, pair.negative}
    assert {letter: swapped.options[letter] for letter in others} == {k: pair.options[k] for k in others}
    assert sorted(swapped.question) == sorted(pair.question)


def test_swapping_leaves_every_other_character_where_it_was():
    pair = ab_pair("C", "A", texts=("one\n  more ", "two", "three"), stem=" Odd  stem (C)?", closing="\n\nAnswer:")
    assert pair.question == " Odd  stem (C)?\n\nChoices:\n (A) one\n  more \n (B) two\n (C) three\n\nAnswer:"
    assert pair.swapped() == ContrastPair(
        question=" Odd  stem (C)?\n\nChoices:\n (A) three \n (B) two\n (C) one\n  more\n\nAnswer:",
        positive="(A)",
        negative="(C)",
    )


def test_only_the_last_run_of_options_counts():
    pair = ab_pair(stem="Consider:\n (A) tea\n (B) milk\n (C) rum\nWhich (A) do you take?", texts=("Tea", "Milk"))
    assert pair.options == {"(A)": "Tea", "(B)": "Milk"}


def test_options_parse_without_blanks_with_blank_lines_between_and_over_lines():
    question = "Which?\n(A)Yes,\nindeed\n\n(B) No\n\n\t(C)  Maybe \n\nAnswer with one letter."
    pair = ContrastPair(question=question, positive="(A)", negative="(C)")
    assert pair.options == {"(A)": "Yes,\nindeed", "(B)": "No", "(C)": "Maybe"}


def test_completions_have_no_options_and_cannot_be_swapped():
    pair = ContrastPair(question="How are you?\n (A) x\n (B) y", positive="Fine.", negative="Bad.")
    assert not pair.is_ab
    assert pair.options == {}
    with pytest.raises(ValueError, match="only an A/B pair has options to swap"):
        pair.swapped()


def test_an_option_with_a_blank_line_is_not_swapped_wrongly():
    pair = ab_pair(texts=("first\n\nsecond", "No"))
    assert pair.options["(A)"] == "first\n\nsecond"
    with pytest.raises(ValueError, match=r"option \(A\) .* has a blank line: take it out to swap"):
        pair.swapped()


@pytest.mark.parametrize(
    ("question", "positive", "negative", "message"),
    [
        ("", "x", "y", "question: found '', expected text"),
        ("q", " \n", "y", r"positive: found ' \\n', expected text"),
        ("q", "same", "same ", "negative: found 'same ', expected another answer than the positive one"),
        ("q\n(A) x\n(B) y", " (A)", "(B)", r"positive: found ' \(A\)', expected '\(A\)', without blanks"),
        ("q\n(A) x\n(B) y", "(A)", "y", r"positive: found '\(A\)', expected a full completion, as the other"),
        (
            "q\n(A) x\n(B) y",
            "(A)",
            "(C)",
            r"negative: found '\(C\)', expected a letter of the question's options \(\(A\), \(B\)\)",
        ),
        (
            "Yes or no?",
            "(A)",
            "(B)",
            r"positive: found '\(A\)', expected .* \(none: no line starts with \(A\)\)",
        ),
        (
            "q\n(A) x\n(B) y\n(B) z",
            "(A)",
            "(B)",
            r"found the options \(A\) \(B\) \(B\), expected each letter once",
        ),
        (
            "q\n(A) x\n(A) y\n(B) z",
            "(A)",
            "(B)",
            r"found the options \(A\) \(A\) \(B\), expected each letter once",
        ),
        (
            "q\n(A) x\n(C) y",
            "(A)",
            "(C)",
            r"found the options \(A\) \(C\), expected each letter once, in order",
        ),
        ("q\n(A) x\n(B) x", "(A)", "(B)", "found 2 options 'x', expected options with texts that differ"),
        ("q\n(A)\n(B) x", "(A)", "(B)", "found 1 options '', expected options with texts that differ"),
    ],
)
def test_a_pair_that_makes_no_sense_is_refused_with_the_reason(question, positive, negative, message):
    with pytest.raises(ValueError, match=message):
        ContrastPair(question=question, positive=positive, negative=negative)


def test_pairs_and_sets_cannot_be_changed_in_place():
    pairs = ab_set("AB")
    with pytest.raises(FrozenInstanceError):
        pairs.name = "other"
    with pytest.raises(FrozenInstanceError):
        pairs[0].positive = "(B)"


@settings(deadline=None)
@given(st.text("AB", min_size=1, max_size=40), st.integers(0, 5))
def test_balancing_makes_two_letters_even_with_the_fewest_swaps_in_place(positives, seed):
    pairs = ab_set(positives)
    balanced = pairs.balance_letters(seed)
    counts = balanced.letter_counts
    assert abs(counts["(A)"] - counts["(B)"]) <= 1
    swapped = [i for i in range(len(pairs)) if balanced[i] != pairs[i]]
    assert len(swapped) == abs(positives.count("A") - positives.count("B")) // 2
    assert all(balanced[i] == pairs[i].swapped() for i in swapped)
    assert balanced.balance_letters(seed + 1) == balanced


@settings(deadline=None)
@given(st.lists(st.permutations("ABCD").map(lambda p: (p[0], p[1])), min_size=1, max_size=40))
def test_balancing_many_options_makes_each_two_letters_even(letters):
    pairs = ContrastSet(
        name="test",
        pairs=tuple(ab_pair(p, n, texts=("a", "b", "c", "d"), stem=f"{i}?") for i, (p, n) in enumerate(letters)),
    )
    balanced = pairs.balance_letters()
    counts = Counter((pair.positive, pair.negative) for pair in balanced)
    assert all(abs(n - counts[negative, positive]) <= 1 for (positive, negative), n in counts.items())
    assert balanced.balance_letters() == balanced


def test_the_seed_decides_which_pairs_are_swapped():
    pairs = ab_set("A" * 20)
    assert pairs.balance_letters(seed=1) == pairs.balance_letters(seed=1)
    assert pairs.balance_letters(seed=1) != pairs.balance_letters(seed=2)
    assert pairs == ab_set("A" * 20), "the set itself was changed"


def test_completions_have_no_letters_to_balance():
    with pytest.raises(ValueError, match="'mood' has completions: only A/B pairs have letters to balance"):
        completion_set(3, name="mood").balance_letters()


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(0, 5), st.data())
def test_splitting_is_disjoint_complete_and_repeatable(n, seed, data):
    pairs = completion_set(n)
    n_test = data.draw(st.integers(1, n - 1))
    train, test = pairs.split(test=n_test, seed=seed)
    assert (len(train), len(test)) == (n - n_test, n_test)
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(pairs)
    assert (train, test) == pairs.split(test=n_test, seed=seed)
    assert (train.name, test.name) == (pairs.name, pairs.name)


def test_splitting_shuffles_and_takes_a_share_as_well_as_a_number():
    pairs = completion_set(40)
    assert pairs.split(test=0.25, seed=3) == pairs.split(test=10, seed=3)
    assert pairs.split(test=10, seed=3) != pairs.split(test=10, seed=4)
    assert pairs.split(test=10, seed=3)[1] != pairs[-10:]


@pytest.mark.parametrize("test", [0, -1, 4, 5, True, 0.0, 1.0, -0.5, 2.0, 0.01, 0.99, float("nan")])
def test_a_split_that_leaves_a_side_empty_is_refused(test):
    with pytest.raises(ValueError, match=f"got test={test!r} for the 4 pairs of 'mood', expected a number of pairs"):
        completion_set(4, name="mood").split(test=test)


def test_a_part_to_choose_on_is_taken_from_the_pairs_to_extract_from():
    pairs = completion_set(40)
    train, test = pairs.split(test=10, seed=3)
    left, validation, same = pairs.split(test=10, validation=0.2, seed=3)
    assert same == test
    assert (len(left), len(validation)) == (22, 8)
    assert set(left) | set(validation) == set(train)
    assert not set(left) & set(validation)
    for number in (30, 0, True, 0.9):
        with pytest.raises(
            ValueError, match=f"got validation={number!r} for the 40 pairs of 'test', of which 10 are the"
        ):
            pairs.split(test=10, validation=number)


def test_a_sample_has_distinct_pairs_in_order():
    pairs = completion_set(30)
    sample = pairs.sample(10, seed=1)
    where = [pairs.index(pair) for pair in sample]
    assert where == sorted(set(where))
    assert sample != pairs[:10]
    assert pairs.sample(30) == pairs
    with pytest.raises(ValueError, match="got n=31, expected 1 to 30, the number of pairs of 'test'"):
        pairs.sample(31)


def test_pairs_are_left_out_by_number():
    pairs = completion_set(5)
    assert pairs.without([]) == pairs
    assert pairs.without((1, 4, 4)).pairs == (pairs[1], pairs[2], pairs[4])
    for rows, message in (([6], "got the row 6, expected 1 to 5"), ([0], "at least 1"), (range(1, 6), "has no pairs")):
        with pytest.raises(ValueError, match=message):
            pairs.without(rows)


def test_a_set_is_a_sequence_of_pairs():
    pairs = completion_set(5)
    assert [pairs[i] for i in range(5)] == list(pairs) == [*pairs.pairs]
    assert pairs[-1] == pairs.pairs[-1]
    assert pairs[1:3] == ContrastSet(name="test", pairs=pairs.pairs[1:3])
    assert pairs[2] in pairs
    assert pairs.behavior == pairs.name == "test"


def test_an_empty_or_mixed_set_is_refused():
    with pytest.raises(ValueError, match="contrast set 'x' has no pairs, expected at least one"):
        ContrastSet.from_pairs([], name="x")
    with pytest.raises(ValueError, match="'x' mixes 1 A/B pairs with 2 pairs of completions: make a set of each"):
        ContrastSet.from_pairs([ab_pair(), *completion_set(2)], name="x")


def test_uneven_letters_are_warned_about_where_the_set_comes_in(tmp_path):
    rows = ab_set("AAAAAAABBB", name="mood")
    said = r"'mood' has uneven letters: its positive answers are \(A\) 7, \(B\) 3\. .* use \.balance_letters\(\)"
    with pytest.warns(LetterBalanceWarning, match=said):
        ContrastSet.from_pairs(rows, name="mood")
    rows.save(tmp_path / "mood.jsonl")
    with pytest.warns(LetterBalanceWarning, match=said):
        ContrastSet.load(tmp_path / "mood.jsonl")
    with pytest.warns(LetterBalanceWarning, match=said):
        rows.warn_if_unbalanced()
    with pytest.warns(LetterBalanceWarning, match=r"its positive answers are \(A\) 4\."):
        ab_set("AAAA").warn_if_unbalanced()


def test_editors_show_the_fields_of_a_set():
    assert list(signature(ContrastSet).parameters) == ["name", "pairs", "source", "dropped"]


def test_a_pair_is_found_again_with_its_letters_exchanged_and_no_other_is():
    rows = ab_set("ABABAB")
    assert rows.pair_hashes == tuple(
        pair_hash for pair in rows for pair_hash in replace(rows, pairs=(pair.swapped(),)).pair_hashes
    )
    assert len(set(rows.pair_hashes)) == len(rows)
    mood = completion_set(4)
    assert len({*mood.pair_hashes, *completion_set(3).pair_hashes}) == 4


@pytest.mark.parametrize("positives", ["AAAAAABBBB", "A" * 3, "AAAAAAAAB", "AB" * 10])
def test_letters_that_are_even_enough_or_few_are_not_warned_about(positives):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ab_set(positives).warn_if_unbalanced()


def test_letters_are_also_warned_about_where_only_the_negative_ones_are_uneven():
    texts = ("a", "b", "c", "d")
    pairs = [ab_pair("BCD"[i % 3], "A", texts=texts, stem=f"{i}?") for i in range(12)]
    uneven = ContrastSet(name="test", pairs=tuple(pairs))
    with pytest.warns(LetterBalanceWarning, match=r"its negative answers are \(A\) 12\."):
        uneven.warn_if_unbalanced()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uneven.balance_letters().warn_if_unbalanced()


def test_saving_then_loading_is_exact(tmp_path):
    path = tmp_path / "mine.jsonl"
    odd = [("Wie geht's?\u2028 Gut\n", " leading and trailing ", 'quote " and \\'), ("b", "é", "\t😀 x")]
    pairs = ContrastSet.from_pairs(odd, name="mine")
    pairs.save(path)
    loaded = ContrastSet.load(path)
    assert loaded.pairs == pairs.pairs
    assert (loaded.name, loaded.source) == ("mine", str(path))
    assert ContrastSet.load(str(path), name="other").name == "other"
    letters = ab_set("AB")
    letters.save(path)
    assert ContrastSet.load(path).pairs == letters.pairs


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    completion_set(3).save(path)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        completion_set(5).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.jsonl"], "a temporary file was left"


def test_the_authors_folders_give_their_name_to_the_set(tmp_path):
    folder = tmp_path / "corrigibility"
    folder.mkdir()
    ab_set("AB").save(folder / "generate_dataset.json")
    assert ContrastSet.load(folder / "generate_dataset.json").name == "corrigibility"


def test_the_content_hash_is_of_the_pairs_alone():
    pairs = completion_set(3)
    assert pairs.content_hash == completion_set(3, name="other name").content_hash
    assert pairs.content_hash != pairs[::-1].content_hash
    assert completion_set(1).content_hash == "b3bbf6ca3f1165300defc0f3ec88cfa3fc6f1f585073ac635cff1d55ac370da7"


def test_the_frame_has_one_row_a_pair():
    frame = ab_set("AB").frame
    assert list(frame.columns) == ["question", "positive", "negative"]
    assert list(frame.positive) == ["(A)", "(B)"]


def test_the_summary_says_name_kind_number_and_letters():
    assert repr(ab_set("AAB", name="mood")) == "ContrastSet(mood: 3 ab pairs, positive (A) 2, (B) 1)"
    assert completion_set(2, name="mood").summary() == "mood: 2 completions pairs"


def test_a_bundled_name_wins_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    completion_set(2).save("sentiment")
    assert ContrastSet.load("sentiment").source == "bundled:sentiment"
    assert ContrastSet.load(Path("sentiment")).source == "sentiment"


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names():
    said = r"sentimet: found no such file, expected .* bundled name: .* \(did you mean 'sentiment'\?\)"
    for load in (ContrastSet.load, load_open_ended):
        with pytest.raises(ValueError, match=said) as error:
            load("sentimet")
        assert all(name in str(error.value) for name in bundled_names())
