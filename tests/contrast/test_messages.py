"""A question may be messages: one value that compares, hashes, splits and is looked at as texts are."""

from dataclasses import FrozenInstanceError

import pytest

from caa_lens.contrast.errors import FieldError
from caa_lens.contrast.messages import Conversation, Message, as_question, followed_by, is_messages
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello (A) there."}]
OPTIONS = "Is it late?\n\nChoices:\n (A) Yes\n (B) No"


def asking(words, *, before=(SYSTEM, *FIRST)):
    return [*before, {"role": "user", "content": words}]


def test_messages_become_one_immutable_value_whatever_they_were_given_as():
    made = [
        as_question(asking("Why?")),
        as_question(tuple(asking("Why?"))),
        as_question([Message(**one) for one in asking("Why?")]),
        as_question([{"from": m["role"], "value": m["content"]} for m in asking("Why?")]),
        as_question([{**m, "role": m["role"].upper(), "weight": 1, "tool_calls": None} for m in asking("Why?")]),
        Conversation.of(asking("Why?")),
    ]
    assert len(set(made)) == 1
    assert made[0].to_list() == asking("Why?")
    assert as_question(made[0]) is made[0]
    with pytest.raises(FrozenInstanceError):
        made[0].messages = ()
    assert repr(made[0]) == f"Conversation.of({asking('Why?')!r})"


def test_what_the_caller_gave_is_not_changed_and_changing_it_later_changes_nothing():
    given = asking("Why?")
    pair = ContrastPair(question=given, positive="yes", negative="no")
    given[-1]["content"] = "Other?"
    given.append({"role": "assistant", "content": "x"})
    assert pair.question.last == "Why?"


def test_the_users_only_message_is_its_text_and_a_system_message_without_text_is_none():
    assert as_question([{"role": "user", "content": " Why? "}]) == " Why? "
    assert as_question([{"role": "system", "content": " "}, {"role": "user", "content": "Why?"}]) == "Why?"
    assert isinstance(as_question([SYSTEM, {"role": "user", "content": "Why?"}]), Conversation)


@pytest.mark.parametrize("wrong", [[], ["Why?"], "Why?", 3, None, {"role": "user", "content": "x"}, [SYSTEM, "Why?"]])
def test_only_lists_of_messages_are_messages(wrong):
    assert not is_messages(wrong)


def test_a_text_and_its_words_behind():
    assert followed_by("Why?", "Be rude.") == "Why? Be rude."
    assert followed_by(as_question(asking("Why?")), "Be rude.") == as_question(asking("Why? Be rude."))


def test_options_are_those_of_the_last_message():
    pair = ContrastPair(question=asking(OPTIONS), positive="(A)", negative="(B)")
    assert pair.is_ab
    assert pair.options == {"(A)": "Yes", "(B)": "No"}
    assert pair.stem.startswith("system: Be brief.\n\nuser: Hi.\n\nassistant: Hello (A) there.\n\nuser: Is it late?")
    assert pair.stem.endswith("(A) ")
    swapped = pair.swapped()
    assert swapped.question.to_list() == asking("Is it late?\n\nChoices:\n (A) No\n (B) Yes")
    assert (swapped.positive, swapped.negative) == ("(B)", "(A)")
    assert swapped.question.messages[:-1] == pair.question.messages[:-1]
    assert swapped.swapped() == pair
    with pytest.raises(FieldError, match="positive: found '\\(A\\)', expected a letter of the question's options"):
        ContrastPair(question=[*FIRST, {"role": "user", "content": "No options."}], positive="(A)", negative="(B)")
    earlier = [{"role": "user", "content": OPTIONS}, {"role": "assistant", "content": "(A)"}]
    with pytest.raises(FieldError, match="none: no line starts with"):
        ContrastPair(question=asking("Are you sure?", before=earlier), positive="(A)", negative="(B)")
    again = ContrastPair(
        question=asking(OPTIONS.replace("late", "far"), before=earlier), positive="(A)", negative="(B)"
    )
    assert again.options == {"(A)": "Yes", "(B)": "No"}


def test_hashes_tell_what_was_said_before_and_not_the_order_of_the_letters():
    one = ContrastSet.from_pairs([(asking(OPTIONS), "(A)", "(B)")])
    other = ContrastSet.from_pairs([(asking(OPTIONS, before=[SYSTEM]), "(A)", "(B)")])
    alone = ContrastSet.from_pairs([(OPTIONS, "(A)", "(B)")])
    as_text = ContrastSet.from_pairs([(str(one[0].question), "(A)", "(B)")])
    sets = (one, other, alone, as_text)
    assert len({some.content_hash for some in sets}) == len({some.pair_hashes for some in sets}) == 4
    swapped = ContrastSet.from_pairs([one[0].swapped()])
    assert swapped.pair_hashes == one.pair_hashes


def test_a_set_of_conversations_splits_balances_and_is_checked():
    pairs = ContrastSet(
        name="talks",
        pairs=tuple(
            ContrastPair(question=asking(OPTIONS.replace("late", f"late in {n}")), positive="(A)", negative="(B)")
            for n in [*range(8), 3]
        ),
    )
    train, test = pairs.split(test=3)
    assert sorted(map(repr, [*train, *test])) == sorted(map(repr, pairs))
    assert pairs.balance_letters().letter_counts == {"(A)": 5, "(B)": 4}
    found = pairs.check()
    assert found.rows("duplicates") == (9,)
    example = found.frame.set_index("finding").loc["duplicates", "examples"]
    assert example.startswith("pair 9: 'system: Be brief. user: Hi. assistant: Hello")


def test_special_tokens_and_labels_are_found_in_any_turn():
    said = [{"role": "user", "content": "Hi <|im_end|>"}, FIRST[1]]
    pairs = ContrastSet.from_pairs([(asking("Why?", before=said), "For a reason.", "For no reason.")])
    assert pairs.check().rows("special tokens") == (1,)


def test_pairs_that_vectors_come_from_are_known_again_in_conversations():
    from types import SimpleNamespace

    from caa_lens.measures.training_pairs import count_training_pairs
    from caa_lens.provenance import PAIR_HASHES

    train = ContrastSet.from_pairs([(asking(f"Why {n}?"), "yes", "no") for n in range(4)])
    test = ContrastSet.from_pairs([(asking(f"Why {n}?"), "yes", "no") for n in range(2, 6)])
    details = {PAIR_HASHES: " ".join(train.pair_hashes)}
    assert count_training_pairs(test, SimpleNamespace(provenance=SimpleNamespace(details=details))) == 2
