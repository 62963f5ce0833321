"""Every figure: complete, in one palette, with enough contrast, and laid out so that no text is on another one.

The list of figures is complete: a new function of `plots/` that is not in `helpers.figures` fails here. Contrast is
computed by the formula of WCAG 2.2. Where texts stand is asked of a browser, on a wide page and on a phone's.
"""

import importlib
import inspect
import itertools
import json
import pkgutil
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from helpers.browser import CHROMIUM, browse
from helpers.contrast import between, contrast, linear
from helpers.figures import FIGURES

from caa_lens import plots
from caa_lens.plots import lens, style
from caa_lens.plots.style import COLOURS, DARK, DIVERGING, LIGHT, SEQUENTIAL, WIDEST, styled, wrapped

TEXT, GRAPHICS = 4.5, 3.0  # WCAG 2.2: 1.4.3 and 1.4.11
PAPERS = [theme.layout.paper_bgcolor for theme in (LIGHT, DARK)]
PHONE = style.NARROW

# Of a colour as people without one kind of cone see it, Machado et al. 2009, severity 1, of linear red, green, blue.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def cells_of(scale) -> list[str]:
    steps = itertools.pairwise(colour for _, colour in scale)
    return [between(one, other, part) for one, other in steps for part in np.linspace(0, 1, 20)]


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear red, green, blue, for distances as people see them."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ rgb / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def parts(tree: object, path: tuple[str, ...] = ()):
    """Every dictionary of a figure's JSON, with where it stands; templates aside."""
    if isinstance(tree, dict):
        yield path, tree
        for key, value in tree.items():
            if key != "template":
                yield from parts(value, (*path, key))
    elif isinstance(tree, list):
        for value in tree:
            yield from parts(value, path)


@pytest.fixture(scope="module")
def figures() -> dict[str, go.Figure]:
    return {name: draw() for name, draw in FIGURES.items()}


def test_every_function_of_plots_that_draws_a_figure_is_in_the_list():
    drawing = set()
    for module in pkgutil.iter_modules(plots.__path__):
        if module.name == "style":
            continue
        found = importlib.import_module(f"caa_lens.plots.{module.name}")
        for name, function in inspect.getmembers(found, inspect.isfunction):
            own = function.__module__ == found.__name__ and not name.startswith("_")
            if own and inspect.signature(function).return_annotation is go.Figure:
                drawing.add(name)
    assert len(drawing) > 20
    assert {name.split(" of ")[0] for name in FIGURES} == drawing


def test_text_of_every_figure_can_be_read_on_a_light_and_on_a_dark_background(figures):
    for theme in (LIGHT, DARK):
        assert contrast(theme.layout.font.color, theme.layout.paper_bgcolor) >= TEXT
    for name, figure in figures.items():
        assert figure.layout.template.layout.font.color == LIGHT.layout.font.color, name
        drawn = json.loads(figure.to_json())
        for path, part in parts(drawn):
            if path and path[-1].endswith("font") and "color" in part:
                assert path[-1] == "textfont", f"{name}: {path} has a colour of its own, which one theme may not fit"
        assert not re.search(r"<span[^>]*color", json.dumps(drawn)), name


def test_text_in_cells_can_be_read_on_every_colour_of_their_scale(figures):
    seen = 0
    for name, figure in figures.items():
        for trace in figure.data:
            if trace.type != "heatmap" or trace.texttemplate is None:
                continue
            scale = figure.layout.coloraxis.colorscale if trace.coloraxis else trace.colorscale
            for cell in cells_of(scale):
                assert contrast(trace.textfont.color, cell) >= TEXT, f"{name}: on {cell}"
            seen += 1
    assert seen >= 5


def test_lines_and_markers_stand_out_on_both_backgrounds(figures):
    seen = set(COLOURS)
    for figure in figures.values():
        for path, part in parts(json.loads(figure.to_json())):
            colour = part.get("color")
            if not (path and path[-1] in ("line", "marker", "error_x", "error_y")) or colour == style.CELL_INK:
                continue  # frames lie on cells, which are light
            seen |= set(colour) if isinstance(colour, list) else {colour} - {None}
    assert len(seen) > 5
    for colour, paper in itertools.product(seen, PAPERS):
        assert contrast(colour, paper) >= GRAPHICS, f"{colour} on {paper}"


def test_there_is_one_palette(figures):
    known = {*COLOURS, style.GREY, style.GRID, style.FAINT_BLUE, style.CELL_INK}
    scales = {json.dumps(scale) for scale in (DIVERGING, SEQUENTIAL)}
    for name, figure in figures.items():
        for path, part in parts(json.loads(figure.to_json())):
            for key in ("color", "fillcolor"):
                for colour in part[key] if isinstance(part.get(key), list) else [part.get(key)]:
                    faint = isinstance(colour, str) and colour.startswith("rgba")
                    assert colour is None or colour in known or faint, f"{name}: {path} is {colour}"
            if "colorscale" in part:
                assert json.dumps(part["colorscale"]) in scales, name


def test_the_first_three_colours_are_apart_for_colour_blind_readers():
    for matrix in BLIND.values():
        seen = [lab(np.clip(np.array(matrix) @ linear(colour), 0, 1)) for colour in (*COLOURS[:3], style.GREY)]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


def test_the_two_ends_of_a_scale_are_apart_for_colour_blind_readers():
    for matrix in BLIND.values():
        low, high = (lab(np.clip(np.array(matrix) @ linear(end), 0, 1)) for end in (style.NEGATIVE, style.POSITIVE))
        assert np.linalg.norm(low - high) > 50


def test_curves_of_like_colours_differ_in_dash_or_marker(figures):
    for name, figure in figures.items():
        looks = {}
        for trace in figure.data:
            if trace.type == "scatter" and trace.showlegend is not False and trace.mode and "lines" in trace.mode:
                look = trace.line.color, trace.line.dash, trace.marker.symbol, trace.fill
                assert looks.setdefault(look, trace.name) == trace.name, name


def test_no_figure_is_wider_than_a_notebooks_column(figures):
    for name, figure in figures.items():
        assert figure.layout.width is None, f"{name} does not fill its page"
        assert PHONE <= figure.layout.meta["min_width"] <= WIDEST, name


def test_titles_say_the_model(figures):
    without = {"finding_bars", "score_histogram"}  # of texts, whatever wrote them
    for name, figure in figures.items():
        said = re.sub(r"<br>|<[^>]+>", " ", figure.layout.title.text)
        assert "Llama-2-7b-chat-hf" in said or name.split(" of ")[0] in without, f"{name}: {said}"


def test_titles_are_broken_into_few_lines_of_like_length():
    text = "myopic-reward at layer 13: 15 of 60 questions move the wrong way"
    assert wrapped(text, 48) == ["myopic-reward at layer 13: 15 of", "60 questions move the wrong way"]
    assert wrapped("a/very-long-name-without-any-place-to-break-it-anywhere-at-all", 48)[0].startswith(
        "a/very-long-name"
    )
    assert wrapped("", 48) == []


def test_a_title_is_plain_text():
    drawn = styled(go.Figure(), title="<b> & more", subtitle="<i>", x="", y="")
    assert "&lt;b&gt; &amp; more" in drawn.layout.title.text
    assert "&lt;i&gt;" in drawn.layout.title.text


def test_of_one_question_no_interval_is_shown_or_claimed():
    import pandas as pd

    from caa_lens.plots.measures import dose_response, sweep_heatmap

    frame = pd.DataFrame({"layer": 3, "multiplier": [-1.0, 0.0, 1.0], "mean": [0.1, 0.2, 0.3]})
    frame = frame.assign(low=np.nan, high=np.nan)
    curve = dose_response(frame, 3, behavior="b", label="p", n_questions=1)
    map_ = sweep_heatmap(frame, behavior="b", test="", label="p", unsteered=0.2, n_questions=1)
    for figure in (curve, map_):
        assert "1 question" in figure.layout.meta["subtitle"]
        assert "95" not in figure.layout.title.text
        assert "nan" not in figure.to_json().lower().replace("nanosecond", "")


# Of all texts of a figure the corners, turned as they are; two texts overlap if no side of either parts them.
LAYOUT = """<script>
const corners = (text) => {
  const box = text.getBBox(), to = text.getScreenCTM();
  return [[0, 0], [1, 0], [1, 1], [0, 1]].map(([i, j]) => {
    const x = box.x + i * box.width, y = box.y + j * box.height;
    return [to.a * x + to.c * y + to.e, to.b * x + to.d * y + to.f];
  });
};
const parted = (one, other) => {
  for (const quad of [one, other]) for (let i = 0; i < 4; i++) {
    const [x, y] = quad[i], [u, v] = quad[(i + 1) % 4], n = [v - y, x - u], size = Math.hypot(...n) || 1;
    const on = (q) => q.map((p) => (p[0] * n[0] + p[1] * n[1]) / size);
    const a = on(one), b = on(other);
    if (Math.max(...a) < Math.min(...b) + 2 || Math.max(...b) < Math.min(...a) + 2) return true;  // pixels
  }
  return false;
};
setTimeout(() => {
  const wrong = [];
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const name = plot.parentNode.parentNode.id || plot.parentNode.id, page = plot.getBoundingClientRect();
    const texts = [...plot.querySelectorAll("svg text")].filter((t) => t.textContent.trim() && t.getBBox().width);
    const quads = texts.map(corners);
    if (!texts.length) wrong.push(name + ": no text");
    quads.forEach((quad, i) => {
      const outside = ([x, y]) => x < page.left || x > page.right || y < page.top || y > page.bottom;
      const out = quad.some(outside);
      if (out) wrong.push(name + ": " + texts[i].textContent + " leaves the figure");
      for (let j = i + 1; j < quads.length; j++)
        if (!parted(quad, quads[j])) wrong.push(name + ": " + texts[i].textContent + " on " + texts[j].textContent);
    });
  }
  document.body.setAttribute("data-wrong", JSON.stringify(wrong));
}, 2500);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which says where texts stand")
@pytest.mark.parametrize("width", [WIDEST, PHONE])
def test_no_text_is_on_another_one_or_leaves_its_figure(figures, width, tmp_path):
    from html import unescape

    from plotly.offline import get_plotlyjs

    page = f"<!doctype html><meta charset='utf-8'><script>{get_plotlyjs()}</script>"
    for name, figure in figures.items():
        of = max(width, figure.layout.meta["min_width"])  # a narrower page has it scroll
        drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
        page += f"<div id='{name}' style='width: {of}px'>{drawn}</div>"
    (tmp_path / "page.html").write_text(page + LAYOUT, encoding="utf-8")
    document, said, _ = browse(tmp_path / "page.html", tmp_path)
    assert not said
    wrong = json.loads(unescape(re.search(r'data-wrong="([^"]*)"', document)[1]))
    assert not wrong, "\n".join(wrong[:40])


def test_ranks_at_every_third_layer_are_joined_and_no_line_crosses_layers_that_were_left_out():
    layers = [2, 5, 8, 17, 20]
    frame = pd.DataFrame({"layer": layers, "word": "good", "token": "good", "pieces": 1, "rank": 3, "score": 1.0})
    figure = lens.rank_curves(frame, vectors="v", reading="normed", d_vocab=100)
    assert [list(trace.x) for trace in figure.data if trace.mode == "lines+markers"] == [[2, 5, 8], [17, 20]]
