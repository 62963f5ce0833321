"""Ray's workers do units: whatever is killed on the way, the run ends as one process' undisturbed run, to the bit."""

import contextlib
import gc
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from helpers import ray_run as cheap

from experiments.running import ray_cluster, ray_workers
from experiments.running.experiment import Experiment
from experiments.running.ray_cluster import LOOPBACK, QUIET, ClusterError, Demand, same_imports
from experiments.running.ray_workers import RayWorkers
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run
from experiments.running.units import Unfinished, Unit

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'caa-lens[cluster]'"),
    # Ray leaves files and processes to be collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PROGRAM = Path(cheap.__file__)
N_RESULTS = 2 * len(cheap.CONFIG.behaviors) + len(cheap.number_units(cheap.CONFIG))
SOON = 200  # seconds that nothing here takes, on whatever machine


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with room for a worker each, and a third for the drivers, all on this machine's own address."""
    temporary = tempfile.mkdtemp(prefix="ray")  # paths of sockets must be short
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in (QUIET | LOOPBACK).items():
            patch.setenv(name, value)
        patch.syspath_prepend(PROGRAM.parents[1])
        ray_cluster.load(loopback=True)
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
            "temp_dir": temporary,
            "_system_config": {"health_check_period_ms": 500},
        }
        with same_imports():
            cluster = Cluster(initialize_head=True, head_node_args=head)
            try:
                for _ in range(2):
                    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
                yield cluster
            finally:
                cluster.shutdown()
                for process in psutil.Process().children(recursive=True):
                    if process.pid not in before:
                        process.kill()
                shutil.rmtree(temporary, ignore_errors=True)
                gc.collect()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One process, without Ray."""
    folder = RunFolder(tmp_path_factory.mktemp("undisturbed") / "run")
    cheap.claim(folder)
    assert not any(outcome.failed for outcome in run(cheap.three(), cheap.CONFIG, folder))
    return folder.path


def results(folder):
    """Every file of a run, frames and their attributes apart from the seconds that a unit took."""
    files = {str(f.relative_to(folder)): f for f in sorted(Path(folder).rglob("*")) if f.is_file()}
    files.pop("held.json", None)
    frames = {name: pd.read_parquet(f) for name, f in files.items() if f.suffix == ".parquet"}
    for frame in frames.values():
        assert frame.attrs.pop("seconds") >= 0
    return frames, {name: f.read_bytes() for name, f in files.items() if name not in frames}


def assert_same_results(folder, other):
    (frames, files), (other_frames, other_files) = results(folder), results(other)
    assert list(frames) == list(other_frames)
    assert len(frames) == N_RESULTS
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(frame, other_frames[name], check_exact=True)
        assert frame.attrs == other_frames[name].attrs
    assert files == other_files


class Watched(RayWorkers):
    """Fails in the end, where a unit that nobody is at any more would be waited for."""

    def __enter__(self):
        self.end = time.monotonic() + SOON
        return super().__enter__()

    def endings(self):
        assert time.monotonic() < self.end
        return super().endings()


def workers(cluster, **more):
    return Watched(cheap.WORKERS, address=cluster.address, device="none", demand=Demand(cpus=1), **more)


def until(condition, process=None):
    """Wait for something; what it was, when it came."""
    end = time.monotonic() + SOON
    while not (found := condition()):
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    return found


class Storm:
    """Kills drivers, workers and nodes while units are being done, one at a time, and never one unit too often."""

    def __init__(self, folder, cluster, seed):
        self.folder, self.cluster, self.rng = folder, cluster, random.Random(seed)
        self.struck = Counter()  # how often a unit's worker was killed under this driver
        self.driver = None
        self.seen = 0

    def start(self):
        command = [sys.executable, str(PROGRAM), str(self.folder), self.cluster.address]
        self.driver = subprocess.Popen(command, stderr=subprocess.PIPE)

    def at_work(self):
        """(process, unit) of those who have begun since the last kill, and are still at it."""
        begun = cheap.logged(self.folder, "begun")[self.seen :]
        found = []
        for process, unit, _ in begun:
            done = (self.folder / "numbers" / "units" / f"{unit}.parquet").exists()
            if not done and psutil.pid_exists(int(process)) and self.struck[unit] < 2:
                found.append((int(process), unit))
        return found

    def strike(self, kind):
        hit = until(self.at_work, self.driver)
        time.sleep(self.rng.uniform(0, 0.1))
        self.seen = len(cheap.logged(self.folder, "begun"))
        if kind == "driver":
            self.driver.kill()
            self.driver.communicate()
            self.struck.clear()
            self.start()
            return
        if kind == "node":
            node = self.rng.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
            self.cluster.remove_node(node, allow_graceful=self.rng.random() < 0.5)
            self.cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
            self.struck.update(unit for _, unit in hit)
            return
        process, unit = self.rng.choice(hit)
        self.struck[unit] += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_after_twenty_kills_of_workers_nodes_and_drivers_a_run_is_that_of_one_undisturbed_process(
    cluster, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    storm = Storm(folder, cluster, seed=0)
    kinds = ["worker"] * 15 + ["node"] * 2 + ["driver"] * 3
    random.Random(1).shuffle(kinds)
    storm.start()
    try:
        for kind in kinds:
            storm.strike(kind)
        _, said = storm.driver.communicate(timeout=SOON)
    finally:
        storm.driver.kill()
    assert storm.driver.returncode == 0, said.decode()
    assert_same_results(folder, undisturbed)
    written = Counter(unit for _, unit in cheap.logged(folder, "written"))
    assert max(written.values()) == 1  # nothing twice
    assert len(written) >= N_RESULTS - 3  # a driver may be killed between a result and its log
    begun = cheap.logged(folder, "begun")
    assert len({process for process, _, _ in begun}) > 15  # kills hit workers that were at work
    assert len(begun) > len(cheap.number_units(cheap.CONFIG))
    assert str(folder) not in {place for _, _, place in begun}  # nobody but drivers writes there


def dies_at(unit, context, folder=None):
    """One unit's worker does not live to tell; but the fifth's, whom nobody should have asked."""
    if unit["part"] == 1:
        cheap.log(folder, "dying", os.getpid())
        if len(cheap.logged(folder, "dying")) < 5:
            os._exit(1)
    return pd.DataFrame({"part": [unit["part"]], "score": [0.0]})


def fails(unit, context):
    raise ValueError(f"no such thing as {unit.name}")


def judged(unit, context):
    """As of a judge that answers about some: done where the run folder is, reply by reply."""
    kept = context.folder.artefacts("judged") / f"{unit.name}.jsonl"
    kept.write_text(f"{os.getpid()}")
    if unit["behavior"] == "b":
        raise Unfinished("the judge is away", pd.DataFrame({"part": [0], "score": [0.5]}))
    return pd.DataFrame({"part": [0], "score": [1.0]})


def test_what_one_engine_leaves_the_other_finishes_and_units_that_never_end_well_are_reported(
    cluster, undisturbed, tmp_path
):
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    outcomes = run(cheap.three()[:1], cheap.CONFIG, folder)  # vectors, by this process
    file = folder.vectors_file("c")
    first = file.stat().st_mtime_ns
    parts = {"title": "", "source": "", "section": cheap.frames_section}
    dying = Experiment(
        name="dying",
        units=lambda config: [Unit.of(behavior="a", part=part) for part in (0, 1)],
        run=cheap.partial(dies_at, folder=folder.path),
        **parts,
    )
    failing = Experiment(name="failing", units=cheap.behavior_units, run=fails, **parts)
    after = replace(failing, name="after", run=fails, needs=cheap.needing("dying"))
    asking = Experiment(
        name="judged",
        units=cheap.behavior_units,
        run=judged,
        by_driver=True,
        needs=cheap.needing("vectors"),
        own=lambda config: {"judge": "x"},
        **parts,
    )
    said = []
    engine = workers(cluster, retries=1, say=said.append)
    every = [*cheap.three(folder.path), dying, failing, after, asking]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = {outcome.experiment.name: outcome for outcome in run(every, cheap.CONFIG, folder, engine=engine)}
    # A unit that ends its worker has two tries, and no more.
    assert len(cheap.logged(folder.path, "dying")) == 2
    assert outcomes["dying"].failed == "WorkerLostError: 2 workers were lost, one after the other, at behavior=a,part=1"
    assert "The last one:" in outcomes["dying"].traceback.read_text()
    assert said == ["A worker was lost at dying behavior=a,part=1 (1 of 2 tries): it is done again"]
    assert outcomes["after"].failed == "needs dying, which failed"
    # One that raises is told as if it had been done here, with the line that raised.
    assert outcomes["failing"].failed.startswith("ValueError: no such thing as behavior=")
    assert "in fails" in outcomes["failing"].traceback.read_text()
    # A judge's units are this process' own, and what there is of an unfinished one is kept.
    replies = sorted((folder.path / "judged" / "artefacts").iterdir())
    assert [reply.read_text() for reply in replies] == [str(os.getpid())] * len(cheap.CONFIG.behaviors)
    assert outcomes["judged"].unfinished.startswith("1 of 8 units are left undone (the judge is away)")
    assert len(folder.frames_so_far("judged", cheap.behavior_units(cheap.CONFIG))) == len(cheap.CONFIG.behaviors)
    # The rest is as ever, and what was there was not done again.
    assert file.stat().st_mtime_ns == first
    for name in ("dying", "failing", "after", "judged"):
        shutil.rmtree(folder.path / name)
    assert_same_results(folder.path, undisturbed)
    # And what Ray's workers have left is finished by one process.
    half = cheap.number_units(cheap.CONFIG)[::2]
    for unit in half:
        folder.unit_file("numbers", unit).unlink()
    run(cheap.three(folder.path), cheap.CONFIG, folder)
    assert [unit for process, unit, _ in cheap.logged(folder.path, "begun") if process == str(os.getpid())] == [
        unit.name for unit in half
    ]
    assert_same_results(folder.path, undisturbed)


def test_a_worker_that_lacks_what_the_run_is_held_to_is_refused(cluster, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim({"config": {}, "versions": {"numpy": "0.1"}}, {})
    with pytest.raises(ClusterError, match=r"not what the run is held to:\n  versions\.numpy: '0\.1' there, '\S+' now"):
        run(cheap.three(), cheap.CONFIG, folder, engine=workers(cluster))
    assert not list(folder.path.glob("*/units/*"))


def test_a_cluster_without_room_is_told_at_once_and_waited_for_no_longer_than_said(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers, "PATIENCE", 1.0)
    folder, said = RunFolder(tmp_path / "run"), []
    cheap.claim(folder)
    engine = RayWorkers(2, address=cluster.address, device="none", demand=Demand(cpus=64), say=said.append)
    with pytest.raises(
        ClusterError, match=r"no worker has started for .*: each asks for 64 CPU, and the cluster's 3 node"
    ):
        run(cheap.three(), cheap.CONFIG, folder, engine=engine)
    assert said[0].startswith(
        "Waiting for room: a worker asks for 64 CPU, and the cluster's 3 node(s) have 2 CPU, 0 GPU"
    )
