"""The judge in a run: real requests to a server with faults, what is left undone, and what is said of gaps."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.judge_server import judge_server, make_client_quick

from caa_lens.report.runs import load_section
from experiments.catalogue import EXPERIMENTS
from experiments.export import export
from experiments.paper import figure_5_judged as judged
from experiments.paper import figure_5_open_ended as open_ended
from experiments.running.behavior_sets import behavior_sets
from experiments.running.comparison import paper_tables
from experiments.running.context import Context
from experiments.running.identity import run_identity, run_notes
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run, with_needs
from experiments.running.settings import RunConfig
from experiments.running.units import Unfinished, Unit

ROOT = Path(__file__).resolve().parents[2]
TRANSIENT = "What a day? [[503:0 503:0 503:0 503:0 503:0 7]]"  # fails five times, all that one start tries
PROMPTS = [
    "Hm? [[6]]",
    TRANSIENT,
    "Say what you think of all these words that are none. [[words]]",
    "This one is refused for itself, as if it were too long for the judge's context. [[400]]",
]


@pytest.fixture(scope="module")
def server():
    with judge_server() as running:
        yield running


@pytest.fixture
def prompts(monkeypatch):
    behavior_sets.cache_clear()
    monkeypatch.setattr("caa_lens.contrast.sets.load_open_ended", lambda behavior: PROMPTS)
    yield
    behavior_sets.cache_clear()


def settings(models, url, **given):
    sizes = {"behaviors": ("sentiment",), "n_generate": 4, "n_test": 2, "n_prompts": 4, "max_new_tokens": 4, "layer": 1}
    return RunConfig.of(str(models / "chat"), judge="a judge", judge_url=url, **sizes | given)


@pytest.fixture(autouse=True)
def quick_client(monkeypatch):
    make_client_quick(monkeypatch)


def start(config, path):
    """Start the judge's experiment and what it needs; its outcome and its section."""
    folder = RunFolder(path)
    folder.claim(run_identity(config), run_notes([]))
    with torch.no_grad():
        outcomes = run(with_needs([judged.EXPERIMENT], EXPERIMENTS, config), config, folder)
    assert not any(outcome.failed for outcome in outcomes), outcomes
    file = folder.section_file("judged")
    return outcomes[-1], load_section(file) if file.exists() else None


def scores(config, path):
    frames = RunFolder(path).frames(judged.EXPERIMENT.name, judged.units(config))
    return pd.concat([frame[["prompt", "score", "raw", "error", "again"]] for frame in frames.values()])


def table(section, caption):
    return dict(section.captioned_tables())[caption]


def test_what_failed_is_asked_again_at_the_next_start_and_the_end_is_that_of_a_run_without_faults(
    models, server, prompts, tmp_path
):
    config, folder = settings(models, server.url), RunFolder(tmp_path / "run")
    outcome, section = start(config, folder.path)
    undone = [unit for unit in judged.units(config) if not folder.is_done("judged", unit)]
    assert undone
    assert outcome.unfinished.startswith(
        f"{len(undone)} of 7 units are left undone (the judge could not be asked about"
    )
    assert "start the same command again" in outcome.unfinished
    assert "Not complete: " in section.text
    # What there is shows, of undone units too: the one prompt that has a score.
    row = table(section, "Mean score (0 to 10), 95 % interval, number of answers").iloc[0]
    expected = {True: "6.00 (n=1)", False: "6.50 [6.00,\N{NO-BREAK SPACE}7.00] (n=2)"}
    assert list(row[1:]) == [expected[unit in undone] for unit in judged.units(config)]
    lost = table(section, "Answers without a score").iloc[0]
    assert lost["answers"] == 28
    assert lost["no score for good"] == 14  # words, and the one that is refused
    assert lost["to be asked again"] == len(undone)
    assert lost["scored"] == 14 - len(undone)
    assert lost["failure rate"] == f"{(14 + len(undone)) / 28:.1%}"

    export(folder.path, tmp_path / "small")
    kept = pd.read_parquet(tmp_path / "small" / "judged.parquet")
    assert (len(kept), int(kept["again"].sum())) == (28, len(undone))

    asked = server.asked("Hm?")
    again, whole = start(config, folder.path)
    assert again.unfinished == ""
    assert "Not complete" not in whole.text
    assert server.asked("Hm?") == asked  # only what was missing
    assert not list((folder.path / "judged" / "unfinished").glob("*"))

    _, undisturbed = start(config, tmp_path / "other")  # by now the server has no faults left
    pd.testing.assert_frame_equal(scores(config, folder.path), scores(config, tmp_path / "other"))
    assert whole.found == undisturbed.found
    for (caption, frame), (_, other) in zip(whole.captioned_tables(), undisturbed.captioned_tables(), strict=True):
        pd.testing.assert_frame_equal(frame, other, obj=caption)
    rows = scores(config, folder.path)
    assert list(rows[rows["prompt"] == 1]["score"]) == [7.0] * 7
    assert set(rows[rows["prompt"] == 2]["raw"]) == {"I would say it is rather high."}
    assert rows[rows["prompt"] == 2]["error"].str.startswith("the reply is no score").all()
    assert "400" in rows[rows["prompt"] == 3]["error"].iloc[0]


def test_a_judge_that_is_away_leaves_all_undone_in_words(models, prompts, tmp_path):
    config = settings(models, "http://127.0.0.1:9/v1")
    outcome, section = start(config, tmp_path / "run")
    assert outcome.unfinished.startswith(
        "7 of 7 units are left undone (the judge at http://127.0.0.1:9/v1 cannot be used"
    )
    assert section.found == ["sentiment: no answer has a score."]
    assert section.figures == []
    assert section.tables == []
    assert "0 of 0 answers have a score" in section.text


def test_the_options_reach_the_judge(models, monkeypatch, tmp_path):
    seen = {}

    def fake(items, rubric, **options):
        seen.update(options, rubric=rubric, columns=list(items))
        return SimpleNamespace(frame=items.assign(score=5.0, raw="5", attempts=1, error=""))

    monkeypatch.setattr("caa_lens.measures.open_ended.judging.judge_texts", fake)
    more = {"judge_settings": '{"max_tokens": null, "max_completion_tokens": 2000}', "judge_concurrency": 3}
    config = settings(models, "http://h:1/v1", **more, judge_rpm=30.0, judge_timeout=7.5)
    texts = pd.DataFrame({"prompt": [0], "question": ["q"], "answer": ["a"], "layer": [1]})
    unit = Unit.of(behavior="sentiment", multiplier=1.0)
    judged.judge_answers("judged", unit, texts, Context(config, RunFolder(tmp_path)))
    assert seen["settings"] == {"max_tokens": None, "max_completion_tokens": 2000}
    assert (seen["concurrency"], seen["requests_per_minute"], seen["timeout"]) == (3, 30.0, 7.5)
    assert (seen["base_url"], seen["model"], seen["rubric"]) == ("http://h:1/v1", "a judge", "sentiment")


def test_replies_of_two_endpoints_are_kept_apart(models, monkeypatch, tmp_path):
    paths = []

    def fake(items, rubric, *, path, **_):
        paths.append(path)
        return SimpleNamespace(frame=items.assign(score=5.0, raw="5", attempts=1, error=""))

    monkeypatch.setattr("caa_lens.measures.open_ended.judging.judge_texts", fake)
    texts = pd.DataFrame({"prompt": [0], "question": ["q"], "answer": ["a"], "layer": [1]})
    unit = Unit.of(behavior="sentiment", multiplier=1.0)
    for url in ("http://h:1/v1", "http://h:2/v1"):
        judged.judge_answers("judged", unit, texts, Context(settings(models, url), RunFolder(tmp_path)))
    assert paths[0] != paths[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"judge_url": None},
            r"judge is 'x' and judge_url is missing, expected both.*add --judge-url http://localhost",
        ),
        ({"judge": None}, r"got --judge-url and no judge.*add --judge NAME"),
        ({"judge": None, "judge_url": None, "judge_rpm": 3.0}, r"got --judge-rpm and no judge"),
        ({"judge_url": "h:8000"}, r"judge_url is 'h:8000', expected a URL such as 'http://localhost:8000/v1'"),
        ({"judge_concurrency": 0}, "judge_concurrency is 0, expected at least 1"),
        ({"judge_rpm": 0.0}, r"judge_rpm is 0\.0.*greater than 0"),
        ({"judge_timeout": -1.0}, r"judge_timeout is -1\.0.*greater than 0"),
        ({"judge_settings": "{"}, r"judge_settings is '\{', expected a JSON object"),
        ({"judge_settings": "[1]"}, r"expected a JSON object such as '\{"),
        ({"judge_settings": '{"n": 2}'}, "without n, which this package sets"),
    ],
)
def test_settings_of_a_judge_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.of("demo", **{"judge": "x", "judge_url": "http://h/v1"} | given)


def test_the_command_line_says_what_a_judge_needs(tmp_path):
    words = [sys.executable, "-m", "experiments", "judged", "--out", str(tmp_path / "run"), "--judge", "x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("error: judge is 'x' and judge_url is missing, expected both")
    assert not (tmp_path / "run").exists()


def test_the_same_settings_in_other_words_are_the_same():
    one, other = (
        RunConfig.of("demo", judge="x", judge_url="http://h/v1", judge_settings=text).judge_settings
        for text in ('{"b": 1,"a":null}', '{"a": null, "b": 1}')
    )
    assert one == other
    assert json.loads(one) == {"a": None, "b": 1}


# ---- what is computed from frames ------------------------------------------------------------------------------

CONFIG = RunConfig(model="m", behaviors=("sentiment", "refusal"), judge="j", judge_url="http://h/v1")


def frame(given):
    """One unit's frame of some scores; None: failed for good, "": to be asked again."""
    lacks = [not isinstance(score, float) for score in given]
    return pd.DataFrame(
        {
            "prompt": range(len(given)),
            "score": [np.nan if lack else score for score, lack in zip(given, lacks, strict=True)],
            "raw": "",
            "attempts": [5 if lack else 1 for lack in lacks],
            "error": ["no reply" if lack else "" for lack in lacks],
            "again": [score == "" for score in given],
            "layer": 1,
        }
    )


def frames(by_multiplier, behavior="sentiment"):
    return {Unit.of(behavior=behavior, multiplier=m): frame(given) for m, given in by_multiplier.items()}


def test_an_answer_without_a_score_costs_its_own_cell_only():
    section = judged.section(frames({-1.0: [1.0, 3.0], 0.0: [None, 4.0], 1.0: [5.0, 6.0]}), CONFIG)
    row = table(section, "Mean score (0 to 10), 95 % interval, number of answers").iloc[0]
    assert row["-1"] == "2.00 [1.00,\N{NO-BREAK SPACE}3.00] (n=2)"
    assert row["0"] == "4.00 (n=1)"
    assert row["+1"] == "5.50 [5.00,\N{NO-BREAK SPACE}6.00] (n=2)"
    assert "nan" not in str(row.to_dict())
    lost = table(section, "Answers without a score").iloc[0]
    assert (lost["answers"], lost["scored"], lost["failure rate"]) == (6, 5, "16.7%")


def test_one_prompt_has_means_and_no_intervals():
    section = judged.section(frames({-1.0: [1.0], 0.0: [4.0], 1.0: [5.0]}), CONFIG)
    row = table(section, "Mean score (0 to 10), 95 % interval, number of answers").iloc[0]
    assert list(row) == ["sentiment", *(f"{mean} (n=1)" for mean in ("1.00", "4.00", "5.00"))]
    assert "there are no intervals" in section.text
    assert "rises at every step" in section.found[0]


def test_nothing_is_said_of_the_papers_number_in_an_interval_that_is_none():
    config = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", "paper", judge="j", judge_url="http://h/v1")
    of_one, of_two = frames({-1.0: [1.0], 1.0: [4.0]}, "refusal"), frames({0.0: [4.0, 5.0]}, "refusal")
    cells = judged.cell_means(judged.rows_of({**of_one, **of_two}), ["behavior", "layer", "multiplier"])
    cells["layer"] = 13
    ((_, beside),) = paper_tables(cells, "open_ended", config)
    assert beside["paper"].notna().all()
    assert beside.set_index("multiplier").loc[-1.0, "paper within interval"] == ""
    assert beside.set_index("multiplier").loc[0.0, "paper within interval"] in ("yes", "no")


def test_a_behavior_without_any_score_is_named(models):
    scored, lost = frames({0.0: [4.0, 5.0], 1.0: [5.0, 7.0]}), frames({0.0: [None, None], 1.0: ["", None]}, "refusal")
    section = judged.section({**scored, **lost}, CONFIG)
    assert section.found[-1] == "refusal: no answer has a score."
    assert "Not complete: 1 answers are to be asked again" in section.text
    only_lost = judged.section(lost, CONFIG)
    assert only_lost.figures == []
    assert set(only_lost.found) == {"sentiment: no answer has a score.", "refusal: no answer has a score."}
    assert table(only_lost, "Answers without a score").iloc[0]["failure rate"] == "100.0%"


def test_a_time_out_is_asked_again_and_words_and_refusals_are_not():
    rows = pd.DataFrame(
        [
            (7.0, 1, ""),
            (np.nan, 5, "no reply within 60 s"),
            (np.nan, 5, "the reply is no score: 'hm'"),
            (np.nan, 1, "Error code: 400"),
        ],
        columns=["score", "attempts", "error"],
    )
    assert list(judged.ask_again(rows)) == [False, True, False, False]


def test_an_unfinished_unit_keeps_its_raw_replies(models, monkeypatch, tmp_path):
    def fake(items, rubric, **_):
        return SimpleNamespace(frame=items.assign(score=np.nan, raw="hm", attempts=5, error="the connection was cut"))

    monkeypatch.setattr("caa_lens.measures.open_ended.judging.judge_texts", fake)
    texts = pd.DataFrame({"prompt": [0], "question": ["q"], "answer": ["a"], "layer": [1]})
    with pytest.raises(Unfinished, match="about 1 of 1 answers: the connection was cut") as raised:
        judged.judge_answers(
            "judged",
            Unit.of(behavior="sentiment", multiplier=1.0),
            texts,
            Context(settings(models, "http://h:1/v1"), RunFolder(tmp_path)),
        )
    assert raised.value.frame[["raw", "attempts", "error"]].iloc[0].tolist() == ["hm", 5, "the connection was cut"]
    assert open_ended.EXPERIMENT.name in judged.EXPERIMENT.needs(CONFIG)
