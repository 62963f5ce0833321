"""The demo run on a small model: every file, reuse, and refusals."""

import json

import pandas as pd
import pytest
from rich.console import Console

from caa_lens.demo import DemoConfig, run_demo
from caa_lens.vectors import SteeringVectors

SMALL = DemoConfig(n_test=6, layers=(1, 3), prompts=("Describe a walk in the park.",), max_new_tokens=4)


@pytest.fixture
def small_run(tmp_path, tiny_chat, monkeypatch):
    """Run the demo with the small random model in place of the real one; returns (folder, run)."""
    monkeypatch.setattr("caa_lens.models.load_model", lambda *args, **kwargs: tiny_chat)

    def run(config=SMALL):
        console = Console(record=True, width=120)
        report = run_demo(config, tmp_path / "run", console)
        return report, console.export_text()

    return tmp_path / "run", run


def test_a_run_writes_every_file_and_says_which_to_open(small_run):
    folder, run = small_run
    report, shown = run()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "report.html",
        "sweep.parquet",
        "texts.json",
        "vectors.safetensors",
    ]
    assert shown.strip().splitlines()[-1] == f"Open this file: {report.resolve()}"
    assert len(SteeringVectors.load(folder / "vectors.safetensors")) == 5
    frame = pd.read_parquet(folder / "sweep.parquet")
    assert len(frame) == 2 * 5 * 6
    texts = json.loads((folder / "texts.json").read_text())
    assert list(texts["Describe a walk in the park."]) == ["-2", "-1", "+0", "+1", "+2"]
    html = report.read_text(encoding="utf-8")
    assert html.count("Plotly.newPlot(") >= 2
    for answer in texts["Describe a walk in the park."].values():
        assert answer[:10].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")[:5] in html or "'" in answer


def test_a_second_run_reuses_what_is_there(small_run, monkeypatch):
    folder, run = small_run
    run()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.html"}
    for name in ("extraction.extract", "sweeps.sweep", "generation.generate"):
        monkeypatch.setattr(f"caa_lens.{name}", lambda *a, name=name, **k: pytest.fail(f"{name} ran again"))
    _, shown = run()
    assert shown.count("reusing") == 3
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.html"} == before


def test_an_interrupted_run_goes_on_where_it_stopped(small_run, monkeypatch):
    folder, run = small_run
    with monkeypatch.context() as patch:
        patch.setattr("caa_lens.sweeps.sweep", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    vectors = (folder / "vectors.safetensors").read_bytes()
    monkeypatch.setattr("caa_lens.extraction.extract", lambda *a, **k: pytest.fail("extracted again"))
    run()
    assert (folder / "vectors.safetensors").read_bytes() == vectors


def test_a_folder_with_other_settings_is_refused_and_left_alone(small_run):
    folder, run = small_run
    run()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=r"holds a run with other settings \(n_test\): choose another folder"):
        run(SMALL.model_copy(update={"n_test": 7}))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_settings_are_validated():
    with pytest.raises(ValueError, match="together with its negative"):
        DemoConfig(multipliers=(0.0, 1.0))


@pytest.mark.parametrize("wrong", [{"behavior": "sentimnt"}, {"layers": (1, 99)}, {"n_test": 1000}], ids=str)
def test_bad_settings_leave_no_folder_behind(small_run, wrong):
    folder, run = small_run
    with pytest.raises(ValueError, match=r"did you mean 'sentiment'|layer 99 is out of range|got test=1000"):
        run(SMALL.model_copy(update=wrong))
    assert not folder.exists()
