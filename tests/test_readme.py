"""The README's code runs as pasted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
RUNNABLE = [block for block in BLOCKS if "# needs a GPU" not in block]


def test_the_readme_has_code_for_the_demo_model_and_for_a_gpu():
    assert len(RUNNABLE) == 1
    assert len(BLOCKS) == 2
    assert len([line for line in RUNNABLE[0].splitlines() if line.strip()]) <= 22


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_readme_is_valid_python(block):
    compile(block, "README.md", "exec")


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readme_names_only_what_exists(block):
    import caa_lens

    for name in re.findall(r"\bcl\.(\w+)", block):
        assert hasattr(caa_lens, name), f"README uses cl.{name}"


def test_the_readmes_code_runs_as_pasted(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUNNABLE[0]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "SteeringVectors(sentiment, layers=0-29" in done.stdout
    assert "promoted" in done.stdout
    assert (tmp_path / "sentiment.safetensors").exists()


def test_every_link_to_a_file_of_the_project_leads_somewhere():
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"
