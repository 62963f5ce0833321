"""Frames of runs whose means are known, and what a section says of them, computed a second time."""

import numpy as np
import pandas as pd
import torch

from caa_lens.engine.pair_reading import PairActivations
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.paper.numbers import published
from caa_lens.provenance import Provenance
from experiments.catalogue import EXPERIMENTS
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
NBSP = "\N{NO-BREAK SPACE}"
PAPER_7B = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", "paper", behaviors=("refusal", "hallucination"))
N = 9
SPREAD = np.array([3.0, -1, 0.5, 2, -4, 1, -2.5, 4, -3])  # of the questions: sums to 0, its median is not 0


def scores_of(levels, names, metric="margin", **columns):
    """Rows of a run: {labels of a cell: mean}. A question's spread grows with its cell, so that intervals are wide."""
    parts = []
    for i, (key, mean) in enumerate(levels.items()):
        labels = dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
        scores = mean + 0.01 * (i + 1) * SPREAD
        parts.append(pd.DataFrame({**labels, "question": range(N), "metric": metric, "score": scores, **columns}))
    return pd.concat(parts, ignore_index=True)


def values_of(frame, column="score", **cell):
    for name, value in cell.items():
        frame = frame[frame[name] == value]
    return frame.sort_values("question")[column].to_numpy()


def with_interval(values):
    (low,), (high,) = bootstrap_interval(np.asarray(values)[:, None])
    return float(np.mean(values)), low, high


def effect_of(frame, **cell):
    return with_interval(values_of(frame, multiplier=1.0, **cell) - values_of(frame, multiplier=-1.0, **cell))


def cell_text(frame, digits=3, **cell):
    mean, low, high = with_interval(values_of(frame, **cell))
    return f"{mean:.{digits}f} [{low:.{digits}f},{NBSP}{high:.{digits}f}]"


def section_of(name, frames, config):
    """An experiment's section, which has the experiment's own heading."""
    section = BY_NAME[name].section(frames, config)
    assert (section.title, section.source) == (BY_NAME[name].title, BY_NAME[name].source)
    return section


def tables_of(section):
    return dict(section.captioned_tables())


def swept(best, n_layers=5, metric="margin", scale=1.0):
    """A layer sweep whose largest effect is at `best`; layer 0 works the other way round."""
    effects = {x: scale * (-2.0 if x == 0 else 1.0 / (1 + abs(x - best))) for x in range(n_layers)}
    levels = {(-1, 0.0): 0.2} | {(x, m): 0.2 + m * effect / 2 for x, effect in effects.items() for m in (-1.0, 1.0)}
    frame = scores_of(levels, ["layer", "multiplier"], metric)
    frame.attrs["n_layers"] = n_layers
    return frame


def paper_scores(table, columns):
    """Frames of units whose means are the paper's own numbers of a table, `columns` being what parts the units."""
    numbers = published(table, PAPER_7B.model_name)
    frames = {}
    for key, rows in numbers.groupby(columns, sort=False):
        rest = [name for name in ("layer", "multiplier") if name in rows]
        levels = dict(zip(map(tuple, rows[rest].to_numpy()), rows["value"], strict=True))
        frame = scores_of(levels, rest, "p_matching").assign(category="c", source=13)
        frame["layer"] = frame["layer"].astype(int) if "layer" in frame else 13
        frame.attrs["n_layers"] = 32
        frames[Unit.of(**dict(zip(columns, key, strict=True)))] = frame
    return frames, len(numbers)


def random_activations(layers, n_pairs=12):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n_pairs, 2, len(layers), 8, generator=generator)
    values[:, 0] += torch.linspace(0, 3, len(layers))[:, None]
    return PairActivations(
        values=values,
        norms=values.norm(dim=-1),
        layers=layers,
        letters=(("A", "B"), ("B", "A")) * (n_pairs // 2),
        provenance=Provenance(model="chat", behavior="refusal"),
    )
