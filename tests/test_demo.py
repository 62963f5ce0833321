"""The demo run on a small model: every file, reuse, and refusals."""

import json
import shutil
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers.models import load_in_its_place
from rich.console import Console

from caa_lens.contrast.sets import ContrastSet
from caa_lens.demo.duration import Duration, about
from caa_lens.demo.found import Found
from caa_lens.demo.made_with import command_of
from caa_lens.demo.main_job import DemoConfig, run_demo
from caa_lens.demo.on_screen import depth_told
from caa_lens.measures.agreement.reliabilities import Reliability
from caa_lens.measures.calibrating.calibrated import Calibration
from caa_lens.measures.elsewhere.capability import easy_questions
from caa_lens.measures.elsewhere.unwanted_changes import SideEffects
from caa_lens.report.trust import FLATTERED, agreement_told, side_effects_told, slopes_told, told_layers
from caa_lens.vectors.steering_vectors import SteeringVectors

pytestmark = pytest.mark.one_kind

SMALL = DemoConfig(n_test=8, layers=(1, 3), prompts=("Describe a walk in the park.",), max_new_tokens=4)


@pytest.fixture
def small_run(tmp_path, tiny_chat, monkeypatch):
    """Run the demo with the small random model in place of the real one; returns (folder, run)."""
    load_in_its_place(monkeypatch, lambda *args, **kwargs: tiny_chat)
    for name, few in {"N_NEUTRAL": 8, "N_RANDOM": 1, "NEUTRAL_TOKENS": 3, "LENS_QUESTIONS": 2}.items():
        monkeypatch.setattr(f"caa_lens.demo.main_job.{name}", few)
    easy = easy_questions()[:8]
    monkeypatch.setattr("caa_lens.measures.elsewhere.capability.easy_questions", lambda: easy)

    def run(config=SMALL):
        console = Console(record=True, width=400)
        report = run_demo(config, tmp_path / "run", console)
        return report, console.export_text()

    return tmp_path / "run", run


@pytest.mark.both_versions
def test_a_run_writes_every_file_and_says_which_to_open(small_run):
    folder, run = small_run
    report, shown = run()
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.json",
        "calibration.parquet",
        "calibration.safetensors",
        "config.json",
        "lens.json",
        "lens.parquet",
        "made_from.json",
        "reliability.json",
        "reliability.parquet",
        "reliability.safetensors",
        "report.html",
        "side_effects.json",
        "side_effects.parquet",
        "texts.json",
        "vectors.safetensors",
    ]
    assert shown.strip().splitlines()[-1] == f"Open this file: {report.resolve()}"
    assert len(SteeringVectors.load(folder / "vectors.safetensors")) == 5
    calibration = Calibration.load(folder / "calibration.parquet")
    assert calibration.logp_positive.shape == (2, 5, 8)
    texts = json.loads((folder / "texts.json").read_text())
    assert list(texts["Describe a walk in the park."]) == ["-2", "-1", "+0", "+1", "+2"]
    html = report.read_text(encoding="utf-8")
    assert html.count("Plotly.newPlot(") >= 2
    for answer in (each["text"] for each in texts["Describe a walk in the park."].values()):
        assert answer[:10].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")[:5] in html or "'" in answer


def test_a_second_run_reuses_what_is_there(small_run, monkeypatch):
    folder, run = small_run
    run()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.html"}
    for name in (
        *("vectors.extraction.extract", "measures.agreement.reliabilities.reliability", "steering.generation.generate"),
        *("measures.calibrating.calibration.calibrate", "measures.elsewhere.unwanted_changes.side_effects"),
    ):
        monkeypatch.setattr(f"caa_lens.{name}", lambda *a, name=name, **k: pytest.fail(f"{name} ran again"))
    _, shown = run()
    assert shown.count("reusing") == 6
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.html"} == before


def test_an_interrupted_run_goes_on_where_it_stopped(small_run, monkeypatch):
    folder, run = small_run
    with monkeypatch.context() as patch:
        patch.setattr(
            "caa_lens.measures.calibrating.calibration.calibrate",
            lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            run()
    vectors = (folder / "vectors.safetensors").read_bytes()
    monkeypatch.setattr("caa_lens.vectors.extraction.extract", lambda *a, **k: pytest.fail("extracted again"))
    run()
    assert (folder / "vectors.safetensors").read_bytes() == vectors


def keys(folder):
    return json.loads((folder / "made_from.json").read_text())


def rows(folder):
    return (folder / "calibration.parquet").read_bytes(), json.loads((folder / "texts.json").read_text())


@pytest.fixture
def own_pairs(tmp_path):
    """A file of pairs, and settings of a run on it."""
    file = tmp_path / "mine.jsonl"
    ContrastSet.load("sentiment").sample(18, seed=0).save(file)
    return file, SMALL.model_copy(update={"behavior": str(file), "n_test": 8})


def edit(file, config, *, of_test):
    """Put another answer into one pair of the file, which is in the test set or is not."""
    test = ContrastSet.load(config.behavior).split(test=config.n_test, seed=config.seed)[1]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    at = next(i for i, pair in enumerate(ContrastSet.load(file)) if (pair in test.pairs) == of_test)
    key = next(key for key, value in lines[at].items() if value == ContrastSet.load(file).pairs[at].positive)
    lines[at][key] = "Quite another answer, about boats and the sea."
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_after_an_edit_of_one_training_pair_nothing_is_of_the_old_vectors(small_run, own_pairs, tmp_path):
    folder, run = small_run
    file, config = own_pairs
    run(config)
    old = SteeringVectors.load(folder / "vectors.safetensors")
    edit(file, config, of_test=False)
    _, shown = run(config)
    assert "reusing" not in shown
    assert shown.count("as it was made from other things than now (pairs)") == 2  # vectors, and what the pairs agree on
    assert shown.count("as it was made from other things than now (vectors)") >= 1
    new = SteeringVectors.load(folder / "vectors.safetensors")
    assert not torch.equal(new.directions, old.directions)
    mixed = rows(folder), keys(folder)
    shutil.rmtree(folder)
    run(config)  # from nothing, on the edited data
    assert (rows(folder), keys(folder)) == mixed


def test_an_edited_test_pair_leaves_the_vectors_and_renews_the_calibration(small_run, own_pairs):
    folder, run = small_run
    file, config = own_pairs
    run(config)
    before = keys(folder)
    edit(file, config, of_test=True)
    run(config)
    after = keys(folder)
    assert after["vectors.safetensors"] == before["vectors.safetensors"]
    assert after["reliability.parquet"] == before["reliability.parquet"]
    assert after["calibration.parquet"]["pairs"] != before["calibration.parquet"]["pairs"]


def test_another_model_under_the_same_name_renews_everything(small_run, own_pairs, monkeypatch):
    folder, run = small_run
    _, config = own_pairs
    run(config)
    monkeypatch.setattr("caa_lens.demo.main_job.model_fingerprint", lambda name: "of other weights")
    _, shown = run(config)
    assert "reusing" not in shown
    assert {made["model"] for made in keys(folder).values()} == {"of other weights"}


@pytest.mark.parametrize(
    "name", ["vectors.safetensors", "calibration.parquet", "calibration.safetensors", "reliability.json", "texts.json"]
)
def test_a_file_put_in_the_place_of_ours_is_not_reused(small_run, own_pairs, name):
    folder, run = small_run
    _, config = own_pairs
    run(config)
    other = {path.name: path.read_bytes() for path in folder.iterdir()}
    if name == "vectors.safetensors":
        (2 * SteeringVectors.load(folder / name)).save(folder / name)
    else:
        (folder / name).write_bytes(other[name] + b" ")
    _, shown = run(config)
    assert shown.count("other things than now (sha256)") == 1
    assert (folder / name).read_bytes() == other[name]


def test_a_folder_from_before_it_was_said_what_files_are_made_from_is_made_anew(small_run, own_pairs):
    folder, run = small_run
    _, config = own_pairs
    run(config)
    (folder / "made_from.json").unlink()
    _, shown = run(config)
    assert shown.count("nothing says what it was made from") == 6


def test_a_folder_with_other_settings_is_refused_and_left_alone(small_run):
    folder, run = small_run
    run()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=r"holds a run with other settings \(n_test\): choose another folder"):
        run(SMALL.model_copy(update={"n_test": 9}))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_settings_are_validated():
    with pytest.raises(ValueError, match="together with its negative"):
        DemoConfig(multipliers=(0.0, 1.0))
    with pytest.raises(ValueError, match="greater than or equal to 8"):
        DemoConfig(n_test=7)


def test_the_page_has_one_panel_on_trust_from_the_results_themselves(small_run):
    folder, run = small_run
    report, shown = run()
    html = unescape(report.read_text(encoding="utf-8"))
    assert html.count("Can you trust it?") >= 1
    calibration = Calibration.load(folder / "calibration.parquet")
    agreement = Reliability.load(folder / "reliability.parquet")
    side_effects = SideEffects.load(folder / "side_effects.parquet")
    found = Found.of("sentiment", "tiny", agreement, "", calibration)
    on_screen = " ".join(shown.split())
    for told in (calibration.text, slopes_told(found.slopes, found.layer), *side_effects_told(side_effects)):
        assert told in html
        assert " ".join(told.split()) in on_screen
    assert agreement_told(agreement, found.layer) in html
    assert all(agreement_told(agreement, layer) in on_screen for layer in told_layers(agreement))
    assert side_effects.multiplier == found.multiplier
    assert side_effects.settings["layer"] == str(found.layer)


def test_where_nothing_is_within_the_budget_the_rest_is_told_of_the_best_layer(small_run):
    folder, run = small_run
    report, shown = run(SMALL.model_copy(update={"budget": 1e-9}))
    calibration = Calibration.load(folder / "calibration.parquet")
    assert calibration.chosen is None
    assert " ".join(calibration.text.split()) in " ".join(shown.split())
    rows = calibration.frame[calibration.frame["multiplier"] == 1.0].set_index("layer")["validation"]
    found = Found.of("sentiment", "tiny", None, "why", calibration)
    assert (found.layer, found.multiplier) == (rows.idxmax(), 1.0)
    assert "Can you trust it?" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(("n_test", "said"), [(16, True), (32, False)])
def test_questions_that_chose_the_layer_are_said_to_flatter_it(small_run, n_test, said):
    _, run = small_run
    report, shown = run(SMALL.model_copy(update={"n_test": n_test}))
    html, on_screen = unescape(report.read_text(encoding="utf-8")), " ".join(shown.split())
    assert (FLATTERED in html, FLATTERED in on_screen) == (said, said)
    assert ("chosen on other questions and prompts than those reported" in html) == (not said)


def test_pairs_of_which_nothing_can_be_said_are_said_so_and_the_run_goes_on(small_run, tmp_path):
    _, run = small_run
    file = tmp_path / "few.jsonl"
    ContrastSet.load("sentiment").sample(16, seed=0).save(file)
    report, shown = run(SMALL.model_copy(update={"behavior": str(file), "n_test": 10}))
    assert "got 6 pairs, of which nothing can be said" in " ".join(shown.split())
    assert "got 6 pairs, of which nothing can be said" in unescape(report.read_text(encoding="utf-8"))


def test_a_set_too_small_for_any_choice_is_refused(small_run, tmp_path):
    folder, run = small_run
    file = tmp_path / "few.jsonl"
    ContrastSet.load("sentiment").sample(15, seed=0).save(file)
    with pytest.raises(ValueError, match="has 15 pairs, expected at least 16: 8 to extract from and 8 to measure on"):
        run(SMALL.model_copy(update={"behavior": str(file)}))
    assert not folder.exists()


@pytest.mark.parametrize("wrong", [{"behavior": "sentimnt"}, {"layers": (1, 99)}, {"n_test": 1000}], ids=str)
def test_bad_settings_leave_no_folder_behind(small_run, wrong):
    folder, run = small_run
    with pytest.raises(ValueError, match=r"did you mean 'sentiment'|layer 99 is out of range|got test=1000"):
        run(SMALL.model_copy(update=wrong))
    assert not folder.exists()


def test_texts_that_were_cut_end_with_an_ellipsis_on_the_screen_and_the_page_and_are_stored_as_they_are(small_run):
    folder, run = small_run
    report, shown = run()
    texts = json.loads((folder / "texts.json").read_text())["Describe a walk in the park."]
    assert all(each["cut"] and not each["text"].endswith("…") for each in texts.values())
    assert shown.count("…") >= len(texts)
    assert unescape(report.read_text(encoding="utf-8")).count(" …") >= len(texts)


def test_device_date_versions_and_command_are_in_the_settings_and_at_the_end_of_the_screen(small_run):
    _, run = small_run
    report, shown = run()
    page = unescape(report.read_text(encoding="utf-8"))
    for name in (
        "device: cpu",
        "date: 20",
        "versions: caa-lens ",
        "command: run_demo(DemoConfig(n_test=8, layers=(1, 3)",
    ):
        assert name in shown
        assert name.split(": ")[1] in page
    assert f"torch {torch.__version__}" in page


def test_the_command_of_a_run_is_what_was_typed_or_a_line_of_python(tmp_path):
    assert command_of(DemoConfig(), Path("runs/demo")) == "caa-lens demo --out runs/demo"
    few = DemoConfig(layers=(3, 9), behavior="my set.jsonl", dtype="bfloat16")
    assert command_of(few, Path("x")) == "caa-lens demo --dtype bfloat16 --behavior 'my set.jsonl' --layers 3,9 --out x"
    assert command_of(DemoConfig(seed=3), Path("x")) == "run_demo(DemoConfig(seed=3), 'x')"


class Clock:
    """Seconds that pass only as work is done."""

    def __init__(self, seconds_a_pair):
        self.seconds_a_pair, self.now, self.read = seconds_a_pair, 0.0, []

    def reading(self, n):
        self.read.append(n)
        self.now += n * self.seconds_a_pair + (100 if len(self.read) == 1 else 0)  # the first one is slow

    def __call__(self):
        return self.now


STEPS = {"vectors": 80.0, "calibration": 300.0, "words": 20.0, "side_effects": 200.0}


def duration(clock, there=()):
    console = Console(record=True, width=200)
    return Duration.of(console, STEPS, set(there), clock.reading, clock), console


def test_how_long_it_takes_is_told_once_from_the_first_batches_without_the_slow_start():
    clock = Clock(0.2)
    told, console = duration(clock)
    assert clock.read == [1, 8]
    for step, cost in STEPS.items():
        clock.now += 0.2 * cost * 1.3  # a little slower is no news
        told.done(step)
    assert console.export_text() == "This takes about 2 minutes on this machine, as busy as it is now.\n"


def test_what_is_there_already_is_not_counted_and_where_all_is_there_nothing_is_read():
    clock = Clock(0.2)
    _, console = duration(clock, {"calibration", "side_effects"})
    assert "about 20 seconds" in console.export_text()
    clock = Clock(0.2)
    told, console = duration(clock, STEPS.keys() - {"words"})
    told.done("vectors")
    assert (clock.read, console.export_text()) == ([], "")


@pytest.mark.parametrize(
    ("factor", "news"), [(4, "slower than that: about 3 minutes"), (0.2, "faster than that: some")]
)
def test_when_half_is_done_and_it_goes_otherwise_that_is_told_once(factor, news):
    clock = Clock(0.2)
    told, console = duration(clock)
    console.export_text()
    for step in ("vectors", "calibration", "words", "side_effects"):
        clock.now += 0.2 * factor * STEPS[step]
        told.done(step)
    assert console.export_text() == f"It goes {news}{' seconds' if factor < 1 else ''} more.\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (3.0, "some seconds"),
        (44.0, "about 40 seconds"),
        (70.0, "about a minute"),
        (115.0, "about 2 minutes"),
        (7000.0, "about 1.9 hours"),
    ],
)
def test_times_are_told_no_finer_than_they_are_known(seconds, said):
    assert about(seconds) == said


def test_a_run_says_how_long_it_takes_before_its_first_step_and_a_second_one_does_not(small_run):
    _, run = small_run
    _, shown = run()
    assert shown.index("This takes") < shown.index("Do the pairs agree?")
    _, shown = run()
    assert "This takes" not in shown


@pytest.mark.parametrize(
    ("readable", "told"),
    [
        (
            [1, 0, 0, 1, 1],
            "are readable from layer 11 on: there the median rank of 2 of them among 1,000 tokens is 40, ",
        ),
        ([1, 1, 1, 1, 1], "are readable from layer 2 on"),
        (
            [1, 0, 1, 0, 0],
            "at layers 2, 8 of those read, and not at the last. Best at layer 14, with a median rank of 30",
        ),
        ([0, 0, 0, 0, 0], "at no layer read do 2 of them"),
    ],
)
def test_words_are_readable_from_the_layer_above_which_none_is_unreadable(readable, told):
    medians = pd.DataFrame({"layer": [2, 5, 8, 11, 14], "median": [70.0, 60, 50, 40, 30]})
    medians = medians.assign(control_low=80.0, control_high=900.0)
    medians["verdict"] = ["readable" if each else "nothing to read here" for each in readable]
    words = SimpleNamespace(medians=lambda: medians, frame=pd.DataFrame({"word": ["a", "b"]}), d_vocab=1000)
    assert told in depth_told(words)
