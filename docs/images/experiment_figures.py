"""Figures of a finished run of experiments, as pictures for the pages.

    python -m experiments all --model demo
    python docs/images/experiment_figures.py runs/paper-demo docs/images

    python -m experiments compare_methods --model demo --behaviors sentiment,formality --n-test 24 --out runs/methods
    python docs/images/experiment_figures.py runs/methods docs/images

    python -m experiments does_reliability_predict --model demo --out runs/reliability
    python docs/images/experiment_figures.py runs/reliability docs/images

Needs a Chrome or Chromium, like `notebooks/run.py`, which draws.
"""

import json
import sys
from pathlib import Path

from caa_lens.atomic_files import write_atomically
from caa_lens.report.runs import load_section

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from run import draw

CHOSEN = {
    "layer_sweep": 0,
    "multipliers": 0,
    "cross_layer_cosines": 0,
    "vector_transfer": 0,
    "compare_methods": None,
    "does_reliability_predict": 0,
}
"""Which figure of which experiment, of those that the run has; None: all, by the behavior that a title begins with."""
WIDTHS = {
    "compare_methods": 760,
    "does_reliability_predict": 800,
}  # in pixels


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    figures, names = [], []
    for name, index in CHOSEN.items():
        if not (folder / name / "section.json").exists():
            continue
        for i, figure in enumerate(load_section(folder / name / "section.json").figures):
            if index not in (None, i):
                continue
            if name in WIDTHS:
                figure.update_layout(width=WIDTHS[name])
            of = "" if index is not None else "_" + figure.layout.meta["title"].split(":")[0].replace(" ", "_")
            figures.append(json.loads(figure.to_json()))
            names.append(f"experiment_{name}{of}.png")
    for name, png in zip(names, draw(figures), strict=True):
        write_atomically(out / name, lambda file, png=png: file.write_bytes(png))


if __name__ == "__main__":
    main()
