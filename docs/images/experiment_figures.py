"""Figures of a finished run of experiments, as pictures for the pages.

    python -m experiments all --model demo
    python docs/images/experiment_figures.py runs/paper-demo docs/images

    python -m experiments compare_methods --model demo --behaviors sentiment,formality --n-test 24 --out runs/methods
    python docs/images/experiment_figures.py runs/methods docs/images

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
    "layer_sweep": {"": 0},
    "multipliers": {"": 0},
    "cross_layer_cosines": {"": 0},
    "vector_transfer": {"": 0},
    "compare_methods": {"_sentiment": 0, "_formality": 1, "_upper_case": 2},
}
"""Which figures of which experiments, by the end of the picture's name; of those that the run has."""
WIDTHS = {"compare_methods": 600}  # in pixels of a page; a picture has 1.5 times as many


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    figures, names = [], []
    for name, chosen in CHOSEN.items():
        if not (folder / name / "section.json").exists():
            continue
        found = load_section(folder / name / "section.json").figures
        for end, index in chosen.items():
            figure = json.loads(found[index].to_json())
            if name in WIDTHS:
                figure["layout"]["width"] = WIDTHS[name]
            figures.append(figure)
            names.append(f"experiment_{name}{end}.png")
    for name, png in zip(names, draw(figures), strict=True):
        write_atomically(out / name, lambda file, png=png: file.write_bytes(png))


if __name__ == "__main__":
    main()
