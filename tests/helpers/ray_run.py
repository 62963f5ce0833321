"""Cheap experiments that leave all that units can leave, and a driver that gives them to Ray's workers.

    python tests/helpers/ray_run.py FOLDER ADDRESS

Beside the folder lie two logs: `begun` (worker's process, unit, its folder) and `written` (driver's process,
unit).
"""

import hashlib
import os
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from experiments.running.experiment import Experiment
from experiments.running.ray_cluster import Demand
from experiments.running.ray_workers import RayWorkers
from experiments.running.run_folder import FILE_HASH, RunFolder
from experiments.running.runner import run
from experiments.running.settings import RunConfig
from experiments.running.units import Unit, together
from helpers import cheap_run as cheap

CONFIG = RunConfig(model="none", behaviors=tuple("abcdefgh"))
N_PARTS = 7
WORKERS = 2


def log(folder, name, *words):
    """One line, whole: others write there, too."""
    with open(f"{folder}.{name}", "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def logged(folder, name):
    file = Path(f"{folder}.{name}")
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def vectors(unit, context):
    """A file of vectors, and its hash."""
    import pandas as pd

    file = context.folder.vectors_file(unit["behavior"])
    data = hashlib.sha256(unit.name.encode()).digest() * 100
    context.folder.put(file, data)
    frame = pd.DataFrame({"layer": [0, 1]})
    frame.attrs[FILE_HASH] = hashlib.sha256(data).hexdigest()
    return frame


def numbers(unit, context, folder=None, seconds=0.0):
    """Reproducible numbers of the vectors and the unit, and a file of the unit's own."""
    import numpy as np
    import pandas as pd

    if folder:
        log(folder, "begun", os.getpid(), unit.name, context.folder.path)
    time.sleep(seconds)
    context.folder.check_vectors(unit["behavior"])
    seed = context.folder.vectors_file(unit["behavior"]).read_bytes()[:32] + unit.name.encode()
    rng = np.random.default_rng(list(hashlib.sha256(seed).digest()))
    frame = pd.DataFrame({"question": range(50), "score": rng.standard_normal(50), "text": "é <b>"})
    frame.attrs["setting"] = unit.name
    kept = context.folder.artefacts("numbers") / f"kept-{unit.name}.txt"
    context.folder.put(kept, f"{frame['score'].sum()!r}".encode())
    with context.folder.scratch("numbers", unit) as scratch:
        (scratch / "large").write_bytes(b"gone afterwards")
    return frame


def totals(unit, context):
    """Of the other experiment's finished frames and its files."""
    rows = together(context.folder.frames("numbers", number_units(context.config)))
    kept = sorted((context.folder.path / "numbers" / "artefacts").glob("kept-*"))
    assert len(kept) == len(number_units(context.config))
    sums = rows[rows["behavior"] == unit["behavior"]].groupby("part", as_index=False)["score"].sum()
    return sums.assign(kept=hashlib.sha256(b"".join(file.read_bytes() for file in kept)).hexdigest())


def behavior_units(config):
    return [Unit.of(behavior=behavior) for behavior in config.behaviors]


def number_units(config):
    return [Unit.of(behavior=behavior, part=part) for behavior in config.behaviors for part in range(N_PARTS)]


def needing(*names):
    return lambda config: names


def three(folder=None, seconds=0.0):
    """Vectors, numbers of them, totals of the numbers; a unit of numbers is logged, and takes so long."""
    parts = {"title": "", "source": "", "section": cheap.section}
    section = partial(frames_section)
    return [
        Experiment(name="vectors", units=behavior_units, run=vectors, **{**parts, "section": section}),
        Experiment(
            name="numbers",
            units=number_units,
            run=partial(numbers, folder=folder, seconds=seconds),
            needs=needing("vectors"),
            **parts,
        ),
        Experiment(name="totals", units=behavior_units, run=totals, needs=needing("numbers"), **parts),
    ]


def frames_section(frames, config):
    from caa_lens.report.page import Section

    return Section(title="frames", tables=[together(frames).head()])


def claim(folder):
    return folder.claim({"config": CONFIG.model_dump(mode="json"), "versions": {}}, {})


def main(path, address, seconds=0.1):
    """A driver; what it writes is logged."""
    folder = RunFolder(path)
    save = folder.save_bytes

    def logging(experiment, unit, *more):
        save(experiment, unit, *more)
        log(path, "written", os.getpid(), f"{experiment}/{unit.name}")

    folder.save_bytes = logging
    engine = RayWorkers(WORKERS, address=address, device="none", demand=Demand(cpus=1))
    with folder.held():
        claim(folder)
        outcomes = run(three(path, seconds), CONFIG, folder, engine=engine)
    assert not any(outcome.failed for outcome in outcomes), outcomes


if __name__ == "__main__":
    main(*sys.argv[1:])
