"""Who does units and who holds the folder, without a cluster: what is refused, and what is said."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from helpers import cheap_run as cheap

from experiments.__main__ import main
from experiments.running import holder, ray_cluster, ray_worker
from experiments.running.beforehand import check_workers
from experiments.running.context import Context
from experiments.running.holder import HeldError, Holder
from experiments.running.ray_cluster import ClusterError, Demand, demanded
from experiments.running.ray_worker import Worker, about_here
from experiments.running.ray_workers import RETRIES, RayWorkers, _Hand
from experiments.running.run_folder import OtherRunError, RunFolder
from experiments.running.runner import run
from experiments.running.units import Unit

# ---- the one process that writes ---------------------------------------------------------------------------------

HOLDING = (
    "import sys, time; sys.path.insert(0, sys.argv[1])\n"
    "from experiments.running.run_folder import RunFolder\n"
    "with RunFolder(sys.argv[2]).held():\n"
    "    print('held', flush=True); time.sleep(600)\n"
)


def test_a_second_run_on_a_folder_is_refused_with_who_holds_it_and_goes_on_when_that_one_was_killed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    words = [sys.executable, "-c", HOLDING, str(cheap.Path(cheap.__file__).parents[2]), str(folder.path)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HeldError, match=rf"held by another run.*: process {other.pid} on .*, since 2"):
            run(cheap.ALL, cheap.CONFIG, folder)
        assert [file.name for file in folder.path.iterdir()] == ["held.json"]  # nothing was done
    finally:
        other.kill()
        other.communicate()
    cheap.main(folder.path)
    assert not (folder.path / "held.json").exists()


def test_a_holder_of_another_machine_is_watched_and_its_folder_taken_over_only_if_it_is_still(tmp_path, monkeypatch):
    monkeypatch.setattr(holder, "LEASE", 2.0)
    file, said = tmp_path / "held.json", []
    about = {"machine": "elsewhere", "host": "node7", "process": 1, "since": "then", "token": "a", "beat": 0}
    file.write_text(json.dumps(about))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            about["beat"] += 1
            holder.write_atomically(file, lambda new: new.write_text(json.dumps(about)))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(HeldError, match="process 1 on node7, since then"), Holder(tmp_path, say=said.append):
            pass
    finally:
        stop.set()
        beating.join()
    assert "watching for 2 s" in said[0]
    with Holder(tmp_path) as taken:
        taken.check()
        assert json.loads(file.read_text())["process"] == psutil.Process().pid
    assert not file.exists()


@pytest.mark.parametrize("left", [b"", b'{"machine": "elsewh'])
def test_a_holder_that_was_killed_while_it_wrote_its_name_is_taken_over_too(tmp_path, monkeypatch, left):
    monkeypatch.setattr(holder, "LEASE", 0.2)
    (tmp_path / "held.json").write_bytes(left)
    with Holder(tmp_path):
        pass


def test_a_process_id_that_another_process_has_by_now_holds_nothing(tmp_path):
    with Holder(tmp_path) as one:
        about = dict(one._about)
    about["began"] -= 100
    (tmp_path / "held.json").write_text(json.dumps(about))
    with Holder(tmp_path):
        pass


def test_who_holds_a_folder_renews_its_name_and_stops_if_the_folder_was_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(holder, "BEAT", 0.05)
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    file = folder.path / "held.json"
    with folder.held():
        end = time.monotonic() + 60
        while json.loads(file.read_text())["beat"] < 3:
            assert time.monotonic() < end
            time.sleep(0.02)

    class TakenOver:
        def at(self, experiment, unit):
            if unit["part"] == 3:
                file.unlink(missing_ok=True)
                file.write_text(json.dumps({"process": 5, "host": "node8", "since": "now", "token": "b"}))

        def done(self, experiment, unit):
            pass

    with pytest.raises(HeldError, match="is held by another process by now: process 5 on node8, since now"):
        run(cheap.ALL, cheap.CONFIG, folder, progress=TakenOver())
    assert len(list(folder.path.glob("*/units/*"))) == 3
    assert json.loads(file.read_text())["process"] == 5  # and it is left to its holder


def test_a_folder_of_other_things_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.__main__.n_layers", lambda model, fetch: 30)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OtherRunError, match="is not empty and holds no run"):
        main(["vectors"], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_unit_is_done_when_all_that_it_has_left_is_there(tmp_path, monkeypatch):
    folder, unit = RunFolder(tmp_path), Unit.of(behavior="a")
    put = folder.put
    monkeypatch.setattr(folder, "put", lambda file, data: put(file, data) if file.suffix == ".parquet" else no_room())
    with pytest.raises(OSError, match="no room"):
        folder.save_bytes("vectors", unit, b"frame", {"vectors/a.safetensors": b"numbers"})
    assert not folder.is_done("vectors", unit)
    monkeypatch.undo()
    folder.save_bytes("vectors", unit, b"frame", {"vectors/a.safetensors": b"numbers"})
    assert folder.is_done("vectors", unit)
    assert folder.files_of("vectors", unit) == {
        "vectors/a.safetensors": b"numbers",
        "vectors/units/behavior=a.parquet": b"frame",
    }


def no_room():
    raise OSError("no room")


def test_several_cards_of_a_worker_are_one_place_for_a_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("caa_lens.models.loading.load.load_model", lambda name, **place: asked.append(place))
    for device in ("auto", "cuda", None):
        Context(cheap.CONFIG, RunFolder(tmp_path), device=device).load("other")
    assert asked == [
        {"dtype": "float32", "device_map": "auto"},
        {"dtype": "float32", "device": "cuda"},
        {"dtype": "float32", "device": None},
    ]
    assert demanded(2, "auto", "auto", gpus=2, memory=1e9) == (2, Demand(gpus=2))


# ---- the command's words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "by_ray"),
    [
        ((None, None, None), False),
        (("process", 1, None), False),
        ((None, 1, None), False),
        ((None, 2, None), True),
        (("ray", None, None), True),
        ((None, None, "auto"), True),
    ],
)
def test_one_process_is_the_default_and_several_are_rays(words, by_ray):
    assert check_workers(*words) == by_ray


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"engine": "dask"}, "engine is 'dask', expected 'process' or 'ray'"),
        ({"engine": "process", "workers": 3}, "got --engine process with --workers or --address"),
        (
            {"address": "ray://head:10001"},
            "expected 'auto' or HOST:PORT: run the command on one of the cluster's nodes",
        ),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_written(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        main(["vectors"], out=tmp_path / "run", **given)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_several_workers_name_the_extra_and_one_needs_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    with pytest.raises(ClusterError, match=r"need Ray, which is not installed: pip install 'caa-lens\[cluster\]', or"):
        run(cheap.ALL, cheap.CONFIG, folder, engine=RayWorkers(2))
    with pytest.raises(ClusterError, match="not installed"):
        main(["vectors"], out=tmp_path / "other", workers=2)
    assert not (tmp_path / "other").exists()
    assert not any(outcome.failed for outcome in run(cheap.ALL, cheap.CONFIG, folder))


def test_workers_share_this_machines_cards_and_cores_and_a_clusters_ask_for_one_card_each(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(ray_cluster, "visible_gpus", lambda: 0)
    assert demanded(4, None, None, memory=1e9) == (4, Demand(cpus=2))
    assert demanded(None, None, None, memory=1e9) == (1, Demand(cpus=8))
    monkeypatch.setattr(ray_cluster, "visible_gpus", lambda: 2)
    assert demanded(None, None, None, memory=1e9) == (2, Demand(cpus=4, gpus=1))
    assert demanded(3, None, "cuda", memory=1e9) == (3, Demand(cpus=2, gpus=0.5))  # two on one card
    assert demanded(2, None, "cpu", memory=1e9) == (2, Demand(cpus=4))
    assert demanded(None, "auto", None, memory=1e9) == (None, Demand(gpus=1))
    assert demanded(None, "auto", "cpu", cpus=4, memory=1e9) == (None, Demand(cpus=4, memory=1e9))
    asked = demanded(6, "auto", None, gpus=0.5, accelerator="A100", memory=1e9)
    assert asked == (6, Demand(gpus=0.5, accelerator="A100"))
    assert str(asked[1]) == "1 CPU, 0.5 GPU, a card A100"


# ---- what must be the same ---------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path, monkeypatch):
    engine = RayWorkers(2)
    engine._first = {key: value for key, value in about_here("none").items() if key != "device"}
    return engine


def of_a_node(**changed):
    return {"node": "node3", **about_here("none"), **changed}


@pytest.mark.parametrize(
    ("key", "value"),
    [("version of torch", "1.0"), ("version of transformers", "0"), ("version of caa-lens", "0"), ("sources", "0")],
)
def test_a_worker_of_other_versions_than_the_driver_is_refused(driver, key, value):
    driver._compare(of_a_node())
    with pytest.raises(ClusterError, match=rf"worker on node3 would give other numbers:\n  {key}: {value}, expected "):
        driver._compare(of_a_node(**{key: value}))


def test_workers_on_two_kinds_of_device_are_refused(driver):
    driver._compare(of_a_node(device="A100"))
    driver._compare(of_a_node(device="A100"))
    with pytest.raises(ClusterError, match=r"device: T4, expected A100\n.*one kind of device \(--accelerator\)"):
        driver._compare(of_a_node(device="T4"))


def test_workers_that_are_lost_before_they_are_ready_end_the_run_at_last(driver):
    driver._ray, driver._wanted = SimpleNamespace(kill=lambda actor: None), 2
    for _ in range(2 * RETRIES):
        hand = _Hand(None, stage="begin")
        driver._hands.append(hand)
        assert list(driver._lose(hand, RuntimeError("no memory"))) == []
    hand = _Hand(None, stage="about")
    driver._hands.append(hand)
    with pytest.raises(ClusterError, match="7 workers in turn were lost before they were ready: no memory"):
        list(driver._lose(hand, RuntimeError("no memory")))


def test_a_kind_of_device_tells_processors_and_threads_apart():
    import torch

    said = ray_worker.kind_of_device("cpu")
    assert said == ray_worker.kind_of_device(None if not torch.cuda.is_available() else "cpu")
    assert said.endswith(f"{torch.get_num_threads()} thread(s)")


def test_a_worker_puts_fetched_sets_where_they_are_missing_and_leaves_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path))
    (tmp_path / "data" / "refusal").mkdir(parents=True)
    (tmp_path / "data" / "refusal" / "test.jsonl").write_text("mine")
    sent = ray_cluster.fetched_data()
    assert sent == {"refusal/test.jsonl": b"mine"}
    ray_worker._put_missing({"refusal/test.jsonl": b"other", "mmlu/questions.jsonl": b"new"})
    assert ray_cluster.fetched_data() == {"mmlu/questions.jsonl": b"new", **sent}
    monkeypatch.setattr(ray_cluster, "MOST_DATA", 3)
    with pytest.raises(ClusterError, match="expected at most 0 MB of fetched sets"):
        ray_cluster.fetched_data()


def test_a_workers_folder_is_gone_with_it_or_at_the_next_workers_start(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"{ray_worker._prefix(ended.pid)}abc").mkdir()
    alive = tmp_path / f"{ray_worker._prefix(1)}abc"
    alive.mkdir()
    one = Worker()
    held = {"versions": {}}
    assert one.begin(cheap.CONFIG, cheap.ALL, None, held, {}, {"run.json": b"{}"}, {}, str(tmp_path)) == []
    mine = one._folder.path
    assert set(tmp_path.iterdir()) == {alive, mine}
    one.close()
    assert set(tmp_path.iterdir()) == {alive}
