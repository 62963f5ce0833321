"""What a click on a sweep's figure shows: the same numbers as the sweep's, and nobody's scripts."""

import json
import re

import pandas as pd
import pytest
from helpers.browser import CHROMIUM, open_page
from helpers.driven_browser import DrivenBrowser

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.sweeps import Sweep
from caa_lens.provenance import Provenance
from caa_lens.report.cells import Cells, cells_of
from caa_lens.report.page import Section, write_report
from caa_lens.report.runs import load_section, save_section

EVIL = "</script><script>alert('x')</script><b>"
PAIRS = ContrastSet.from_pairs([("How?", "Well. " + EVIL, "Badly."), ("Why? " + EVIL, "For joy.", "For spite.")])
LAYERS, MULTIPLIERS = (3, 7), (-1.0, 0.0, 0.5)


def score(layer, multiplier, question):
    return layer / 100 + multiplier * (question + 1) / 10


def some_sweep(**settings):
    rows = [(layer, m, q, score(layer, m, q)) for layer in LAYERS for m in MULTIPLIERS for q in range(2)]
    frame = pd.DataFrame(rows, columns=["layer", "multiplier", "question", "margin"]).sample(frac=1, random_state=0)
    return Sweep(
        frame=frame.assign(behavior="b"),
        settings={"test": "b", "test_hash": PAIRS.content_hash, **settings},
        provenance={"vectors": Provenance(behavior="b", model="m")},
        metric="margin",
    )


WRITTEN = {(7, 0.5): [("Say it.", "It is so" + EVIL)], (9, 0.5): [("Say it.", "at a layer that was not swept")]}


def test_cells_hold_the_sweeps_scores_by_layer_multiplier_and_question():
    cells = cells_of(some_sweep(), PAIRS, WRITTEN)
    for i, layer in enumerate(LAYERS):
        for j, m in enumerate(MULTIPLIERS):
            assert cells.scores[i][j] == [score(layer, m, q) for q in range(2)]
    assert cells.questions[0] == ("How?", "Well. " + EVIL, "Badly.")
    assert list(cells.texts) == [(7, 0.5)]


def test_cells_of_other_pairs_are_refused():
    with pytest.raises(ValueError, match="give the pairs that were swept"):
        cells_of(some_sweep(), ContrastSet(name="x", pairs=PAIRS.pairs[::-1]))
    whole = cells_of(some_sweep(), PAIRS, WRITTEN)
    with pytest.raises(ValueError, match=r"scores are not of the shape \(1, 3, 2\)"):
        Cells(label="", layers=[3], multipliers=MULTIPLIERS, scores=whole.scores, questions=whole.questions)
    with pytest.raises(ValueError, match="no layer and multiplier of the scores"):
        Cells(label="", layers=[], multipliers=[], scores=[], questions=[], texts={(1, 1.0): []})


def test_cells_are_saved_with_a_section(tmp_path):
    cells = cells_of(some_sweep(), PAIRS, WRITTEN)
    section = load_section(save_section(Section(title="t", cells=cells), tmp_path / "section.json"))
    assert section.cells.plain() == cells.plain()
    assert load_section(save_section(Section(title="t"), tmp_path / "without.json")).cells is None


def write_page(tmp_path, *, scripts="", sweep=None):
    sweep = sweep or some_sweep()
    section = Section(title="s", figures=[sweep.plot(), sweep.plot_layer(7)], cells=cells_of(sweep, PAIRS, WRITTEN))
    path = write_report(tmp_path / "page.html", title="t", lead="l", sections=[section], settings={})
    html = path.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    path.write_text(html + scripts, encoding="utf-8")
    return path


CLICK = """<script>addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll(".js-plotly-plot")[%d].emit("plotly_click", { points: [%s] });
}, 500));</script>"""


def shown(document):
    """(heading, rows of the table, everything else) of the cell that is shown."""
    cell = re.search(r'<div class="cell" aria-live="polite">(.*?)<script|$', document, re.DOTALL)[1]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", cell)[1:]]
    return re.search(r"<h3>(.*?)</h3>", cell)[1], rows, cell


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("figure", "point"), [(0, '{ x: "0.5", y: "7" }'), (1, "{ x: 0.5, y: 0.12 }")])
def test_a_click_shows_the_questions_scores_and_texts_of_its_cell(tmp_path, figure, point):
    document, console = open_page(write_page(tmp_path, scripts=CLICK % (figure, point)), tmp_path)
    heading, rows, cell = shown(document)
    assert heading == "Layer 7, multiplier +0.5: mean 0.145 of 2 questions, unsteered 0.070"
    assert [row[0] for row in rows] == ["Why? &lt;/script&gt;&lt;script&gt;alert('x')&lt;/script&gt;&lt;b&gt;", "How?"]
    assert [row[3:] for row in rows] == [["0.170", "0.070", "+0.1"], ["0.120", "0.070", "+0.05"]]
    assert "<dt>Say it.</dt><dd>It is so&lt;/script&gt;" in cell
    assert console == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_cell_without_texts_says_where_they_were_written(tmp_path):
    document, _ = open_page(write_page(tmp_path, scripts=CLICK % (0, '{ x: "-1", y: "3" }')), tmp_path)
    heading, rows, cell = shown(document)
    assert heading.startswith("Layer 3, multiplier -1: mean -0.120 of 2 questions")
    assert [row[5] for row in rows] == ["-0.1", "-0.2"]
    assert "Texts were written at layer 7 only." in cell


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_no_word_of_an_answer_is_broken_on_a_phone(tmp_path):
    path = write_page(tmp_path)
    with DrivenBrowser(tmp_path) as page:
        page.size(390, 844, phone=True)
        page.open(path.as_uri())
        page.wait_for("document.querySelector('.js-plotly-plot .nsewdrag') !== null", 30)
        page.value("void document.querySelector('.js-plotly-plot').emit('plotly_click', {points: [{x: '-1', y: '3'}]})")
        page.wait_for("document.querySelector('.cell h3') !== null", 30)
        widths = page.value("[...document.querySelectorAll('.cell .answer')].map((one) => one.offsetWidth)")
        assert min(widths) >= 144
        assert page.value("document.documentElement.scrollWidth") == 390


def test_figures_say_what_their_points_stand_for():
    sweep = some_sweep()
    assert dict(sweep.plot().layout.meta["cells"]) == {"layer": "y", "multiplier": "x"}
    assert dict(sweep.plot_layer(3).layout.meta["cells"]) == {"layer": 3, "multiplier": "x"}


def test_the_page_has_the_numbers_once_a_section(tmp_path):
    html = write_page(tmp_path).read_text(encoding="utf-8")
    held = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert len(held) == 1
    assert json.loads(held[0]) == json.loads(json.dumps(cells_of(some_sweep(), PAIRS, WRITTEN).plain()))
