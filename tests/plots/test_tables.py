"""HTML tables: a chip a token, numbers for reading, and nothing that a model wrote is markup."""

import re

import pandas as pd
import pytest
from helpers.browser import CHROMIUM, browse

from caa_lens.plots.tables import chips, table

TOKENS = ("␣wonderful", "…reciation", "<b>", "\\n", "␣unbelievably", "&amp;")


def test_a_token_is_one_chip_that_no_line_break_parts():
    made = chips(TOKENS)
    assert made.count("<span") == len(TOKENS)
    assert all("white-space: pre;" in style for style in re.findall(r'style="([^"]*)"', made))
    assert ">&lt;b&gt;<" in made
    assert ">&amp;amp;<" in made


def test_a_table_has_its_index_first_rounds_numbers_and_leaves_out_nan():
    frame = pd.DataFrame({"token": [("a", "b"), ("c",)], "x": [0.123456, float("nan")]}, index=[3, 9])
    made = table(frame.rename_axis("layer"), caption="<i>")
    assert re.findall(r"<th [^>]*>(.*?)</th>", made) == ["layer", "token", "x", "3", "9"]
    assert ">0.1235<" in made
    assert "nan" not in made.lower()
    assert "&lt;i&gt;" in made


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which says where tokens stand")
def test_on_a_phone_every_chip_is_on_one_line_and_inside_the_page(tmp_path):
    page = tmp_path / "page.html"
    tell = """<script>
    const page = document.querySelector("div").getBoundingClientRect();
    const wrong = [...document.querySelectorAll("span")].filter((chip) => {
      const box = chip.getBoundingClientRect();
      return chip.getClientRects().length !== 1 || box.height > 30 || box.right > page.right + 1;
    });
    document.body.setAttribute("data-wrong", wrong.length + " of " + document.querySelectorAll("span").length);
    </script>"""
    frame = pd.DataFrame({"promoted": [TOKENS * 2] * 3, "suppressed": [TOKENS * 2] * 3})
    shown = table(frame) + chips(["=" * 200])
    text = f"<!doctype html><meta charset='utf-8'><div style='width: 390px'>{shown}</div>{tell}"
    page.write_text(text, encoding="utf-8")
    document, said, _ = browse(page, tmp_path)
    assert not said
    assert 'data-wrong="0 of 73"' in document
