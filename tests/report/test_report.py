"""The HTML page: complete, self-contained, quiet, and safe against what models write."""

import itertools
import json
import re
from html import unescape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from helpers.browser import CHROMIUM, DARK, browse
from helpers.contrast import between, contrast
from helpers.figures import FIGURES
from typer.testing import CliRunner

from caa_lens.measures.elsewhere.neutral_text import OF_TEXT
from caa_lens.methods.compared import Choice, Comparison
from caa_lens.methods.costs import Cost
from caa_lens.plots import token_background
from caa_lens.plots.style import DARK_INK, DARK_PAPER, LIGHT_INK, LIGHT_PAPER
from caa_lens.report import page as page_module
from caa_lens.report.comparisons import comparison_section, differences
from caa_lens.report.page import ColoredText, Section, write_report
from caa_lens.report.runs import RunFolderError, load_section, read_run, save_section, write_run_report

EVIL = "<script>alert('x')</script> & </td>"


def section(title: str = "one") -> Section:
    """Every kind of content, all of it hostile."""
    return Section(
        title=title,
        source=EVIL,
        text=EVIL,
        found=[EVIL],
        figures=[go.Figure(go.Scatter(x=[1, 2], y=[2, 3], name=EVIL), layout={"title": {"text": "a &lt;b&gt; title"}})],
        tokens=[ColoredText(caption=EVIL, tokens=[(EVIL, 0.5), (" fine", -1.0)], bound=1.0)],
        texts=[(EVIL, [("+1", EVIL), ("-1", "</dd>")])],
        tables=[(EVIL, pd.DataFrame({EVIL: [EVIL, 0.123456]})), pd.DataFrame({"n": [1]})],
    )


def page(tmp_path) -> str:
    path = write_report(
        tmp_path / "report.html", title=EVIL, lead="lead", sections=[section()], settings={"model": EVIL}
    )
    return path.read_text(encoding="utf-8")


def make_run(folder, **about):
    """A run folder as an experiment's runner leaves it."""
    folder.mkdir()
    made = {"config": {"model": EVIL, "behaviors": ["a", "b"]}, "versions": {"torch": "2"}, "about": about}
    (folder / "run.json").write_text(json.dumps(made))
    save_section(section("second"), folder / "b" / "section.json")
    save_section(section("first"), folder / "z" / "section.json")
    save_section(Section(title="third", skipped=EVIL), folder / "c" / "section.json")
    return folder


def test_text_from_models_and_data_is_escaped_everywhere(tmp_path):
    html = page(tmp_path)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert") >= 11  # every place of `section`, the figure's own script apart


def test_the_page_asks_the_network_for_nothing(tmp_path):
    html = page(tmp_path)
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src=", html)
    assert not re.findall(r"<link[^>]+href=[\"'](?!data:)", html)


def test_the_plotly_script_is_put_in_once_and_figures_use_it(tmp_path):
    html = page(tmp_path)
    assert html.count("Plotly.newPlot(") >= 1
    assert len(html) < 8_000_000


def test_a_figures_title_stands_in_the_page_where_it_can_wrap(tmp_path):
    html = page(tmp_path)
    assert ">a &lt;b&gt; title</p>" in html
    assert '"title":{"text":"a ' not in html


def test_numbers_in_tables_are_rounded_for_reading(tmp_path):
    assert "<td>0.1235</td>" in page(tmp_path)


def test_colours_have_the_sign_and_the_share_of_the_bound(tmp_path):
    assert 'style="background: rgba(59, 125, 216, 0.35)" title="0.5"' in page(tmp_path)
    assert 'style="background: rgba(200, 69, 59, 0.70)" title="-1.0"> fine<' in page(tmp_path)
    with pytest.raises(ValueError, match="bound must be positive"):
        ColoredText(caption="", tokens=[], bound=0.0)


def test_a_list_of_tokens_in_a_table_is_a_chip_each(tmp_path):
    table = pd.DataFrame({"layer": [3], "promoted": [("<b>", "…reciation")]})
    path = write_report(
        tmp_path / "r.html", title="t", lead="", sections=[Section(title="s", tables=[table])], settings={}
    )
    html = path.read_text(encoding="utf-8")
    assert '<span class="chip">&lt;b&gt;</span> <span class="chip">…reciation</span>' in html
    back = load_section(save_section(Section(title="s", tables=[table]), tmp_path / "s.json"))
    path = write_report(tmp_path / "r2.html", title="t", lead="", sections=[back], settings={})
    assert '<span class="chip">…reciation</span>' in path.read_text(encoding="utf-8")


def test_a_figures_title_and_subtitle_stand_in_the_page_and_the_figure_gives_their_place_back(tmp_path):
    figure = FIGURES["dose_response"]()
    html = write_report(
        tmp_path / "r.html", title="t", lead="", sections=[Section(title="s", figures=[figure])], settings={}
    ).read_text(encoding="utf-8")
    assert "myopic-reward at layer 13</p>" in html
    assert "mean of 50 questions, 95 % interval</p>" in html
    taken = figure.layout.meta["title_height"]
    assert f'"height":{figure.layout.height - taken}' in html
    assert figure.layout.title.text  # the figure itself is as it was


def test_a_figure_that_a_phone_has_no_room_for_scrolls_and_others_do_not(tmp_path):
    figures = [FIGURES["token_heatmaps"](), FIGURES["dose_response"]()]
    html = write_report(
        tmp_path / "r.html", title="t", lead="", sections=[Section(title="s", figures=figures)], settings={}
    ).read_text(encoding="utf-8")
    assert html.count('style="min-width: 840px"') == 1
    assert html.count('<div class="figure"') == 2


PLACES = """<script>
setTimeout(() => {
  const told = [...document.querySelectorAll(".js-plotly-plot")].map((plot) => {
    const box = plot.getBoundingClientRect(), page = document.body.getBoundingClientRect();
    const texts = [...plot.querySelectorAll("svg text")].filter((t) => !t.closest(".heatmaplayer, .hm"));
    const inks = new Set(texts.map((text) => getComputedStyle(text).fill));
    return { ink: [...inks], paper: getComputedStyle(plot.querySelector(".main-svg")).backgroundColor,
             fits: box.width <= page.width };
  });
  document.body.setAttribute("data-told", JSON.stringify(told));
}, 2500);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which has a dark theme")
@pytest.mark.parametrize(("flags", "ink", "paper"), [((), LIGHT_INK, LIGHT_PAPER), ((DARK,), DARK_INK, DARK_PAPER)])
def test_figures_have_the_theme_of_the_page_around_them(tmp_path, flags, ink, paper):
    old = go.Figure(go.Scatter(x=[1, 2], y=[2, 3]))  # as sections were kept before figures had themes
    old.update_layout(font={"color": "#808080"}, paper_bgcolor="rgba(0,0,0,0)", title={"text": "old"})
    sections = [Section(title="s", figures=[FIGURES["dose_response"](), FIGURES["agreement_curves"](), old])]
    path = write_report(tmp_path / "r.html", title="t", lead="", sections=sections, settings={})
    path.write_text(path.read_text(encoding="utf-8") + PLACES, encoding="utf-8")
    document, said, requests = browse(path, tmp_path, *flags)
    assert not said
    assert not requests
    told = json.loads(unescape(re.search(r'data-told="([^"]*)"', document)[1]))
    assert len(told) == 3

    def as_css(colour: str) -> str:
        return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"

    for one in told:
        assert one["ink"] == [as_css(ink)]
        assert one["paper"] == as_css(paper)
        assert one["fits"]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_pages_own_colours_can_be_read(theme):
    css = (Path(page_module.__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]))
    assert len(colours) == 6
    for ink, paper in itertools.product(("ink", "soft", "accent"), ("page", "card")):
        assert contrast(colours[ink], colours[paper]) >= 4.5, f"{ink} on {paper}"
    for full in (token_background.ALONG, token_background.AGAINST):  # text on the strongest colour of a token
        strongest = "#" + "".join(f"{int(part):02x}" for part in full.split(", "))
        assert contrast(colours["ink"], between(colours["page"], strongest, token_background.FULLEST)) >= 4.5


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    page(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        page(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_section_comes_back_from_its_file_as_it_was(tmp_path):
    before = section()
    after = load_section(save_section(before, tmp_path / "section.json"))
    for name in ("title", "source", "text", "skipped", "found"):
        assert getattr(after, name) == getattr(before, name)
    assert after.texts == before.texts
    assert after.tokens == before.tokens
    assert [json.loads(f.to_json()) for f in after.figures] == [json.loads(f.to_json()) for f in before.figures]
    for (caption, table), (caption_before, table_before) in zip(
        after.captioned_tables(), before.captioned_tables(), strict=True
    ):
        assert caption == caption_before
        pd.testing.assert_frame_equal(table, table_before)


def test_equal_sections_make_equal_files(tmp_path):
    one, two = (save_section(section(), tmp_path / name).read_bytes() for name in ("a.json", "b.json"))
    assert one == two


def test_a_run_is_reported_in_its_own_order_with_what_was_not_run(tmp_path):
    run = make_run(tmp_path / "run", experiments=["z", "b", "c"], commit="abc")
    assert [one.title for one in read_run(run).sections] == ["first", "second", "third"]
    html = write_run_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert html.index(">first<") < html.index(">second<") < html.index("Not run")
    assert "<td>a, b</td>" in html
    assert "abc" in html
    assert "@inproceedings" in html


def test_a_runs_report_has_the_devices_and_commands_of_all_starts_each_once(tmp_path):
    run = make_run(tmp_path / "run", experiments=["z"])
    assert not {"device", "command"} & set(read_run(run).settings), "of a run from before they were noted"
    starts = [
        {"device": "cpu (x86_64)", "command": each} for each in ("python -m one", "python -m two", "python -m one")
    ]
    (run / "starts.json").write_text(json.dumps([{"began": "long ago"}, *starts, {"device": None, "command": None}]))
    settings = read_run(run).settings
    assert settings["device"] == "cpu (x86_64)"
    assert settings["command"] == "python -m one; python -m two"
    html = write_run_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "python -m one; python -m two" in html


def test_what_is_not_known_is_an_empty_cell(tmp_path):
    table = pd.DataFrame({"layer": [20], "effect": pd.Series([None], dtype=object)})
    path = write_report(
        tmp_path / "page.html", title="t", lead="l", sections=[Section(title="s", tables=[table])], settings={}
    )
    assert "None" not in re.findall(r"<table>.*?</table>", path.read_text(encoding="utf-8"), re.DOTALL)[0]


def test_what_failed_or_was_not_finished_is_listed_with_the_reason(tmp_path):
    run = make_run(tmp_path / "run", experiments=["z", "broken", "half", "never", "c"])
    for name in ("broken", "half", "c", "z", "old"):
        (run / name / "units").mkdir(parents=True)
    (run / "broken" / "error.txt").write_text(f"ValueError: {EVIL}\n\nTraceback (most recent call last):\n  File")
    (run / "old" / "error.txt").write_text("Traceback (most recent call last):\n  File\nKeyError: 3\n")
    (run / "c" / "error.txt").write_text("needs broken, which failed\n")  # was skipped by the run before
    (run / "z" / "error.txt").write_text("ValueError: of some earlier start\n")  # has its section all the same
    part = read_run(run)
    assert {one.title: one.skipped for one in part.sections} == {
        "first": "",
        "broken": f"failed: ValueError: {EVIL}",
        "half": "not finished: start the same command again",
        "never": "not begun, or not asked for",
        "third": "failed: needs broken, which failed",
        "second": "",
        "old": "failed: KeyError: 3",
    }
    html = write_run_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    not_run = html[html.index(">Not run<") :]
    assert "<script>alert" not in html
    for reason in ("failed: ValueError: &lt;script&gt;", "not finished: start", "KeyError: 3", "not begun"):
        assert reason in not_run
    assert "of some earlier start" not in html


def test_several_runs_stand_below_each_other_with_their_settings(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    html = write_run_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count('class="settings"') == 2
    assert html.count('<h2 class="part">') == 2
    assert len(set(re.findall(r'<section id="([^"]+)"', html))) == len(re.findall(r"<section id=", html))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no run"),
        (lambda run: (run / "run.json").write_text("{"), "holds no run"),
        (lambda run: [file.unlink() for file in run.glob("*/section.json")], "is finished"),
        (lambda run: (run / "b" / "section.json").write_text("{"), "not a readable section"),
        (lambda run: (run / "b" / "section.json").write_text('{"caa_lens_section": 99}'), "reads up to 1: update"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_refused_and_nothing_is_written(tmp_path, spoil, message):
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(RunFolderError, match=message):
        write_run_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_the_page_and_says_where(tmp_path):
    import typer

    from caa_lens.cli.commands import report

    app = typer.Typer()
    app.command()(report)
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, [str(make_run(tmp_path / "run")), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out.resolve()) in done.output.replace("\n", "")
    assert out.exists()
    with pytest.raises(ValueError, match=r"written as \.html"):
        report([tmp_path / "run"], out=tmp_path / "page.pdf")


# ---- in a browser ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, e.g. the Debian package chromium")
def test_a_browser_draws_every_figure_in_silence_and_asks_the_network_for_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    dom, console, requests = browse(write_run_report([run], tmp_path / "report.html"), tmp_path)
    assert console == []
    assert requests == []
    assert dom.count('class="main-svg"') >= 2
    assert len(re.findall(r'class="plotly-graph-div js-plotly-plot"', dom)) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, e.g. the Debian package chromium")
def test_the_browser_check_sees_errors_and_requests(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://example.com/x.png"><script>nothing.here()</script>')
    _, console, requests = browse(bad, tmp_path)
    assert any("nothing is not defined" in line for line in console)
    assert any("example.com" in name for name in requests)


# ---- comparisons of methods ------------------------------------------------------------------------------------------


def made_up_comparison():
    """Here "better" does 0.5 more than CAA on both sides at all divergences; "short" ends at 0.06 nats."""
    rows = []
    for name, more, kls in (("CAA", 0.0, (0.05, 0.4)), ("better", 0.5, (0.05, 0.4)), ("short", 0.0, (0.02, 0.06))):
        for sign in (1, -1):
            for size, kl in zip((1.0, 2.0), kls, strict=True):
                for question in range(8):
                    effect = sign * (size + more) + 0.1 * question
                    rows.append(
                        {
                            "method": name,
                            "setting": 3,
                            "layers": "3",
                            "positions": "caa",
                            "site": "hook_resid_post",
                            "strength": sign * size,
                            "question": question,
                            "score": effect,
                            "effect": effect,
                            "kl_mean": kl,
                            "kl_p95": 3 * kl,
                            "behavior": EVIL,
                            **dict.fromkeys(OF_TEXT, 0.25),
                        }
                    )
    choices = tuple(
        Choice(method=name, setting=3, unit="layer", value=1.0, tried=((3, 1.0), (5, 0.5)), up=2.0, down=-1.0)
        for name in ("CAA", "better", "short")
    )
    cost = Cost(
        method="CAA", forward=8, backward=0, seconds=1.0, numbers=32, coordinates=1.0, tokens=0.5, shares_prefix=True
    )
    frame = pd.DataFrame(rows)
    return Comparison(frame=frame, choices=choices, costs=(cost,), metric="margin", n_neutral=24)


def test_a_comparison_says_which_methods_are_told_apart_and_which_end_before():
    first, _, last = differences(made_up_comparison())
    # At 0.05 nats CAA is at its weakest strength, and "short" nearly at its strongest.
    assert first == (
        "At 0.05 nats, against CAA, question by question: more from better (+), better (-), short (+), short (-); less "
        "from none; 0 not told apart, 0 without a comparison, as one of the two ends before."
    )
    assert "more from better (+), better (-)" in last
    assert "2 without a comparison, as one of the two ends before" in last


def test_a_comparisons_section_has_its_figure_tables_and_marks_and_its_page_is_safe(tmp_path):
    found = comparison_section(made_up_comparison())
    assert len(found.figures) == 1
    captions = [caption for caption, _ in found.captioned_tables()]
    assert captions[0] == "Effect at the same divergence; where a method ends before, its end"
    assert [caption.split(",")[0] for caption in captions[1:]] == [
        "At the strengths that the validation part chose",
        "What was chosen",
        "Costs",
    ]
    matched, chosen, choices, costs = (table for _, table in found.captioned_tables())
    assert "ends at 0.06" in matched.set_index(["method", "sign"]).loc[("short", "+"), "KL 0.3"]
    assert sorted(set(chosen["strength"])) == [-1.0, 2.0]
    assert choices["scores on the validation part"].iloc[0] == "3: 1.000, 5: 0.500"
    assert costs["forward"].tolist() == [8]
    page = write_report(tmp_path / "c.html", title="t", lead="l", sections=[found], settings={})
    html = page.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "on 24 neutral prompts" in html
    assert load_section(save_section(found, tmp_path / "section.json")).found == found.found


def test_a_run_on_the_demo_model_says_which_model_that_is(tmp_path):
    folder = make_run(tmp_path / "run")
    made = json.loads((folder / "run.json").read_text())
    made["config"]["model"] = "demo"
    (folder / "run.json").write_text(json.dumps(made))
    html = write_run_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Contrastive Activation Addition on SmolLM2-135M-Instruct-4bit</title>" in html
    assert "<td>SmolLM2-135M-Instruct-4bit</td>" in html
