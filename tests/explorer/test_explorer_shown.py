"""What is shown of a session: escaped, coloured by sign and size, and the lens with its verdict."""

import re

import pytest
from helpers.models import random_vectors

import caa_lens as cl
from caa_lens.explorer import Coloured, Finished, LensRead, Piece
from caa_lens.explorer.shown import end_html, legend_html, lens_html, piece_html, text_html, title_of

pytestmark = pytest.mark.one_kind
NASTY = '<img src=x onerror="alert(1)">&amp;'


def coloured(*tokens, bound=0.5):
    return Coloured(side="steered", layer=3, tokens=tokens, bound=bound)


def test_what_a_model_writes_never_becomes_an_element():
    for html in (piece_html(Piece(side="steered", text=NASTY)), text_html(coloured((NASTY, 0.1)))):
        assert "<img" not in html
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;amp;" in html


def test_a_token_is_blue_along_the_vector_and_red_against_it_and_full_at_the_bound():
    html = text_html(coloured(("a", 0.5), ("b", -0.25), ("c", 0.0), ("", 0.4), ("d", 9.0)))
    found = re.findall(r'<span style="background: rgba\(([\d, ]+), ([\d.]+)\)" title="([^"]+)">(\w)</span>', html)
    assert found == [
        ("59, 125, 216", "0.700", "+0.500", "a"),
        ("200, 69, 59", "0.350", "−0.250", "b"),
        ("200, 69, 59", "0.000", "+0.000", "c"),
        ("59, 125, 216", "0.700", "+9.000", "d"),
    ]
    assert html.count("<span") == 4
    legend = legend_html(coloured(("a", 0.5)))
    assert "+0.50" in legend
    assert "−0.50" in legend
    assert "layer 3" in legend


def test_a_text_that_was_cut_says_so():
    assert end_html(Finished(side="steered", why="end")) == ""
    assert "…" in end_html(Finished(side="steered", why="length"))
    assert "stopped" in end_html(Finished(side="steered", why="stopped"))
    assert title_of("steered", 14, -2) == "Steered: layer 14, times −2.0"
    assert title_of("unsteered", 14, -2) == "Unsteered"


def test_the_lens_shows_every_token_of_both_sides_and_what_the_controls_say(tiny_chat):
    vectors = random_vectors(tiny_chat)
    lens = cl.logit_lens(tiny_chat, vectors, layers=[2], k=4, reading="causal", controls=19, progress=False)
    html = lens_html(LensRead(layer=2, lens=lens))
    assert html.count("<tr>") == 8
    for score in lens.frame["score"]:
        assert f"{score:+.2f}".replace("-", "−") in html
    assert lens.by_layer()["verdict"][0] in html
    assert "19 random directions" in html
    assert "reading the lens of layer 2" in lens_html(LensRead(layer=2, lens=None))
    frame = lens.frame.assign(token=NASTY)
    plain = cl.interpretation.LogitLens(
        frame=frame, settings=lens.settings, provenance=lens.provenance, reading="causal"
    )
    assert "<img" not in lens_html(LensRead(layer=2, lens=plain))
