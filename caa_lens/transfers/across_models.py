"""One model's vectors in another model: their cosine by layer and their effect by layer.

Source: the paper's Figures 9 and 10, base vectors in the chat model. The two models need never be in memory together:
extract with the one, save; load the other::

    base = cl.load_model("meta-llama/Llama-2-7b-hf")
    cl.extract(base, train).save("base.safetensors")
    del base
    chat = cl.load_model("meta-llama/Llama-2-7b-chat-hf")
    result = cl.transfer_models(chat, test, cl.extract(chat, train), cl.SteeringVectors.load("base.safetensors"))

Vectors of a model of another width, or of another training run, stand in another basis: carry them over by a
`ResidualMap` first (see `residual_map`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from caa_lens.arguments import check_list
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.interpretation.vector_cosines import Cosines, cosines
from caa_lens.measures.answers import METRIC_LABEL, score_answers
from caa_lens.measures.intervals import mean_with_interval
from caa_lens.measures.training_pairs import warn_of_training_pairs
from caa_lens.models.checks import check_layers, check_model
from caa_lens.plots.transfers import model_effects
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention
from caa_lens.transfers.effects import check_measure, measured
from caa_lens.vectors.checks import check_vector_set
from caa_lens.vectors.steering_vectors import SteeringVectors

SIZES = ("keep", "own")
ORIGINS = ("own", "foreign")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelTransfer(Result):
    """Effects of a model's own vectors and of foreign ones, layer by layer.

    Attributes:
        frame: columns `behavior, vectors, layer, multiplier, question, score, effect, cosine`; `vectors` is "own" or
            "foreign", `effect` is (score - unsteered score of the question) / multiplier, in the metric's units,
            `cosine` is that of the own and the foreign vector of the layer.
        settings: the size rule among them.
        provenance: of the vectors, "own" and "foreign".
        metric: "p_matching" or "margin".
        unsteered: mean score without steering.
        d_model: the vectors' width, which says what cosines chance gives.
    """

    metric: str
    unsteered: float
    d_model: int

    def table(self) -> pd.DataFrame:
        """Mean effect over questions: one row a layer, one column the vectors' origin and the multiplier."""
        return self.summary(n_resamples=0).pivot(index="layer", columns=["vectors", "multiplier"], values="mean")

    def summary(self, value: str = "effect", n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """Mean of `effect` or `score` with its 95 % interval: `vectors, layer, multiplier, mean, low, high`."""
        if not isinstance(value, str) or value not in ("effect", "score"):
            raise ValueError(f"got value={value!r}, expected 'effect' or 'score'")
        cells = ["vectors", "layer", "multiplier"]
        return mean_with_interval(self.frame, cells, value, n_resamples=n_resamples, seed=seed)

    def cosines(self) -> Cosines:
        """Cosine of the own and the foreign vector, by layer."""
        by_layer = self.frame[["layer", "cosine"]].drop_duplicates("layer", ignore_index=True)
        both = {"vectors": self.provenance["own"], "other": self.provenance["foreign"]}
        return Cosines(frame=by_layer, d_model=self.d_model, provenance=both)

    def plot(self) -> go.Figure:
        """Score by layer at every multiplier, own and foreign vectors, with intervals; as the paper's Figure 10."""
        return model_effects(
            self.summary("score"),
            behavior=self.provenance["own"].behavior,
            own=self.provenance["own"].model,
            foreign=self.provenance["foreign"].model,
            label=METRIC_LABEL[self.metric],
            unsteered=self.unsteered,
        )

    def plot_cosine(self) -> go.Figure:
        """Cosine by layer, as the paper's Figure 9."""
        return self.cosines().plot()

    def __repr__(self) -> str:
        means = self.summary(n_resamples=0).groupby("vectors")["mean"].mean()
        effects = ", ".join(f"{origin} {means[origin]:.4f}" for origin in ORIGINS)
        return (
            f"ModelTransfer({self.provenance['foreign'].model} in {self.provenance['own'].model}, {self.metric}, "
            f"{self.frame['layer'].nunique()} layers, mean effect {effects})"
        )


def transfer_models(
    model: Any,
    test: ContrastSet,
    own: SteeringVectors,
    foreign: SteeringVectors,
    *,
    multipliers: Sequence[float | int] = (-1.0, 1.0),
    layers: Sequence[int] | None = None,
    size: str = "keep",
    measure: str | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> ModelTransfer:
    """Score a test set under a model's own vectors and under another model's, each at its own layer.

    Args:
        own: the model's own vectors, for comparison.
        foreign: the other model's vectors in this model's basis: as they are between a base model and its finetunes,
            else after `ResidualMap.carry`.
        layers: those that both have by default.
        size: "keep", or "own" to rescale every foreign vector to the norm of the own one (maps shrink vectors).
        measure: see `transfer`.

    Raises:
        ValueError: if the foreign vectors have another width, no layer in common, or for an unknown size.

    Warns:
        TrainingPairsWarning: if either vectors were extracted from some of the pairs.
    """
    check_model(model)
    check_contrast_set(test)
    check_vector_set(own)
    check_vector_set(foreign)
    check_measure(test, measure)
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    if foreign.d_model != model.cfg.d_model:
        raise ValueError(
            f"vectors of {foreign.provenance.model} have d_model={foreign.d_model}, but {model.cfg.model_name} has "
            f"d_model={model.cfg.d_model}: fit a linear map on both models' activations of the same pairs with "
            "fit_residual_map, and give its .carry(vectors)"
        )
    warn_of_training_pairs(test, own, foreign)
    multipliers = check_list("multipliers", multipliers, float)
    if not multipliers:
        raise ValueError("no multipliers given: expected at least one number")
    layers = check_layers(model, [x for x in own.layers if x in foreign] if layers is None else layers)
    alike = cosines(own.at(layers), foreign.at(layers), same_layer=True).frame.set_index("layer")["cosine"]
    vectors = {"own": own, "foreign": foreign}
    cells = [(origin, layer, m) for origin in ORIGINS for layer in layers for m in multipliers]
    conditions = []
    for origin, layer, m in cells:
        vector = vectors[origin][layer]
        vector = vector.normalized(to=own[layer].norm) if (origin, size) == ("foreign", "own") else vector
        conditions.append((Intervention(vector=vector, multiplier=m),))
    scores = score_answers(
        model,
        test,
        [(), *conditions],
        prompt_format=prompt_format,
        system=system,
        max_tokens=max_tokens,
        progress=progress,
    )
    metric, values = measured(scores, measure)  # [pair condition]
    n_pairs = len(test)
    unit = np.array([float(m) or 1.0 for _, _, m in cells])
    frame = pd.DataFrame(
        {
            "behavior": own.behavior,
            "vectors": np.repeat([origin for origin, _, _ in cells], n_pairs),
            "layer": np.repeat([layer for _, layer, _ in cells], n_pairs),
            "multiplier": np.repeat([float(m) for _, _, m in cells], n_pairs),
            "question": np.tile(np.arange(n_pairs), len(cells)),
            "score": values[:, 1:].T.flatten(),
            "effect": ((values[:, 1:] - values[:, :1]) / unit).T.flatten(),
            "cosine": np.repeat([alike[layer] for _, layer, _ in cells], n_pairs),
        }
    )
    return ModelTransfer(
        frame=frame,
        settings={**scores.settings, "size": size},
        provenance={"own": own.provenance, "foreign": foreign.provenance},
        metric=metric,
        unsteered=float(values[:, 0].mean()),
        d_model=own.d_model,
    )
