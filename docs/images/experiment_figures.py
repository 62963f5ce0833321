"""Figures of a finished run of experiments, as pictures for the pages.

    python -m experiments all --model demo
    python docs/images/experiment_figures.py runs/paper-demo docs/images

Needs a Chrome or Chromium, like `notebooks/run.py`, which draws.
"""

import json
import sys
from pathlib import Path

from caa_lens.atomic_files import write_atomically
from caa_lens.report.runs import load_section

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from run import draw

CHOSEN = {"layer_sweep": 0, "multipliers": 0, "cross_layer_cosines": 0, "vector_transfer": 0}
"""Which figure of which experiment."""


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    sections = {name: load_section(folder / name / "section.json") for name in CHOSEN}
    figures = [json.loads(sections[name].figures[index].to_json()) for name, index in CHOSEN.items()]
    for name, png in zip(CHOSEN, draw(figures), strict=True):
        write_atomically(out / f"experiment_{name}.png", lambda file, png=png: file.write_bytes(png))


if __name__ == "__main__":
    main()
