"""Vectors in rows, test sets in columns: does a vector of one behavior, or of one kind of prompt, act on another?

`transfer_behaviors`   what behavior A's vector does to behavior B's test set
`transfer_prompts`     a vector extracted with one prompt format and system prompt, used with another

An effect is the change of the log-probability margin against the unsteered model, per unit of multiplier, in nats per
token: for answer letters log p(positive letter) - log p(negative letter), for completions the difference of the mean
log-probabilities per token. One unit for both kinds, so that the columns can stand side by side; their sizes still
differ, as one letter is not a sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from caa_lens.arguments import as_multiplier, check_count, describe
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.interpretation.vector_cosines import cosines
from caa_lens.measures.answers import score_answers
from caa_lens.measures.training_pairs import warn_of_training_pairs
from caa_lens.models.checks import check_layers, check_model
from caa_lens.plots.transfers import grid_by_cosine, grid_heatmap
from caa_lens.prompts.prompt_formats import PromptFormat, resolve_format
from caa_lens.provenance import last_part
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention
from caa_lens.transfers.effects import effect_summary, effect_table
from caa_lens.vectors.checks import check_vector_set
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVectors

SHARED = ("model", "dtype")  # the settings of a score that every test set of a grid has alike


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSetting:
    """How a question is put: a prompt format (the model's own by default) and a system prompt (none)."""

    prompt_format: PromptFormat | str | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferGrid(Result):
    """A finished grid.

    Attributes:
        frame: columns `source, target, question, margin, effect, cosine`: the vector's name, the test set's, its
            question, the steered margin, the change per unit of multiplier, and the cosine of the source's vector with
            the target's, NaN where no vector has the test set's name.
        settings: those that all test sets share, the multiplier among them.
        provenance: of the vectors, by source.
        layer: the 0-based block at which all vectors were added.
        unsteered: mean margin without steering, by target.
        tests: the other settings, by target: the test set and its hash, how its questions were put.
    """

    layer: int
    unsteered: Mapping[str, float]
    tests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """Mean effect over questions: one row a vector, one column a test set, in the order they were given."""
        return effect_table(self.frame).loc[list(self.provenance), list(self.unsteered)]

    def summary(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """Mean effect with its 95 % bootstrap interval over questions: `source, target, mean, low, high, cosine`."""
        by_test = self.frame.groupby("target", sort=False)  # test sets may differ in size
        return pd.concat([effect_summary(rows, n_resamples, seed) for _, rows in by_test], ignore_index=True)

    def plot(self) -> go.Figure:
        """Heat map with the effects written in; a vector on its own test set is framed; intervals on hover."""
        return grid_heatmap(self.summary(), self.table(), layer=self.layer, unsteered=self.unsteered, model=self._model)

    def plot_cosine(self) -> go.Figure:
        """Effect against the cosine of the two vectors, one point a cell off the diagonal."""
        return grid_by_cosine(self.summary(), layer=self.layer, model=self._model)

    @property
    def _model(self) -> str:
        """The test sets are answered by one model."""
        return last_part(self.settings.get("model", ""))

    def __repr__(self) -> str:
        return f"TransferGrid(layer={self.layer}, effect in nats per token)\n{self.table().round(3).to_string()}"


def transfer_behaviors(
    model: Any,
    tests: Mapping[str, ContrastSet],
    vectors: Mapping[str, SteeringVectors],
    *,
    layer: int,
    multiplier: float | int = 1.0,
    setting: PromptSetting | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> TransferGrid:
    """Score every behavior's test set under every behavior's vector at one layer.

    Args:
        tests, vectors: by the behavior's name. For sizes that compare, give vectors after
            `normalize_across_behaviors`, as the paper does.

    Raises:
        ValueError: for no tests or vectors, or a behavior without a vector of the layer.

    Warns:
        TrainingPairsWarning: if any of the vectors was extracted from some of the pairs of a test set.
    """
    check_model(model)
    for what, given in (("tests", tests), ("vectors", vectors)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must be a mapping by the behavior's name, got {describe(given)}")
    for each in vectors.values():
        check_vector_set(each)
    if setting is not None:
        _check_settings(model, {"setting": setting})
    for name, test in tests.items():
        warn_of_training_pairs(test, *vectors.values(), name=name)
    columns = {name: (test, setting or PromptSetting()) for name, test in tests.items()}
    return _grid(model, columns, vectors, layer, multiplier, max_tokens, progress)


def transfer_prompts(
    model: Any,
    train: ContrastSet,
    test: ContrastSet,
    settings: Mapping[str, PromptSetting],
    *,
    layer: int,
    multiplier: float | int = 1.0,
    max_tokens: int | None = None,
    progress: bool = True,
) -> TransferGrid:
    """Extract a vector in every prompt setting, and score the test set in every setting under every vector.

    Args:
        settings: by a name of your choice, e.g.
            `{"plain": PromptSetting(), "brief": PromptSetting(system="Be brief.")}`.

    Warns:
        TrainingPairsWarning: if pairs of the test set are in the training set.
    """
    check_model(model)
    check_contrast_set(train)
    check_contrast_set(test)
    (layer,) = check_layers(model, [layer])
    multiplier = as_multiplier(multiplier)
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    _check_settings(model, settings)
    vectors = {
        name: extract(
            model, train, layers=[layer], prompt_format=how.prompt_format, system=how.system, progress=progress
        )
        for name, how in settings.items()
    }
    warn_of_training_pairs(test, *vectors.values())
    columns = {name: (test, how) for name, how in settings.items()}
    return _grid(model, columns, vectors, layer, multiplier, max_tokens, progress)


def _check_settings(model: Any, settings: Mapping[str, PromptSetting]) -> None:
    if not isinstance(settings, Mapping) or not all(isinstance(how, PromptSetting) for how in settings.values()):
        raise TypeError(f"settings must be PromptSettings by name, as {{'plain': PromptSetting()}}, got {settings!r}")
    for how in settings.values():
        resolve_format(model, how.prompt_format)


def _grid(
    model: Any,
    columns: Mapping[str, tuple[ContrastSet, PromptSetting]],
    vectors: Mapping[str, SteeringVectors],
    layer: int,
    multiplier: float | int,
    max_tokens: int | None,
    progress: bool,
) -> TransferGrid:
    check_model(model)
    multiplier = as_multiplier(multiplier)
    for test, _ in columns.values():
        check_contrast_set(test)
    if not columns:
        raise ValueError("no test sets given: expected at least one by name")
    alike = cosines(vectors, layer=layer).summary()  # refuses what has no vector of the layer
    no_cosine = pd.Series(np.nan, index=alike.index)
    conditions = [(Intervention(vector=each[layer], multiplier=multiplier),) for each in vectors.values()]
    frames, unsteered, tests = [], {}, {}
    settings = {"multiplier": f"{multiplier:g}"}
    for name, (test, how) in columns.items():
        scores = score_answers(
            model,
            test,
            [(), *conditions],
            prompt_format=how.prompt_format,
            system=how.system,
            max_tokens=max_tokens,
            progress=progress,
        )
        margins = (scores.positive - scores.negative).numpy()  # [pair condition]
        frames.append(
            pd.DataFrame(
                {
                    "source": np.repeat(list(vectors), len(test)),
                    "target": name,
                    "question": np.tile(np.arange(len(test)), len(vectors)),
                    "margin": margins[:, 1:].T.flatten(),
                    "effect": ((margins[:, 1:] - margins[:, :1]) / (multiplier or 1)).T.flatten(),
                    "cosine": np.repeat(alike.get(name, no_cosine).to_numpy(), len(test)),
                }
            )
        )
        unsteered[name] = float(margins[:, 0].mean())
        settings |= {key: scores.settings[key] for key in SHARED}
        tests[name] = {key: value for key, value in scores.settings.items() if key not in SHARED}
    return TransferGrid(
        frame=pd.concat(frames, ignore_index=True),
        settings=settings,
        provenance={name: each.provenance for name, each in vectors.items()},
        layer=layer,
        unsteered=unsteered,
        tests=tests,
    )
