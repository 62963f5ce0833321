"""A vector of one layer, added at another: the whole matrix of layers by layers.

Cell (i, j) is the effect of layer i's vector added at layer j: the change of the score against the unsteered model,
per unit of multiplier or of norm. The diagonal is the sweep's own. Source: paper section 7 and Figure 8, which adds the
vector of one layer at all others and keeps its norm.

Norms grow with depth, so an early vector at a late layer is a small push. `size` says what is done about that:

    "keep"     the vector as it is (the paper's)
    "target"   rescaled to the norm of the target layer's own vector
    a number   rescaled to that share of the residual stream's mean norm at the target layer, e.g. 0.1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from caa_lens.arguments import as_float, as_multiplier
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.interpretation.vector_cosines import cosines
from caa_lens.measures.answers import METRIC_LABEL, score_answers
from caa_lens.measures.intervals import mean_with_interval
from caa_lens.measures.training_pairs import warn_of_training_pairs
from caa_lens.models.checks import check_layers, check_model
from caa_lens.plots.transfers import decay_curves, layer_heatmap, layers_by_cosine
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.provenance import last_part
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention
from caa_lens.stops import kept_if_stopped
from caa_lens.transfers.effects import check_measure, effect_summary, effect_table, measured
from caa_lens.vectors.checks import check_vector_set
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

SIZES = ("keep", "target")
UNITS = ("multiplier", "norm")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTransfer(Result):
    """A finished matrix.

    Attributes:
        frame: columns `behavior, source, target, norm, question, score, effect, cosine`; `norm` is of the vector that
            was added at multiplier 1, `effect` is (score - unsteered score of the question) / multiplier, in the
            metric's units, and if so asked for divided by `norm` too. With multiplier 0 it is the plain difference.
            `cosine` is that of the source layer's vector with the target layer's own; NaN where there is none.
        settings: the multiplier and the size rule among them.
        provenance: of the `vectors`.
        metric: "p_matching" or "margin".
        unsteered: mean score without steering.
    """

    metric: str
    unsteered: float

    def table(self) -> pd.DataFrame:
        """Mean effect over questions: one row a source layer, one column a target layer."""
        return effect_table(self.frame)

    def summary(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """Mean effect with its 95 % bootstrap interval over questions: `source, target, mean, low, high, cosine`."""
        return effect_summary(self.frame, n_resamples, seed)

    def best_targets(self) -> pd.DataFrame:
        """For each source layer the target with the largest mean effect: `source, target, effect, own_effect`.

        The target is chosen on the questions that its effect is of, which flatters it beside the source's own.
        """
        table = self.table()
        own = [table.loc[layer, layer] if layer in table.columns else np.nan for layer in table.index]
        return pd.DataFrame(
            {
                "source": table.index,
                "target": table.idxmax(axis=1).to_numpy(),
                "effect": table.max(axis=1).to_numpy(),
                "own_effect": own,
            }
        )

    def reach(self) -> pd.DataFrame:
        """How far a vector carries: `source, up, down`, the distance at which its effect first falls to half its own.

        In layers, upwards and downwards; NaN where it never does, or where the effect at its own layer is not positive.
        """
        table = self.table()
        rows = []
        for source in table.index:
            if source not in table.columns:
                continue
            own = table.loc[source, source]
            halved = [target for target in table.columns if own > 0 and table.loc[source, target] <= own / 2]
            up = min((target - source for target in halved if target > source), default=np.nan)
            down = min((source - target for target in halved if target < source), default=np.nan)
            rows.append({"source": source, "up": up, "down": down})
        return pd.DataFrame(rows, columns=["source", "up", "down"])

    def decay(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """Mean effect by distance: `distance, mean, low, high, n_sources`, `distance` = target - source in layers.

        The mean is over the sources that have a target at the distance, so the far ends speak of few layers.
        """
        cells = self.frame.assign(distance=self.frame["target"] - self.frame["source"])
        each = cells.groupby(["distance", "question"])["effect"].mean().reset_index()
        curve = mean_with_interval(each, ["distance"], "effect", n_resamples=n_resamples, seed=seed)
        n_sources = cells.groupby("distance")["source"].nunique()
        return curve.assign(n_sources=curve["distance"].map(n_sources))

    def cosine_correlation(self) -> float:
        """Pearson correlation of the cosine of two layers' vectors with the effect, over all cells off the diagonal."""
        cells = self.summary(n_resamples=0)
        off = cells[cells["source"] != cells["target"]]
        return float(np.corrcoef(off["cosine"], off["mean"])[0, 1])

    def plot(self) -> go.Figure:
        """Heat map of the matrix with the diagonal framed; intervals on hover."""
        return layer_heatmap(
            self.summary(), self.table(), label=METRIC_LABEL[self.metric], unsteered=self.unsteered, **self._words
        )

    def plot_decay(self) -> go.Figure:
        """Effect against distance: every source layer's curve, and their mean with its interval."""
        return decay_curves(self.summary(), self.decay(), unsteered=self.unsteered, **self._words)

    def plot_cosine(self) -> go.Figure:
        """Effect against cosine, one point a cell."""
        return layers_by_cosine(self.summary(), correlation=self.cosine_correlation(), **self._words)

    @property
    def _words(self) -> dict[str, str]:
        """What every figure says."""
        return {
            "behavior": self.provenance["vectors"].behavior,
            "unit": self.settings.get("per", "multiplier"),
            "model": last_part(self.provenance["vectors"].model),
        }

    def __repr__(self) -> str:
        rows, columns = self.table().shape
        return (
            f"LayerTransfer({self._words['behavior']}, {self.metric}, {rows} source x {columns} target layers, "
            f"{self.frame['question'].nunique()} questions, size {self.settings.get('size', '?')!r}, "
            f"unsteered {self.unsteered:.3f})"
        )


def transfer_layers(
    model: Any,
    test: ContrastSet,
    vectors: SteeringVectors,
    *,
    multiplier: float | int = 1.0,
    targets: Sequence[int] | None = None,
    size: str | float = "keep",
    per: str = "multiplier",
    measure: str | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> LayerTransfer:
    """Add every layer's vector at every layer and score a test set.

    Args:
        multiplier: how much of the vector.
        targets: layers to add at; those of the vectors by default.
        size: "keep", "target" or a share of the residual norm, see the module. The residual norm is the mean over the
            test set at the positions that `extract` reads.
        per: what effects are divided by: "multiplier", or "norm", that is multiplier times the added vector's norm.
        measure: "p_matching" or "margin"; by default p for answer letters, the margin for completions. The margin of
            letters is log p(positive letter) - log p(negative letter).

    Raises:
        ValueError: for an unknown size, unit or measure, a layer out of range, or "target" at a layer that has no
            vector.
    """
    check_model(model)
    check_contrast_set(test)
    check_vector_set(vectors)
    warn_of_training_pairs(test, vectors)
    multiplier = as_multiplier(multiplier)
    size = size if isinstance(size, str) else as_float("size", size)
    if not (size in SIZES if isinstance(size, str) else size > 0):
        raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}, or a share of the residual norm")
    if not isinstance(size, str) and size > 1e6:
        raise ValueError(f"size={size:g} is a share of the residual norm: expected a number such as 0.1")
    check_measure(test, measure)
    if per not in UNITS:
        raise ValueError(f"effects per {per!r} are not understood: expected one of {', '.join(UNITS)}")
    targets = check_layers(model, vectors.layers if targets is None else targets)
    check_layers(model, vectors.layers)
    alike = cosines(vectors).summary()  # refuses vectors without a direction
    norms = _wanted_norms(model, test, vectors, targets, size, prompt_format, system, progress)
    cells = [(source, target) for source in vectors.layers for target in targets]
    added = [_moved(vectors[source], target, norms) for source, target in cells]
    with kept_if_stopped():
        scores = score_answers(
            model,
            test,
            [(), *((Intervention(vector=vector, multiplier=multiplier),) for vector in added)],
            prompt_format=prompt_format,
            system=system,
            max_tokens=max_tokens,
            progress=progress,
        )
    metric, values = measured(scores, measure)  # [pair condition], the unsteered model first
    norm = np.array([vector.norm for vector in added])
    unit = (multiplier or 1) * (norm if per == "norm" else 1)
    n_pairs = len(test)
    frame = pd.DataFrame(
        {
            "behavior": vectors.behavior,
            "source": np.repeat([source for source, _ in cells], n_pairs),
            "target": np.repeat([target for _, target in cells], n_pairs),
            "norm": np.repeat(norm, n_pairs),
            "question": np.tile(np.arange(n_pairs), len(cells)),
            "score": values[:, 1:].T.flatten(),
            "effect": ((values[:, 1:] - values[:, :1]) / unit).T.flatten(),
            "cosine": np.repeat(alike.reindex(columns=targets).to_numpy(), n_pairs),
        }
    )
    return LayerTransfer(
        frame=frame,
        settings={**scores.settings, "multiplier": f"{multiplier:g}", "size": str(size), "per": per},
        provenance={"vectors": vectors.provenance},
        metric=metric,
        unsteered=float(values[:, 0].mean()),
    )


def _wanted_norms(
    model: Any,
    test: ContrastSet,
    vectors: SteeringVectors,
    targets: Sequence[int],
    size: str | float,
    prompt_format: PromptFormat | str | None,
    system: str | None,
    progress: bool,
) -> dict[int, float]:
    """The norm that vectors get at each target layer; empty where they keep their own."""
    if size == "keep":
        return {}
    if size == "target":
        missing = [target for target in targets if target not in vectors]
        if missing:
            raise ValueError(
                f"size='target' needs a vector of layer {missing[0]}, whose norm is taken: extract it, or use "
                "size='keep'"
            )
        return {target: vectors[target].norm for target in targets}
    read = pair_activations(model, test, layers=targets, prompt_format=prompt_format, system=system, progress=progress)
    return {layer: float(size) * float(norm) for layer, norm in zip(read.layers, read.norms.mean((0, 1)), strict=True)}


def _moved(vector: SteeringVector, target: int, norms: dict[int, float]) -> SteeringVector:
    if target in norms and vector.norm != norms[target]:
        vector = vector.normalized(to=norms[target])
    return vector if vector.layer == target else vector.at_layer(target)
