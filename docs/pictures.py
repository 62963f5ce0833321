"""The pictures of what the library shows, on the demo model: one function of it each, on few pairs.

    python docs/pictures.py                   # all, in docs/images; three minutes of one core
    python docs/pictures.py lens transfer     # some

Needs a Chrome or Chromium, which draws (`notebooks/run.py`). Every picture has a sister for dark pages, `x_dark.png`.
The pictures of finished runs are made by `images/demo_picture.py`, `images/experiment_figures.py` and
`experiments/own/causal_lens.py --picture`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import plotly.graph_objects as go

import caa_lens as cl
from caa_lens.atomic_files import write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
from run import draw

IMAGES = Path(__file__).resolve().parent / "images"
N_TRAIN, N_TEST = 40, 10  # pairs to extract from, and to measure on
LAYER, MULTIPLIER = 18, 1.0  # where and how much is added
SOME_LAYERS = list(range(2, 30, 3))
TEXT = "The day began badly, with rain and a late bus, but the evening was lovely."
WIDTH, HEIGHT = 640, 420  # pixels of a page
DARK = "#1e2129"  # the page's own in dark mode


class Study:
    """What the pictures share, each computed when it is first asked for."""

    @cached_property
    def model(self):
        return cl.load_model("demo")

    @cached_property
    def pairs(self) -> tuple[cl.ContrastSet, cl.ContrastSet]:
        train, test = cl.ContrastSet.load("sentiment").split(test=20, seed=0)
        return train.sample(N_TRAIN, seed=0), test.sample(N_TEST, seed=0)

    @cached_property
    def activations(self):
        return cl.engine.pair_activations(self.model, self.pairs[0])

    @cached_property
    def vectors(self) -> cl.SteeringVectors:
        return cl.extract(self.model, self.pairs[0])

    def sweep(self) -> go.Figure:
        layers, multipliers = list(range(0, 30, 3)), [-2, -1, 0, 1, 2]
        return cl.sweep(self.model, self.pairs[1], self.vectors, layers=layers, multipliers=multipliers).plot()

    def lens(self) -> go.Figure:
        figure = cl.logit_lens(self.model, self.vectors, layers=[8, 14, 20, 26], reading="causal").plot(k=4)
        return figure.update_layout(width=860)

    def residual_lens(self) -> go.Figure:
        prompt = cl.prompts.Prompt.of(self.model, "How was the film?", "It was really")
        positions = range(len(prompt.tokens) - 4, len(prompt.tokens))
        steered = [(self.vectors[LAYER], -2.0)]
        return cl.residual_lens(
            self.model, prompt, vectors=steered, layers=list(range(15, 30)), positions=list(positions)
        ).plot()

    def similarity(self) -> go.Figure:
        return cl.token_similarity(self.model, TEXT, self.vectors, layers=SOME_LAYERS, raw_text=True).plot()

    def attribution(self) -> go.Figure:
        asked = [(f"{pair.question} In one word:", "Good", "Bad") for pair in self.pairs[1]]
        return cl.interpretation.attribute_logits(self.model, asked, self.vectors[LAYER], multiplier=MULTIPLIER).plot()

    def transfer(self) -> go.Figure:
        return cl.transfer_layers(self.model, self.pairs[1], self.vectors.at(SOME_LAYERS)).plot()

    def cosines(self) -> go.Figure:
        return cl.cosines(self.vectors).plot()

    def norms(self) -> go.Figure:
        return cl.interpretation.vector_norms(self.vectors, self.activations).plot()

    def reliability(self) -> go.Figure:
        return cl.reliability(self.activations).plot()


NAMES = ("sweep", "lens", "residual_lens", "similarity", "attribution", "transfer", "cosines", "norms", "reliability")
PICTURES: dict[str, Callable[[Study], go.Figure]] = {name: getattr(Study, name) for name in NAMES}


def light_and_dark(figure: go.Figure) -> list[go.Figure]:
    """A figure at a page's width, and the same for a dark page."""
    size = {"width": figure.layout.width or WIDTH, "height": figure.layout.height or HEIGHT}
    light = go.Figure(figure).update_layout(size)
    dark = go.Figure(light).update_layout(template="caa_lens_dark", paper_bgcolor=DARK, plot_bgcolor=DARK)
    return [light, dark]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PICTURES)}; all by default")
    names = parser.parse_args().names or list(PICTURES)
    study = Study()
    for name in names:
        figures = light_and_dark(PICTURES[name](study))
        for figure, ending in zip(figures, ("", "_dark"), strict=True):
            path = IMAGES / f"{name}{ending}.png"
            (png,) = draw([json.loads(figure.to_json())], finer=1.5)
            write_atomically(path, lambda file, png=png: file.write_bytes(png))
            print(f"{path.name}: {len(png) // 1000} kB", flush=True)


if __name__ == "__main__":
    main()
