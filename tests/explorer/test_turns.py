"""Turns of an explorer: the latest wish of a window counts, another window is told, a text stops in the middle."""

import asyncio
from dataclasses import replace

import pytest
from helpers.models import random_vectors

from caa_lens.explorer import Asked, Finished, LensRead, Piece, Session
from caa_lens.explorer.turns import REFUSED, Said, Turns

pytestmark = pytest.mark.one_kind
ASKED = Asked(prompt="How was your day?", layer=2, multiplier=3.0, max_new_tokens=30)


@pytest.fixture
def turns(tiny_chat):
    return Turns(Session(tiny_chat, random_vectors(tiny_chat, layers=[1, 2]), controls=0))


async def until(found):
    for _ in range(10_000):
        if found():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


def pieces(told):
    return [one for one in told if isinstance(one, Piece)]


def kinds(told):
    return [one.kind for one in told if isinstance(one, Said)]


def test_a_text_is_told_from_its_beginning_to_its_lens(turns):
    told = []

    async def scene():
        turns.ask("a", ASKED, told.append)
        await turns.done()

    asyncio.run(scene())
    assert kinds(told) == ["begun", "done"]
    assert told[0].kind == "begun"
    assert len(pieces(told)) == 60
    assert isinstance(told[-2], LensRead)


def test_the_event_loop_is_served_between_two_tokens_and_a_text_stops_in_the_middle(turns):
    told = []

    async def scene():
        turns.ask("a", ASKED, told.append)
        await until(lambda: len(pieces(told)) >= 6)
        turns.stop("b")  # somebody else's button
        await until(lambda: len(pieces(told)) >= 10)
        turns.stop("a")
        await turns.done()

    asyncio.run(scene())
    assert 10 <= len(pieces(told)) <= 13
    assert [one.why for one in told if isinstance(one, Finished)] == ["stopped", "stopped"]
    assert kinds(told) == ["begun", "done"]
    assert not [one for one in told if isinstance(one, LensRead)]


def test_of_several_wishes_of_one_window_only_the_latest_is_written_to_its_end(turns):
    told = {1: [], 2: [], 3: []}

    async def scene():
        turns.ask("a", ASKED, told[1].append)
        await until(lambda: len(pieces(told[1])) >= 4)
        turns.ask("a", replace(ASKED, layer=1), told[2].append)
        turns.ask("a", replace(ASKED, multiplier=-1), told[3].append)
        await turns.done()

    asyncio.run(scene())
    assert "stopped" in {one.why for one in told[1] if isinstance(one, Finished)}
    assert told[2] == []
    assert {one.why for one in told[3] if isinstance(one, Finished)} == {"length"}


def test_another_window_is_told_that_it_must_wait_and_writes_afterwards(turns):
    first, second = [], []

    async def scene():
        turns.ask("a", ASKED, first.append)
        await until(lambda: len(pieces(first)) >= 4)
        turns.ask("b", ASKED, second.append)
        assert second == [Said(kind="error", text=REFUSED)]
        await turns.done()
        turns.ask("b", ASKED, second.append)
        await turns.done()

    asyncio.run(scene())
    assert len(pieces(first)) == len(pieces(second)) == 60


def test_a_stop_before_the_first_token_writes_nothing(turns):
    told = []

    async def scene():
        turns.ask("a", ASKED, told.append)
        turns.stop("a")
        await turns.done()

    asyncio.run(scene())
    assert told == []


def test_what_cannot_be_written_is_told_in_words_and_the_next_text_is_written(turns):
    told = []

    async def scene():
        turns.ask("a", replace(ASKED, prompt=" "), told.append)
        await turns.done()
        assert [(one.kind, one.text) for one in told] == [
            ("begun", ""),
            ("error", "the prompt is empty: write a question"),
            ("done", ""),
        ]
        turns.ask("a", ASKED, told.append)
        await turns.done()

    asyncio.run(scene())
    assert len(pieces(told)) == 60


def test_a_warning_is_told_once(turns):
    told = []
    end = turns.session.model.tokenizer.eos_token

    async def scene():
        turns.ask("a", replace(ASKED, prompt=f"What is {end}?"), told.append)
        await turns.done()

    asyncio.run(scene())
    assert kinds(told) == ["begun", "note", "done"]
    assert end in told[1].text
