"""Commands that are stopped: one line, the exit code, nothing half-written, and the same results in the end."""

import json
import shlex

import pandas as pd
import pytest
from helpers.models import demo_folder, random_llama
from helpers.stopped_commands import run_commands

from caa_lens.cli import stopping
from caa_lens.contrast.sets import ContrastSet

pytestmark = pytest.mark.one_kind


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model behind the real tokenizer, and 24 pairs."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("stopped")
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    random_llama(folder / "model", seed=0, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.save_pretrained(folder / "model")
    ContrastSet.load("sentiment").sample(24, seed=0).save(folder / "few.jsonl")
    return folder


def half_written(folder):
    return [path.name for path in folder.rglob(".*") if path.is_file()]


def last_line(done):
    return done["err"].strip().splitlines()[-1]


def test_a_stopped_demo_says_what_it_keeps_and_goes_on_to_the_same_results(place):
    demo = ["caa-lens", "demo", "--behavior", "few.jsonl", "--model", "model", "--layers", "0,1", "--out"]
    moments = ["loading", "writing vectors.safetensors", "scoring", "writing calibration.parquet", "writing texts.json"]
    commands = [{"argv": [*demo, "run"], "at": moment} for moment in moments]
    commands[2]["signal"] = "SIGTERM"
    *stopped, finished, whole = run_commands([*commands, {"argv": [*demo, "run"]}, {"argv": [*demo, "whole"]}], place)
    assert [done["code"] for done in stopped] == [130, 130, 143, 130, 130]
    kept = ["", "", "vectors, reliability", "vectors, reliability", "vectors, reliability, calibration"]
    for done, those in zip(stopped, kept, strict=True):
        assert "Traceback" not in done["err"]
        typed = shlex.join([*demo, "run"])
        if those:
            assert last_line(done) == f"stopped: run keeps {those}; the same command goes on: {typed}"
        else:
            said = f"stopped: nothing is kept; again from the beginning: {typed}"
            assert last_line(done) == said
    assert finished["code"] == whole["code"] == 0, finished["err"]
    assert finished["out"].count("reusing") == 3
    assert not half_written(place)
    for name in ("calibration.parquet", "side_effects.parquet", "lens.parquet", "reliability.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(place / "run" / name), pd.read_parquet(place / "whole" / name))
    for name in ("texts.json", "vectors.safetensors"):
        assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()
    made = [json.loads((place / folder / "made_from.json").read_text()) for folder in ("run", "whole")]
    assert made[0].keys() == made[1].keys()


def test_a_stopped_sweep_says_that_nothing_is_kept_or_what_was_written(place):
    extract = ["caa-lens", "extract", "few.jsonl", "v.safetensors", "--model", "model", "--test", "8"]
    sweep = ["caa-lens", "sweep", "few.jsonl", "v.safetensors", "--model", "model", "--test", "8", "--out", "s.parquet"]
    early, _, middle, late = run_commands(
        [
            {"argv": extract, "at": "writing v.safetensors"},
            {"argv": extract},
            {"argv": sweep, "at": "scoring"},
            {"argv": sweep, "at": "writing s.html", "signal": "SIGTERM"},
        ],
        place,
    )
    assert [done["code"] for done in (early, middle, late)] == [130, 130, 143]
    nothing = "stopped: nothing is kept; again from the beginning: "
    assert last_line(early) == nothing + shlex.join(extract)
    assert last_line(middle) == nothing + shlex.join(sweep)
    assert last_line(late).startswith("stopped: s.parquet, s.json were written, nothing after; again")
    assert not (place / "s.html").exists()
    assert not half_written(place)
    assert not any("Traceback" in done["err"] for done in (early, middle, late))


def test_a_command_is_given_again_as_it_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/caa-lens", "generate", "How was it?"])
    assert stopping.command_given() == "caa-lens generate 'How was it?'"
    monkeypatch.setattr("sys.argv", ["/somewhere/caa_lens/__main__.py", "demo"])
    assert stopping.command_given() == "python -m caa_lens demo"
    monkeypatch.setattr("sys.argv", ["/somewhere/experiments/__main__.py", "all"])
    assert stopping.command_given() == "python -m experiments all"
