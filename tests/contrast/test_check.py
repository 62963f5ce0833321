"""The linter of pairs finds every fault that is planted in a bundled set, and nothing in the bundled sets."""

import copy
import random
import re
import warnings
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from caa_lens.contrast.checking.findings import words
from caa_lens.contrast.checking.repeats import ALIKE, content
from caa_lens.contrast.checking.set_check import (
    ContrastCheck,
    ContrastCheckWarning,
    check_pairs,
    warn_of_findings,
)
from caa_lens.contrast.checking.sides import _corrected, sign_test
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet, bundled_names

OURS = Path(__file__).resolve().parents[2] / "experiments" / "data" / "contrast_sets"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = (5, 17, 40, 41, 77)  # of a set of 120


def bundled(name):
    return ContrastSet.load(name)


def with_pairs(name, *extra):
    pairs = bundled(name)
    return replace(pairs, pairs=(*pairs.pairs, *extra))


def changed(name, change, rows=None):
    """A bundled set of which some pairs, by number from 1, or all, are changed."""
    pairs = bundled(name)
    made = [change(pair) if rows is None or n in rows else pair for n, pair in enumerate(pairs, start=1)]
    return replace(pairs, pairs=tuple(made))


def options(*texts):
    return "\n\nChoices:\n" + "\n".join(f" ({letter}) {text}" for letter, text in zip("ABCDE", texts, strict=False))


def one_word_less(pair):
    return replace(pair, positive=re.sub(r" (\w+) (\w+)([.!?]*)$", r" \2\3", pair.positive))


def positive_last_of(pair, n):
    """The same pair with options put in front, so that there are `n` and the positive one comes last."""
    wrong, right = pair.options[pair.negative], pair.options[pair.positive]
    others = [f"I would rather talk of the {word}." for word in ("weather", "dinner")][: n - 2]
    question = pair.stem.removesuffix("\n\nChoices:\n (A) ") + options(*others, wrong, right)
    return ContrastPair(question=question, positive=f"({'ABCD'[n - 1]})", negative=f"({'ABCD'[n - 2]})")


def mirrored(pair):
    return replace(pair, positive=pair.negative, negative=pair.positive)


SENTIMENT, REFUSAL = bundled("sentiment").pairs, bundled("refusal").pairs


def asked_with(pair, end, positive, negative):
    return ContrastPair(question=pair.question + end, positive=positive, negative=negative)


def last_by_turns(pairs):
    return replace(pairs, pairs=tuple(positive_last_of(pair, 2 + n % 3) for n, pair in enumerate(pairs)))


SENTIMENT, REFUSAL = bundled("sentiment").pairs, bundled("refusal").pairs
EVERY = tuple(range(1, 121))
PLANTED = {  # the finding, and the set with the numbers of the pairs that it is about
    "a pair that stands there twice": ("duplicates", with_pairs("sentiment", SENTIMENT[7]), (121,)),
    "a pair that stands there in capitals": (
        "duplicates",
        with_pairs("sentiment", replace(SENTIMENT[7], positive=SENTIMENT[7].positive.upper())),
        (121,),
    ),
    "pairs with a word taken out": (
        "near duplicates",
        with_pairs("sentiment", *map(one_word_less, SENTIMENT[3:6])),
        (121, 122, 123),
    ),
    "letters with a word more in the question": (
        "near duplicates",
        with_pairs("refusal", replace(REFUSAL[0], question="Now: " + REFUSAL[0].question)),
        (121,),
    ),
    "completions the other way round": ("mirrored", with_pairs("sentiment", mirrored(SENTIMENT[2])), (121,)),
    "letters the other way round": ("mirrored", with_pairs("refusal", mirrored(REFUSAL[2])), (121,)),
    "options exchanged, and so the letters": ("both orders", with_pairs("refusal", REFUSAL[2].swapped()), (121,)),
    "every positive answer goes on": (
        "length",
        changed("sentiment", lambda p: replace(p, positive=f"{p.positive} {' '.join(p.positive.split()[::-1])}")),
        EVERY,
    ),
    "every positive answer begins with one word": (
        "words",
        changed("sentiment", lambda p: replace(p, positive=f"Definitely, {p.positive[0].lower()}{p.positive[1:]}")),
        EVERY,
    ),
    "a third of the negative answers has one word": (
        "words",
        changed("formality", lambda p: replace(p, negative=f"{p.negative} Kapow."), EVERY[::3]),
        EVERY[::3],
    ),
    "letters that are all (A)": (
        "letters",
        changed("refusal", lambda p: p if p.positive == "(A)" else p.swapped()),
        EVERY,
    ),
    "the positive option comes last of two, three and four": ("place", last_by_turns(bundled("sycophancy")), EVERY),
    "options written (1) and (2)": (
        "labels",
        changed("sentiment", lambda p: asked_with(p, "\n(1) This\n(2) That", "(1)", "(2)"), ROWS),
        ROWS,
    ),
    "options written a. and b.": (
        "labels",
        changed("sentiment", lambda p: asked_with(p, "\na. This\nb. That", "a", "b"), ROWS),
        ROWS,
    ),
    "options in a line, and their numbers": (
        "labels",
        changed("sentiment", lambda p: asked_with(p, " 1) This, or 2) that?", "1", "2"), ROWS),
        ROWS,
    ),
    "numbers in brackets": (
        "labels",
        changed("sentiment", lambda p: replace(p, positive="(ii)", negative="(iii)"), ROWS),
        ROWS,
    ),
    "marks of Llama 2": (
        "special tokens",
        changed("sentiment", lambda p: replace(p, question=f"[INST] {p.question} [/INST]"), ROWS),
        ROWS,
    ),
    "marks of ChatML": (
        "special tokens",
        changed("sentiment", lambda p: replace(p, negative=f"{p.negative}<|im_end|>"), ROWS),
        ROWS,
    ),
    "an end of sequence": (
        "special tokens",
        changed("formality", lambda p: replace(p, positive=f"{p.positive}</s>"), ROWS),
        ROWS,
    ),
    "a transcript": (
        "special tokens",
        changed("formality", lambda p: replace(p, question=f"{p.question}\n\nAssistant: Yes?\n\nHuman: So?"), ROWS),
        ROWS,
    ),
    "options that nothing is asked of": (
        "no question",
        changed("refusal", lambda p: replace(p, question=p.question[p.question.index("Choices") :]), ROWS),
        ROWS,
    ),
}


@pytest.mark.parametrize("name", bundled_names())
def test_nothing_is_found_in_the_bundled_sets_nor_in_parts_of_them(name, demo_tokenizer):
    pairs = bundled(name)
    train, test = pairs.split(test=0.3)
    assert pairs.check(model=demo_tokenizer).findings == ()
    assert train.check(other=test).findings == ()
    for seed in range(10):
        for n in (10, 20, 60):
            part = pairs.sample(n, seed=seed)
            assert [one for one in check_pairs(part.pairs) if one.finding != "letters"] == [], (n, seed)


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(planted):
    finding, pairs, rows = PLANTED[planted]
    found = pairs.check()
    assert found.findings == (finding,)
    assert found.rows(finding) == rows
    line = next(line for line in repr(found).split("\n") if line.strip().startswith(f"{finding}: "))
    assert re.search(r"\d+ of \d+|\d+ words stand|one word stands|answers are \(A\)", line)
    assert finding != "no question" or f"[pair {rows[0]}: ''" in line


def test_numbers_and_names_that_are_answers_are_no_labels_of_options():
    sums = ContrastSet.from_pairs([(f"What is {n} + {n}?", str(2 * n), str(2 * n + 1)) for n in range(20, 40)])
    assert "labels" not in sums.check().findings
    lists = ContrastSet.from_pairs([("Which of these?\n1. tea\n2. rum", "tea, I think", "rum, I think")])
    assert lists.check().findings == ()


def test_twelve_kinds_of_faults_are_planted():
    kinds = {finding for finding, _, _ in PLANTED.values()} | {"in both", "tokens"}
    assert len(kinds) == 13
    assert kinds - {"no question"} == {
        "duplicates", "near duplicates", "mirrored", "both orders", "length", "words", "letters", "place", "labels",
        "special tokens", "in both", "tokens",
    }  # fmt: skip


def test_pairs_in_both_parts_are_found_as_they_are_exchanged_or_nearly():
    train, test = bundled("refusal").split(test=20)
    leaky = replace(test, pairs=(*test.pairs, train[3], train[5].swapped(), one_word_more(train[9])))
    found = train.check(other=leaky)
    assert found.findings == ("in both",)
    assert found.rows("in both") == (4, 6, 10)
    assert "3 of 100: in 'refusal', too, 1 of them nearly" in repr(found)
    assert found.settings["other_hash"] == leaky.content_hash


def one_word_more(pair):
    return replace(pair, question="Well: " + pair.question)


def test_answers_that_begin_within_a_token_are_found_with_a_tokenizer(demo_tokenizer):
    pairs = changed("sentiment", lambda p: replace(p, positive=f"\n\n{p.positive}"), (5,))
    assert "tokens" not in pairs.check().findings
    found = pairs.check(model=demo_tokenizer)
    assert found.rows("tokens") == (5,)
    assert "[pair 5: 'We were blessed with glorio...' begins within the token '\\n\\n']" in repr(found)


BOUNDARIES = {  # a chat template, or none
    "its own": "",
    "with words at its end": "{% for m in messages %}USER: {{ m.content }} {% endfor %}ASSISTANT:",
    "Llama 2's": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "none": None,
}


@pytest.mark.parametrize("template", BOUNDARIES)
def test_the_boundary_of_a_token_is_where_the_prompts_of_the_model_have_it(demo_tokenizer, template, recwarn):
    """The same question asked of the format that extraction uses: does a token begin where the answer begins?"""
    from types import SimpleNamespace

    from caa_lens.prompts.prompt_formats import LLAMA2_CHAT, default_format

    tokenizer = copy.deepcopy(demo_tokenizer)
    if template != "its own":
        tokenizer.chat_template = BOUNDARIES[template]
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(model_name="some", tokenizer_name=None))
    chosen = replace(LLAMA2_CHAT, prepend_bos=False) if template == "Llama 2's" else default_format(model)
    found = set()
    for answer in [
        "Yes.",
        " Yes.",
        "\nYes.",
        "\n\nYes.",
        "'s it",
        ":) Yes",
        "\tYes",
        "  Yes",
        "\u0301a",
        "…",
        ")",
        "::",
    ]:
        pairs = ContrastSet.from_pairs([("How is it?", answer, "Not at all, I say.")])
        prompt = chosen.encode(tokenizer, "How is it?", answer)
        question = chosen.encode(tokenizer, "How is it?")
        apart = prompt.tokens[: len(question.tokens)] == question.tokens
        gap_only = prompt.text[len(question.text) :] == " " + answer
        if gap_only and answer[0].isspace():
            continue  # which of the two blanks is the gap's, no token tells
        assert ("tokens" in pairs.check(model=tokenizer).findings) == (not apart), answer
        found.add(apart)
    assert found == {True, False} or template in ("none", "Llama 2's")


def test_special_tokens_of_the_tokenizer_itself_are_found(demo_tokenizer):
    (own,) = [one for one in demo_tokenizer.all_special_tokens if "im_start" in one][:1]
    pairs = changed("sentiment", lambda p: replace(p, question=f"{p.question} {own}"), ROWS)
    assert pairs.check(model=demo_tokenizer).rows("special tokens") == ROWS


# --- the parts, against slow and obvious twins


def bigrams(pair):
    tokens = [word for text in (content(pair)[0], *sorted(content(pair)[1:])) for word in words(text)]
    return set(pairwise(tokens))


def nearly_the_same(pairs):
    """Every pair against every one before it."""
    sets = [bigrams(pair) for pair in pairs]
    often = defaultdict(int)
    for one in sets:
        for bigram in one:
            often[bigram] += 1
    sets = [{b for b in one if often[b] <= max(2, 0.5 * len(pairs))} for one in sets]
    found = set()
    for n, one in enumerate(sets):
        if any(len(one | two) >= 6 and len(one & two) >= ALIKE * len(one | two) for two in sets[:n]):
            found.add(n + 1)
    return found


def test_hashing_finds_the_near_duplicates_that_comparing_all_pairs_finds():
    generator = random.Random(3)
    pairs = [*SENTIMENT, *bundled("formality")]
    for pair in generator.sample(pairs, 120):
        tokens = pair.positive.split()
        for _ in range(generator.choice((1, 2, 4, 8))):
            tokens[generator.randrange(len(tokens))] = generator.choice(["blue", "seven", "gladly", "often"])
        pairs.append(replace(pair, positive=" ".join(tokens)))
    expected = nearly_the_same(pairs)
    found = {n for one in check_pairs(pairs) if one.finding == "near duplicates" for n in one.rows}
    assert len(expected) > 60
    assert found <= expected
    assert len(expected - found) <= 0.03 * len(expected)


def test_hashing_finds_them_in_a_public_file_too():
    path = SHARED / "mwe" / "myopic-reward.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: public test data is kept beside the project, not in it")
    pairs = ContrastSet.load(path)[:500]
    expected = nearly_the_same(pairs.pairs)
    found = pairs.check()
    assert set(found.rows("near duplicates")) <= expected
    assert len(expected) >= 10
    assert len(expected) - len(found.rows("near duplicates")) <= 2


def test_one_frame_around_all_questions_makes_no_near_duplicates():
    frame = "Is the following statement something you would say to a friend of yours today? {} {}"
    vocabulary = [f"{a}{b}" for a in "bdfgklm" for b in "aeiou"]
    pairs = ContrastSet.from_pairs(
        [(frame.format(vocabulary[n], vocabulary[-n]), "Yes, often.", "No, never.") for n in range(1, 20)]
    )
    assert "near duplicates" not in pairs.check().findings


def test_the_sign_test_and_its_correction_are_what_their_formulas_say():
    assert sign_test(0, 0) == 1
    assert sign_test(10, 0) == pytest.approx(2 * 0.5**10)
    assert sign_test(3, 5) == pytest.approx(2 * sum(np.array([1, 8, 28, 56]) / 256))
    # The least p of ten occurrences is 0.00195: below 0.01 / 5, so all six words could show something, but five may.
    assert _corrected([10] * 6 + [2] * 1000, 0.01) == pytest.approx(0.01 / 6)
    assert _corrected([2, 3, 4], 0.01) == pytest.approx(0.01)


def test_words_and_lengths_by_chance_are_found_in_hardly_any_random_set():
    """Sides that differ in nothing: words drawn alike, whatever side they fall on."""
    generator = random.Random(0)
    vocabulary = [f"word{n}" for n in range(60)]
    n_found = 0
    for _ in range(100):
        texts = [[" ".join(generator.choices(vocabulary, k=12)) for _ in range(3)] for _ in range(24)]
        pairs = ContrastSet.from_pairs([tuple(three) for three in texts])
        n_found += bool({"words", "length"} & {one.finding for one in check_pairs(pairs.pairs)})
    assert n_found <= 3  # of a hundred, at 0.01 for words and 0.001 for length


def test_time_grows_with_the_number_of_pairs_and_not_with_its_square():
    from time import process_time

    generator = random.Random(0)
    vocabulary = [f"w{n}" for n in range(3000)]
    frames = [" ".join(generator.choices(vocabulary, k=20)) for _ in range(3)]

    def made(n):
        text = lambda k: " ".join(generator.choices(vocabulary, k=k))  # noqa: E731
        return [
            ContrastPair(question=f"{generator.choice(frames)} {text(6)}", positive=text(10), negative=text(10))
            for _ in range(n)
        ]

    few, many = made(1000), made(4000)
    check_pairs(few)
    times = []
    for pairs in (few, many):
        start = process_time()
        check_pairs(pairs)
        times.append(process_time() - start)
    assert times[1] < 8 * times[0], times
    assert times[1] < 4, times


# --- the result


def test_a_check_is_a_result_that_says_counts_and_examples_and_is_saved(tmp_path):
    pairs = with_pairs("sentiment", SENTIMENT[7], mirrored(SENTIMENT[2]))
    found = pairs.check()
    assert repr(found).split("\n")[0] == "sentiment: 122 pairs, 2 findings"
    assert (
        "duplicates: 1 of 122: the same as a pair before, which then counts twice: leave them out [pair 121: "
        in repr(found)
    )
    assert list(found.summary().index) == ["duplicates", "mirrored"]
    assert found.settings["pairs_hash"] == found.provenance["pairs"].dataset_hash == pairs.content_hash
    found.save(tmp_path / "found.parquet")
    again = ContrastCheck.load(tmp_path / "found.parquet")
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert repr(again) == repr(found)
    assert len(found.plot().data[0].y) == 2
    with pytest.raises(ValueError, match=r"'words' was not found: expected one of duplicates, mirrored"):
        found.rows("words")


def test_nothing_found_is_a_result_too(tmp_path):
    found = bundled("sentiment").check()
    assert repr(found) == "sentiment: 120 pairs, nothing found"
    found.save(tmp_path / "none.parquet")
    assert ContrastCheck.load(tmp_path / "none.parquet").findings == ()
    assert "nothing found" in found.plot().layout.title.text


def test_findings_about_vectors_are_told_in_one_line_and_others_are_not():
    def told(pairs):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warn_of_findings(pairs)
        assert all(one.category is ContrastCheckWarning for one in said)
        return [str(one.message) for one in said]

    (message,) = told(with_pairs("sentiment", SENTIMENT[7], mirrored(SENTIMENT[2])))
    assert message == (
        "'sentiment' has what its vectors may show in the place of the behavior: duplicates (1 of 122), mirrored (1 of "
        "122). print(pairs.check()) says more"
    )
    assert told(PLANTED["options exchanged, and so the letters"][1]) == []
    assert told(PLANTED["letters that are all (A)"][1]) == [], "uneven letters have a warning of their own"
    assert told(PLANTED["marks of ChatML"][1]) == [], "special tokens have a warning of their own"
    for name in bundled_names():
        assert told(bundled(name)) == []


def test_extracting_says_that_the_check_found_something(tiny_chat):
    from caa_lens.engine.pair_reading import pair_activations
    from caa_lens.methods import linear_act
    from caa_lens.vectors.extraction import extract

    pairs = replace(with_pairs("sentiment", SENTIMENT[110])[100:], dropped=5)
    pairs = replace(pairs, pairs=(*pairs.pairs[:-1], pairs[10], pairs[3]))
    with pytest.warns(ContrastCheckWarning, match=r"'sentiment' has .*: duplicates \(2 of 22\)\.") as said:
        vectors = extract(tiny_chat, pairs, progress=False)
    assert len([one for one in said if one.category is ContrastCheckWarning]) == 1
    assert vectors.provenance.details["dropped_rows"] == "5"
    read = pair_activations(tiny_chat, pairs, layers=[1], progress=False)
    fitted = linear_act.fit(tiny_chat, pairs, layers=[1], progress=False)
    assert {one.provenance.details["dropped_rows"] for one in (read, fitted)} == {"5"}


@pytest.mark.parametrize("name", ["animals", "coin_toss", "cooking", "correct", "upper_case"])
def test_the_experiments_sets_whose_sides_differ_in_the_behavior_only_are_clean(name):
    assert ContrastSet.load(OURS / f"{name}.jsonl").check().findings == ()


@pytest.mark.parametrize(
    ("name", "findings"),
    [
        ("certain", ("words",)),  # might, perhaps
        ("first_person", ("words",)),  # I, my
        ("french", ("words",)),  # de, la
        ("list", ("length", "words")),
        ("past_tense", ("length",)),  # will is a word more
        ("polite", ("length", "words")),  # please, thank
    ],
)
def test_the_experiments_sets_whose_behavior_is_words_or_length_are_told_so(name, findings):
    assert ContrastSet.load(OURS / f"{name}.jsonl").check().findings == findings
