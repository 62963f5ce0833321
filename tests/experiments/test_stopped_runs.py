"""A run of experiments that is stopped: what it keeps in one line, and the same frames in the end."""

import shlex

import pandas as pd
import pytest
from helpers.stopped_commands import run_commands

pytestmark = pytest.mark.one_kind


def test_a_stopped_run_says_how_many_units_it_keeps_and_goes_on(models, tmp_path):
    few = ["--n-generate", "6", "--n-test", "4", "--n-validation", "4", "--behaviors", "sentiment,formality"]
    words = ["experiments/__main__.py", "vectors", "--model", str(models / "chat"), *few, "--out"]
    early, middle, again, whole = run_commands(
        [
            {"argv": [*words, "run"], "at": "loading"},
            {"argv": [*words, "run"], "at": "unit", "signal": "SIGTERM"},
            {"argv": [*words, "run"]},
            {"argv": [*words, "whole"]},
        ],
        tmp_path,
    )
    assert [early["code"], middle["code"]] == [130, 143], early["err"] + middle["err"]
    typed = shlex.join(["python", "-m", "experiments", *words[1:], "run"])
    for done, n in ((early, 0), (middle, 1)):
        said = f"stopped: run keeps {n} of 2 units; the same command goes on: {typed}"
        assert done["err"].strip().splitlines()[-1] == said
    assert not any("Traceback" in done["err"] + done["out"] for done in (early, middle))
    assert again["code"] == whole["code"] == 0, again["err"] + again["out"]
    frames = sorted(path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("units/*.parquet"))
    assert len(frames) == 2
    for each in frames:
        found, expected = (pd.read_parquet(tmp_path / folder / each) for folder in ("run", "whole"))
        pd.testing.assert_frame_equal(found, expected)
    assert not [path for path in tmp_path.rglob(".*.*") if path.is_file()]
