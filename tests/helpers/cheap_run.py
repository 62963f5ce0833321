"""Cheap experiments on no model, and a function that runs them: what is killed, raced and starved in the tests."""

import hashlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.running.experiment import Experiment
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run
from experiments.running.settings import RunConfig
from experiments.running.units import Unit, together

N_UNITS = 12
CONFIG = RunConfig(model="none", behaviors=("a", "b"))


def units(config):
    return [Unit.of(behavior=behavior, part=part) for behavior in config.behaviors for part in range(N_UNITS // 2)]


def numbers(unit, context):
    """Reproducible numbers, slowly enough to be interrupted; a log tells who computed what."""
    import numpy as np
    import pandas as pd

    log = context.folder.path.with_suffix(".log")
    with log.open("a") as file:
        file.write(f"{os.getpid()} {unit.name}\n")
    time.sleep(0.02)
    rng = np.random.default_rng(list(hashlib.sha256(unit.name.encode()).digest()))
    frame = pd.DataFrame({"question": range(50), "score": rng.standard_normal(50), "text": "é <b>"})
    frame.attrs["setting"] = unit.name
    return frame


def totals(unit, context):
    """Uses the other experiment's finished frames."""
    rows = together(context.folder.frames(NUMBERS.name, NUMBERS.units(context.config)))
    return rows[rows["behavior"] == unit["behavior"]].groupby("part", as_index=False)["score"].sum()


def section(frames, config):
    import plotly.graph_objects as go

    from caa_lens.report.page import Section

    rows = together(frames)
    return Section(title="sum", figures=[go.Figure(go.Bar(x=rows["part"], y=rows["score"]))], tables=[rows.head()])


NUMBERS = Experiment(name="numbers", title="numbers", source="none", units=units, run=numbers, section=section)
TOTALS = Experiment(
    name="totals",
    title="totals",
    source="none",
    units=lambda config: [Unit.of(behavior=behavior) for behavior in config.behaviors],
    run=totals,
    section=section,
    needs=lambda config: ("numbers",),
)
ALL = [NUMBERS, TOTALS]


def claim(folder, config=CONFIG):
    return folder.claim({"config": config.model_dump(mode="json"), "versions": {}}, {})


def main(path):
    folder = RunFolder(path)
    claim(folder)
    outcomes = run(ALL, CONFIG, folder)
    assert not any(outcome.failed for outcome in outcomes), outcomes
