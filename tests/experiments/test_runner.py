"""Runs end with the same results whatever happens on the way: kills, company, full disks."""

import errno
import multiprocessing
import random
import time
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
from helpers import cheap_run as cheap

from experiments.running.experiment import Experiment
from experiments.running.run_folder import DiskFullError, OtherRunError, RunFolder
from experiments.running.runner import run, skip_reasons, with_needs
from experiments.running.units import Unit, together

PROGRAM = Path(cheap.__file__)


@pytest.fixture(scope="module")
def start():
    """Run the cheap experiments on a folder in a process of its own, forked where everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["helpers.cheap_run", "pyarrow.parquet", "plotly.graph_objects", "caa_lens.report.runs"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{PROGRAM.parents[1]}:{PROGRAM.parents[2]}")
        forkserver.ensure_running()

    def started(folder):
        process = context.Process(target=cheap.main, args=(folder,))
        process.start()
        return process

    return started


def finish(process):
    process.join(timeout=60)
    assert process.exitcode == 0


def results(folder):
    """Every frame and section of a run, by file."""
    frames = {str(f.relative_to(folder)): pd.read_parquet(f) for f in sorted(Path(folder).glob("*/units/*.parquet"))}
    sections = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).glob("*/section.json"))}
    return frames, sections


def assert_same_results(folder, other):
    (frames, sections), (other_frames, other_sections) = results(folder), results(other)
    assert list(frames) == list(other_frames)
    assert len(frames) == cheap.N_UNITS + 2
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(frame, other_frames[name], check_exact=True)
        assert frame.attrs.get("setting") == other_frames[name].attrs.get("setting")
    assert sections == other_sections


def worked(folder):
    """Names of the units that were computed, by whomever."""
    return [line.split()[1] for line in folder.with_suffix(".log").read_text().splitlines()]


def leftovers(folder):
    return [path for path in Path(folder).rglob(".*") if path.is_file()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    cheap.main(folder)
    return folder


def test_killed_ten_times_and_started_again_a_run_ends_as_if_nothing_had_happened(tmp_path, undisturbed, start):
    began = time.monotonic()
    finish(start(tmp_path / "timed"))
    takes = time.monotonic() - began
    folder, rng = tmp_path / "run", random.Random(0)
    for _ in range(10):
        process = start(folder)
        time.sleep(min(rng.uniform(0, takes), 2.5))
        process.kill()
        process.join()
        if len(results(folder)[0]) == cheap.N_UNITS + 2:
            for unit in rng.sample(cheap.units(cheap.CONFIG), 6):  # all done already: make work for the next kills
                RunFolder(folder).unit_file("numbers", unit).unlink()
    finish(start(folder))
    assert_same_results(folder, undisturbed)
    assert not leftovers(folder)
    begun = {line.split()[0] for line in folder.with_suffix(".log").read_text().splitlines()}
    assert len(begun) >= 3  # kills hit processes that were at work


def test_what_is_finished_is_not_done_again(tmp_path, undisturbed):
    folder = tmp_path / "run"
    cheap.main(folder)
    assert len(worked(folder)) == cheap.N_UNITS
    RunFolder(folder).unit_file("numbers", cheap.units(cheap.CONFIG)[3]).unlink()
    cheap.main(folder)
    assert worked(folder)[cheap.N_UNITS :] == [cheap.units(cheap.CONFIG)[3].name]
    assert_same_results(folder, undisturbed)


def test_sections_can_be_made_again_from_the_frames_alone(tmp_path, undisturbed):
    folder = tmp_path / "run"
    cheap.main(folder)
    for file in folder.glob("*/section.json"):
        file.rename(file.with_name(".section.1a2b3c4d.json"))  # as if killed before it was renamed
    cheap.main(folder)
    assert_same_results(folder, undisturbed)
    assert not leftovers(folder)


def test_other_settings_in_the_same_folder_are_refused_and_the_difference_is_named(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not cheap.claim(folder)
    assert cheap.claim(folder)
    before = (folder.path / "run.json").read_bytes()
    other = cheap.CONFIG.model_copy(update={"seed": 3, "n_test": 9})
    with pytest.raises(OtherRunError, match=r"config\.n_test: 50 there, 9 now\s+config\.seed: 0 there, 3 now"):
        cheap.claim(folder, other)
    with pytest.raises(OtherRunError, match=r"versions\.torch: not recorded there, '2' now"):
        folder.claim({"config": cheap.CONFIG.model_dump(mode="json"), "versions": {"torch": "2"}}, {})
    assert (folder.path / "run.json").read_bytes() == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OtherRunError, match="is not empty and holds no run"):
        cheap.claim(RunFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("full_at", [0, 5, cheap.N_UNITS + 1])
def test_a_full_disk_is_said_and_everything_before_stays_readable(tmp_path, undisturbed, monkeypatch, full_at):
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    write, written = Path.write_bytes, []

    def until_full(path, data):
        if path.suffix == ".parquet":
            if len(written) == full_at:
                write(path, data[:100])  # as much as there was room for
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            written.append(path)
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", until_full)
        with pytest.raises(DiskFullError, match=r"the disk is full\. Units finished so far are kept"):
            run(cheap.ALL, cheap.CONFIG, folder)
    frames, _ = results(folder.path)
    assert len(frames) == full_at
    assert not leftovers(folder.path)
    cheap.main(folder.path)  # room again
    assert_same_results(folder.path, undisturbed)


def fails(unit, context):
    raise ValueError("no such thing")


BROKEN = Experiment(name="broken", title="", source="", units=cheap.units, run=fails, section=cheap.section)
AFTER = Experiment(
    name="after",
    title="",
    source="",
    units=cheap.units,
    run=cheap.numbers,
    section=cheap.section,
    needs=lambda config: ("broken",),
)


def test_one_experiments_mistake_stops_what_needs_it_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    outcomes = {o.experiment.name: o for o in run([BROKEN, AFTER, *cheap.ALL], cheap.CONFIG, folder)}
    assert outcomes["broken"].failed == "ValueError: no such thing"
    assert outcomes["after"].failed == "needs broken, which failed"
    assert not outcomes["totals"].failed
    assert outcomes["broken"].traceback == folder.path / "broken" / "error.txt"
    reason, *lines = outcomes["broken"].traceback.read_text().splitlines()
    assert reason == "ValueError: no such thing"
    assert any("in fails" in line for line in lines)
    assert outcomes["after"].traceback is None  # it has none, and its file has the reason alone
    assert (folder.path / "after" / "error.txt").read_text() == "needs broken, which failed\n"
    assert not (folder.path / "broken" / "section.json").exists()


def test_what_cannot_run_is_skipped_with_its_reason_and_so_is_what_needs_it(tmp_path):
    from dataclasses import replace

    from caa_lens.report.runs import load_section

    able = replace(cheap.NUMBERS, skip=lambda config: "no data")
    assert skip_reasons([able, cheap.TOTALS], cheap.CONFIG) == {"numbers": "no data", "totals": "no data"}
    folder = RunFolder(tmp_path / "run")
    cheap.claim(folder)
    outcomes = run([able, cheap.TOTALS], cheap.CONFIG, folder)
    assert [outcome.skipped for outcome in outcomes] == ["no data", "no data"]
    assert load_section(folder.section_file("numbers")).skipped == "no data"
    assert not list(folder.path.glob("*/units/*"))


def test_what_is_needed_is_run_too_and_first():
    assert [one.name for one in with_needs([cheap.TOTALS], cheap.ALL, cheap.CONFIG)] == ["numbers", "totals"]
    assert [one.name for one in with_needs([cheap.NUMBERS], cheap.ALL, cheap.CONFIG)] == ["numbers"]


def test_units_of_odd_names_have_files_of_their_own(tmp_path):
    folder = RunFolder(tmp_path)
    names = [Unit.of(behavior="../../x"), Unit.of(behavior="a b"), Unit.of(m=0.5), Unit.of(m=-0.5), Unit.of()]
    files = [folder.unit_file("e", unit) for unit in names]
    assert len(set(files)) == len(files)
    assert all(file.parent == tmp_path / "e" / "units" for file in files)


def test_frames_are_put_together_with_their_units_arguments_in_the_order_of_the_units():
    frames = {Unit.of(behavior=b, part=1): pd.DataFrame({"x": [i], "part": [7]}) for i, b in enumerate("za")}
    rows = together(frames)
    assert rows.to_dict("list") == {"x": [0, 1], "part": [7, 7], "behavior": ["z", "a"]}
