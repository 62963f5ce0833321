"""`make bench` keeps what the engine saves, shows what got worse, and goes on where it was interrupted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """The scripts import each other by their bare names, as they do when they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench
    import history

    return bench, history


def a_run(history, date="2026-01-01T00:00:00+00:00", machine="a machine", wanted=(), **rows):
    made = {
        name: history.Ratio(turns=tuple(turns), ours=1.0, unit="CPU seconds", against="naively")
        for name, turns in rows.items()
    }
    return history.Run(
        date=date,
        commit="abc",
        identity="id",
        machine=machine,
        versions={"torch": "2.0"},
        settings={"quick": False},
        wanted=tuple(wanted or rows),
        rows=made,
    )


def verdicts(changes):
    return {change.name: change.verdict for change in changes}


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ([10, 10, 10], [9, 9, 9], "same"),
        ([10, 10, 10], [8.6, 8.6, 8.6], "same"),
        ([10, 10, 10], [8.4, 8.4, 8.4], "worse"),
        ([9.9, 10, 10.1], [8, 8.1, 9.8], "worse"),  # the spreads do not touch
        ([8, 10, 10], [8, 8, 8], "unclear"),  # they do: measured again
        ([10, 10, 10], [7, 7, 12], "unclear"),
        ([10, 10, 10], [12, 12, 12], "better"),
        ([10, 10, 12], [11.9, 11.9, 11.9], "same"),
    ],
)
def test_a_ratio_is_worse_when_it_fell_by_more_than_15_percent_beyond_the_spread(scripts, then, now, expected):
    _, history = scripts
    before, after = (next(iter(a_run(history, x=turns).rows.values())) for turns in (then, now))
    assert history.judge(after, before) == expected
    if expected == "unclear":
        assert history.judge(after, before, medians_alone=True) == "worse"


def test_every_row_is_compared_with_its_latest_run_on_this_machine(scripts):
    _, history = scripts
    days = [f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 5)]
    kept = [
        a_run(history, days[0], a=[10], b=[10]),
        a_run(history, days[1], a=[20]),
        a_run(history, days[2], "another", a=[90], c=[10], gone=[1]),
    ]
    changes = history.compare(a_run(history, days[3], a=[20], b=[5], c=[5], d=[1]), kept, ["a", "b", "c", "d"])
    assert verdicts(changes) == {"a": "same", "b": "worse", "c": "worse", "d": "new", "gone": "gone"}
    assert [change.name for change in history.failing(changes)] == ["b", "c", "gone"]
    assert [change.before.date for change in changes if change.before] == [days[1], days[0], days[2], days[2]]
    told = history.differences(a_run(history), kept[2])
    assert len(told) == 1
    assert "another" in told[0]
    assert history.differences(replace(kept[0], versions={"torch": "3.0"}), kept[0]) == ["torch was 2.0, now 3.0"]


def test_a_row_that_was_asked_for_and_not_measured_fails_and_one_not_asked_for_does_not(scripts):
    _, history = scripts
    kept = [a_run(history, a=[10], b=[10], c=[10])]
    run = a_run(history, "2026-02-01T00:00:00+00:00", wanted=("a", "b"), a=[10])
    changes = history.compare(run, kept, ["a", "b", "c"])
    assert verdicts(changes) == {"a": "same", "b": "not measured", "c": "not asked for"}
    assert [change.name for change in history.failing(changes)] == ["b"]


def test_a_run_is_not_compared_with_one_of_other_sizes_nor_with_itself(scripts):
    _, history = scripts
    run = a_run(history, a=[1])
    quick = replace(a_run(history, "2026-02-01T00:00:00+00:00", a=[9]), settings={"quick": True})
    assert verdicts(history.compare(run, [quick, run], ["a"])) == {"a": "other sizes"}
    assert verdicts(history.compare(run, [run], ["a"])) == {"a": "new"}


def test_a_history_is_read_as_it_was_written_and_a_damaged_line_is_named(scripts, tmp_path):
    _, history = scripts
    file, runs = tmp_path / "h.jsonl", [a_run(history, a=[1.5, 2]), a_run(history, "2026-02-01", b=[3])]
    for run in (runs[0], runs[1], runs[1].with_row("c", runs[0].rows["a"])):
        history.keep(file, run)
    found = history.read(file)
    assert found[0] == runs[0]
    assert list(found[1].rows) == ["b", "c"]
    assert len(found) == 2
    assert [one.name for one in tmp_path.iterdir()] == ["h.jsonl"]
    for line in ("{", "{}", json.dumps({**json.loads(file.read_text().splitlines()[0]), "rows": {"a": {"turns": []}}})):
        damaged = tmp_path / "damaged.jsonl"
        damaged.write_text(file.read_text() + line + "\n")
        with pytest.raises(ValueError, match=r"damaged\.jsonl, line 3: expected a run"):
            history.read(damaged)


def stand_in(bench, seconds, calls=None, turns=3):
    """A row that takes no time: naive 1 s, ours as the list says, from its last turn on."""

    def prepare(quick):
        def turn():
            if calls is not None:
                calls.append(seconds)
            if isinstance(seconds, BaseException):
                raise seconds
            return 1.0, seconds

        return turn

    return bench.Row(against="naively", prepare=prepare, turns=turns)


def test_a_planted_slowdown_is_shown_by_name_and_fails(scripts, tmp_path, capsys):
    bench, _ = scripts
    file, now = tmp_path / "h.jsonl", ["--against", str(tmp_path / "h.jsonl"), "--history", str(tmp_path / "new.jsonl")]
    assert bench.main({"a": stand_in(bench, 0.1), "b": stand_in(bench, 0.2)}, ["--history", str(file)]) == 0
    assert bench.main({"a": stand_in(bench, 0.1), "b": stand_in(bench, 0.21)}, now) == 0
    (tmp_path / "new.jsonl").unlink()
    capsys.readouterr()
    assert bench.main({"a": stand_in(bench, 0.1), "b": stand_in(bench, 0.4)}, now) == 1
    shown = capsys.readouterr()
    assert "worse, gone or not measured: b\n" in shown.err
    assert "| b | 5 (5 to 5) | 2.5 (2.5 to 2.5) | -50% | worse |" in shown.out
    assert "| a | 10 (10 to 10) | 10 (10 to 10) | +0% | same |" in shown.out


def test_work_done_twice_is_noticed_in_cpu_seconds_of_real_work(scripts, tmp_path):
    bench, _ = scripts
    from timing import cpu_seconds

    def row(n):
        def work():
            return sum(range(400_000))

        def prepare(quick):
            return lambda: (cpu_seconds(work), cpu_seconds(lambda: [work() for _ in range(n)]))

        return bench.Row(against="once", prepare=prepare)

    file = str(tmp_path / "h.jsonl")
    assert bench.main({"a": row(1)}, ["--history", file]) == 0
    assert bench.main({"a": row(2)}, ["--history", str(tmp_path / "new.jsonl"), "--against", file]) == 1


def test_an_unclear_row_is_measured_again_with_twice_the_turns(scripts, tmp_path, capsys):
    bench, history = scripts
    file, taken = tmp_path / "h.jsonl", []
    assert bench.main({"a": stand_in(bench, 0.1)}, ["--history", str(file)]) == 0
    times = iter([0.2, 0.2, 0.09, *[0.1] * 6])

    def prepare(quick):
        return lambda: (1.0, taken.append(0) or next(times))

    row = bench.Row(against="naively", prepare=prepare, turns=3)
    new = ["--history", str(tmp_path / "new.jsonl"), "--against", str(file)]
    assert bench.main({"a": row}, new) == 0
    assert len(taken) == 9
    assert "unclear, measured again with twice the turns: a" in capsys.readouterr().out
    assert len(history.read(tmp_path / "new.jsonl")[0].rows["a"].turns) == 6


def test_an_interrupted_run_keeps_its_rows_and_goes_on_with_the_others(scripts, tmp_path, capsys):
    bench, history = scripts
    file, first, second = tmp_path / "h.jsonl", [], []
    words = ["--history", str(file)]
    interrupted = {"a": stand_in(bench, 0.1, first), "b": stand_in(bench, KeyboardInterrupt())}
    assert bench.main(interrupted, words) == 130
    assert "1 rows are kept" in capsys.readouterr().out
    assert [list(run.rows) for run in history.read(file)] == [["a"]]
    assert bench.main({"a": stand_in(bench, 0.1, first), "b": stand_in(bench, 0.2, second)}, words) == 0
    assert len(first) == len(second) == 3
    (run,) = history.read(file)
    assert list(run.rows) == ["a", "b"]
    assert not run.left
    assert bench.main({"a": stand_in(bench, 0.1, first), "b": stand_in(bench, 0.2)}, words) == 0  # a new one
    assert len(history.read(file)) == 2
    assert len(first) == 6


def test_a_run_of_other_sources_is_not_gone_on_with(scripts, tmp_path, monkeypatch):
    bench, history = scripts
    file, words = tmp_path / "h.jsonl", ["--history", str(tmp_path / "h.jsonl")]
    bench.main({"a": stand_in(bench, 0.1), "b": stand_in(bench, KeyboardInterrupt())}, words)
    (run,) = history.read(file)
    history.write(file, [replace(run, identity="of other sources")])
    bench.main({"a": stand_in(bench, 0.1), "b": stand_in(bench, 0.2)}, words)
    assert [list(one.rows) for one in history.read(file)] == [["a"], ["a", "b"]]


def test_a_row_that_fails_is_said_and_the_others_are_measured(scripts, tmp_path, capsys):
    bench, history = scripts
    file = tmp_path / "h.jsonl"
    rows = {
        "a": stand_in(bench, ValueError("a score differs")),
        "b": stand_in(bench, bench.Skip("not here")),
        "c": stand_in(bench, 1.0),
    }
    assert bench.main(rows, ["--history", str(file)]) == 1
    shown = capsys.readouterr()
    assert "a: a score differs" in shown.out
    assert "b: skipped: not here" in shown.out
    assert "measured: a\n" in shown.err
    assert list(history.read(file)[0].rows) == ["c"]


def test_the_kept_history_can_be_read_and_has_every_row(scripts):
    _, history = scripts
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    latest = history.read(ROOT / "benchmarks" / "history.jsonl")[-1]
    assert sorted(latest.rows) == sorted(done.stdout.split("\n")[:-1])
    assert not latest.left


def test_a_row_runs_quickly_and_agrees_with_the_naive_way(tmp_path):
    command = ["benchmarks/bench.py", "--quick", "--only", "sweep, completions", "--history", str(tmp_path / "h.jsonl")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "h.jsonl").read_text())["rows"].values()
    assert min(row["turns"]) > 1.5  # far below what is measured in full
