"""What a run folder is held to: settings, data and library versions; and what is noted beside them."""

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.behavior_sets import behavior_sets
from experiments.settings import RunConfig

LIBRARIES = ("caa-lens", "torch", "transformer-lens", "transformers", "numpy", "pandas", "scikit-learn")


def run_identity(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Everything that must not change while a run goes on."""
    hashes = {}
    for behavior in config.behaviors:
        sets = behavior_sets(config, behavior)
        hashes[f"{behavior}/generate"] = sets.generate.content_hash
        hashes[f"{behavior}/test"] = sets.test.content_hash
    return {
        "config": config.model_dump(mode="json"),
        "data": hashes,
        "versions": {library: version(library) for library in LIBRARIES},
    }


def run_notes(experiments: Sequence[str]) -> dict[str, Any]:
    """When and from what code a run began, and the order of its report."""
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "experiments": [*experiments],
    }


def _commit() -> str | None:
    """The commit of this code, `+` behind it if there are changes; None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
