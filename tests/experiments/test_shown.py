"""What stands in the terminal and in a log: no number is cut, no table is dropped without a word."""

import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from caa_lens.contrast.files import PAPER_SETS
from caa_lens.report.page import Section
from caa_lens.report.runs import save_section
from experiments.paper.figure_5_open_ended import section as open_ended_section
from experiments.running.comparison import beside_the_paper
from experiments.running.experiment import Experiment
from experiments.running.figures import curves_by_metric
from experiments.running.run_folder import RunFolder
from experiments.running.runner import Outcome
from experiments.running.settings import RunConfig
from experiments.running.shown import LONGEST, show_outcome
from experiments.running.terminal import LOG_WIDTH, UnitProgress, make_console, show_table
from experiments.running.units import Unit

ONE = Experiment(
    name="one", title="", source="", units=lambda config: [], run=lambda *_: None, section=lambda *_: Section(title="")
)


def printed(width, show):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    show(console)
    return console.file.getvalue()


def shown_table(frame, width):
    return printed(width, lambda console: show_table("caption", frame, console))


def numbers_in(text):
    return re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", text)


def papers_cells(table):
    """Cells of ours for every cell of one of the paper's tables, some of them negative and all long."""
    from caa_lens.paper.numbers import published

    cells = published(table, "Llama-2-7b-chat-hf").drop(columns="value")
    values = np.random.default_rng(0).random((3, len(cells)))
    return cells.assign(mean=values[0] - 1, low=values[1] - 1, high=values[2])


# ---- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["ab", "system_prompt", "mmlu", "layer_transfer", "base_to_chat_transfer"])
@pytest.mark.parametrize("width", [80, 160])
def test_every_number_beside_the_papers_is_whole_at_80_columns(table, width):
    frame = beside_the_paper(papers_cells(table), table, RunConfig.of("meta-llama/Llama-2-7b-chat-hf"))
    text = shown_table(frame, width)
    assert len(frame) > 10
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    found = set(numbers_in(text))
    for column in ("ours", "paper", "difference", "95 % low", "95 % high"):
        assert {f"{value:.4g}" for value in frame[column]} <= found
    for behavior in frame["behavior"].unique():
        assert behavior.replace("-", "") in re.sub(r"[\s-]", "", text)


@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_numbers_of_any_frame_are_whole_at_any_width(width):
    rng = np.random.default_rng(width)
    for n_columns in range(1, 14):
        values = rng.standard_normal((4, n_columns)) * 10.0 ** rng.integers(-6, 7, size=n_columns)
        frame = pd.DataFrame(values, columns=[f"a number called {i}" for i in range(n_columns)])
        frame.insert(0, "text", ["one or two words", "alongwordwithoutaspace", "", "a-name-with-many-hyphens"])
        text = shown_table(frame, width)
        expected = {f"{value:.4g}".replace("+", "") for value in values.ravel()}
        assert expected <= set(numbers_in(text.replace("e+", "e"))), text
        assert "…" not in text
        assert len(text.strip().splitlines()) > 4


def test_text_is_folded_and_not_lost():
    words = [f"word{i}" for i in range(40)]
    text = shown_table(pd.DataFrame({"words": [" ".join(words), "few"], "n": [0.25, 123456.0]}), 80)
    assert set(words) <= set(text.split())
    assert "0.25" in text
    assert "1.235e+05" in text


def test_what_all_rows_share_is_said_once_in_the_caption():
    frame = pd.DataFrame({"layer": 13, "x": [1.5, 2.5, 3.5], "empty": ""})
    lines = shown_table(frame, 80).strip().splitlines()
    assert lines[0] == "caption (layer 13)"
    assert lines[1].split() == ["x", "empty"]
    assert "layer" in shown_table(frame[["layer", "x"]], 80).splitlines()[2]  # else a column would stand alone
    assert len([line for line in lines if "13" in line]) == 1


def test_a_log_is_wide_and_a_terminal_as_wide_as_it_is(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    assert make_console().width >= LOG_WIDTH >= 160
    monkeypatch.setenv("COLUMNS", "300")
    assert make_console().width == 300
    monkeypatch.setenv("COLUMNS", "80")
    assert make_console().width == LOG_WIDTH
    monkeypatch.setenv("FORCE_COLOR", "1")  # what a terminal is taken for
    assert make_console().width == 80


# ---- outcomes --------------------------------------------------------------------------------------------------


def shown_outcome(folder, **how):
    return printed(400, lambda console: show_outcome(Outcome(experiment=ONE, **how), folder, console))


def test_a_table_that_is_too_long_or_empty_is_named_and_told_where_to_find(tmp_path):
    folder = RunFolder(tmp_path)
    tables = [
        ("long one", pd.DataFrame({"n": range(LONGEST + 1)})),
        ("short one", pd.DataFrame({"n": range(LONGEST)})),
        ("empty one", pd.DataFrame({"n": []})),
        ("beside the paper's", pd.DataFrame({"n": []})),
    ]
    save_section(Section(title="", found=["found this"], tables=tables), folder.section_file("one"))
    text = shown_outcome(folder)
    assert "found this" in text
    line = next(line for line in text.splitlines() if line.startswith("long one"))
    assert f"{LONGEST + 1} rows" in line
    assert str(folder.section_file("one")) in line
    assert text.count("\n") < 2 * LONGEST  # of the two, only the short one
    assert f"\n{LONGEST - 1} " in text.replace("\n ", "\n")
    assert "empty one: no rows\n" in text
    assert "beside the paper's: no rows: the paper has none of these cells\n" in text


def test_a_traceback_is_named_where_there_is_one(tmp_path):
    folder = RunFolder(tmp_path)
    assert "error.txt" not in shown_outcome(folder, failed="needs vectors, which failed")
    text = shown_outcome(folder, failed="ValueError: x", traceback=tmp_path / "one" / "error.txt")
    assert f"traceback in {tmp_path / 'one' / 'error.txt'}" in text
    assert "skipped: no data" in shown_outcome(folder, skipped="no data")


# ---- progress --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_units", [3, 1234])
def test_the_line_of_progress_shows_both_times_at_80_columns(n_units):
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    units = [Unit.of(behavior="corrigible-neutral-HHH", what="separability", part=i) for i in range(n_units)]
    with UnitProgress(console, {("one", unit): 1.0 for unit in units}) as progress:
        progress.at(ONE, units[0])
        progress.done(ONE, units[0])
    lines = [re.sub(r"\x1b\[[0-9;?]*\w", "", line) for line in re.split(r"[\r\n]", console.file.getvalue())]
    last = [line for line in lines if "to go" in line][-1]
    assert len(last) <= 80
    assert re.search(rf"\d %, {n_units - 1} left, +\d:\d\d:\d\d +gone, +(\d+:\d\d:\d\d|-:--:--) +to go", last)
    assert "one behavior=c" in last


def test_a_log_has_a_line_for_every_experiment_that_is_finished():
    units = [Unit.of(part=i) for i in range(3)]
    other = replace(ONE, name="other")
    weights = {(one.name, unit): 1.0 for one in (ONE, other) for unit in units}
    console = Console(width=160, file=io.StringIO())
    with UnitProgress(console, weights) as progress:
        for one in (ONE, other):
            for unit in units:
                progress.at(one, unit)
                progress.done(one, unit)
                progress.done(one, unit)  # told twice, as by another process
    first, second, *_ = console.file.getvalue().splitlines()
    assert re.fullmatch(r"one is finished: 50 % of the run, 3 units left, .* gone, .* to go", first)
    assert re.fullmatch(r"other is finished: 100 % of the run, 0 units left, .* gone, .* to go", second)
    assert console.file.getvalue().count("is finished") == 2


# ---- captions and words ----------------------------------------------------------------------------------------


def test_differences_are_called_so_and_figures_of_two_metrics_are_told_apart():
    frame = pd.DataFrame(
        {"behavior": ["a", "b"], "metric": ["p_matching", "margin"], "layer": 1, "mean": 0.1, "low": 0.0, "high": 0.2}
    )
    levels = curves_by_metric(frame, x="layer", by="behavior", title="Score", label="layer")
    effects = curves_by_metric(frame, x="layer", by="behavior", title="Effect", label="layer", effect=True)
    assert [f.layout.yaxis.title.text for f in levels] == [
        "p(answer matching the behavior)",
        "log-probability margin (nats per token)",
    ]
    assert all(f.layout.yaxis.title.text.startswith("difference in ") for f in effects)
    titles = [f.layout.title.text for f in (*levels, *effects)]
    assert len(set(titles)) == 4


def test_answers_too_short_to_be_measured_are_told_in_words():
    rows = pd.DataFrame(
        {
            "prompt": 0,
            "question": "q",
            "answer": "No.",
            "sentiment": 0.0,
            "repetition": np.nan,
            "distinct_2": 1.0,
            "n_tokens": 2,
            "mean_logp": -1.0,
            "layer": 3,
        },
        index=[0],
    )
    frames = {
        Unit.of(behavior="a", multiplier=m): rows.assign(multiplier=m, behavior="a")
        for m in (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
    }
    (line,) = open_ended_section(frames, RunConfig.of("demo")).found
    assert "nan" not in line
    assert "repeated 4-grams nothing to count, nothing to count, nothing to count" in line
    assert "mean log-probability -1.00, -1.00, -1.00" in line


def test_sizes_stand_beside_the_papers_without_an_interval():
    from experiments.paper.table_14_data_tables import section

    sizes = pd.DataFrame({"behavior": PAPER_SETS, "split": "test", "pairs": 50})
    prompts = pd.DataFrame({"behavior": ["a"], "side": ["positive"], "system prompt": ["x"]})
    config = RunConfig.of("meta-llama/Llama-2-7b-chat-hf")
    made = section({Unit.of(table="sizes"): sizes, Unit.of(table="prompts"): prompts}, config)
    table = dict(made.tables)["Sizes beside the paper's"]
    assert list(table.columns) == ["behavior", "split", "ours", "paper", "difference"]
    assert (table["difference"] == 0).all()
