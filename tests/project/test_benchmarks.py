"""The benchmarks that need a large machine stay runnable at a small size."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=BENCHMARKS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_full_size_runs_at_a_small_size_on_a_cpu():
    table = run("benchmarks/full_size.py", "--device", "cpu", "--dtype", "float32", "--pairs", "4", "--tokens", "3")
    for row in ("extraction, all layers", "sweep, 17 conditions", "generation, batch 8, steered"):
        assert row in table


def test_the_sweep_benchmark_agrees_with_the_naive_way():
    shown = run("benchmarks/sweep.py", "--questions", "1")
    difference = float(shown.split("largest difference from naive: ")[1].split(";")[0])
    assert difference < 1e-4
