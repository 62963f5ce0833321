"""A vector of one layer, added at another: the whole matrix of layers by layers.

Cell (i, j) is the effect of layer i's vector added at layer j: the change of the score against the unsteered model,
divided by the multiplier. The diagonal is the sweep's own. Source: paper section 7 and Figure 8, which adds the vector
of one layer at all others and keeps its norm.

Norms grow with depth, so an early vector at a late layer is a small push. `size` says what is done about that:

    "keep"     the vector as it is (the paper's)
    "target"   rescaled to the norm of the target layer's own vector
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from caa_lens.activations import check_layers
from caa_lens.answers import score
from caa_lens.contrast import ContrastSet
from caa_lens.geometry import cosine_map
from caa_lens.hooks import Intervention
from caa_lens.prompts import PromptFormat
from caa_lens.staircase import Condition
from caa_lens.sweeps import bootstrap_interval
from caa_lens.vectors import Provenance, SteeringVector, SteeringVectors

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SIZES = ("keep", "target")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTransfer:
    """A finished matrix.

    Attributes:
        frame: columns `behavior, source, target, question, score, effect`; `effect` is (score - unsteered score of the
            question) / multiplier, in the metric's units.
        cosines: `layer, other_layer, cosine` of the same vectors.
        metric: "p_matching" or "margin".
        unsteered: mean score without steering.
        vectors: provenance of the vectors.
        settings: what else the numbers depend on, the multiplier and the size rule among it.
    """

    frame: "pd.DataFrame"
    cosines: "pd.DataFrame"
    metric: str
    unsteered: float
    vectors: Provenance
    settings: dict[str, str] = field(default_factory=dict)

    def matrix(self) -> "pd.DataFrame":
        """Mean effect over questions: one row a source layer, one column a target layer."""
        return self.frame.pivot_table(index="source", columns="target", values="effect", aggfunc="mean")

    def summary(self, n_resamples: int = 2000, seed: int = 0) -> "pd.DataFrame":
        """Mean effect with its 95 % bootstrap interval over questions: `source, target, mean, low, high, cosine`."""
        import pandas as pd

        table = self.frame.pivot(index="question", columns=["source", "target"], values="effect")
        values = table.to_numpy()
        low, high = bootstrap_interval(values, n_resamples=n_resamples, seed=seed)
        cells = pd.DataFrame({**table.columns.to_frame(index=False), "mean": values.mean(0), "low": low, "high": high})
        cosines = self.cosines.rename(columns={"layer": "source", "other_layer": "target"})
        return cells.merge(cosines, on=["source", "target"], how="left")

    def best_targets(self) -> "pd.DataFrame":
        """For each source layer the target with the largest mean effect: `source, target, effect, own_effect`."""
        import pandas as pd

        matrix = self.matrix()
        own = [matrix.loc[layer, layer] if layer in matrix.columns else np.nan for layer in matrix.index]
        return pd.DataFrame(
            {
                "source": matrix.index,
                "target": matrix.idxmax(axis=1).to_numpy(),
                "effect": matrix.max(axis=1).to_numpy(),
                "own_effect": own,
            }
        )

    def reach(self) -> "pd.DataFrame":
        """How far a vector carries: `source, up, down`, the distance at which its effect first falls to half its own.

        In layers, upwards and downwards; NaN where it never does, or where the effect at its own layer is not positive.
        """
        import pandas as pd

        matrix = self.matrix()
        rows = []
        for source in matrix.index:
            if source not in matrix.columns:
                continue
            own = matrix.loc[source, source]
            halved = [target for target in matrix.columns if own > 0 and matrix.loc[source, target] <= own / 2]
            up = min((target - source for target in halved if target > source), default=np.nan)
            down = min((source - target for target in halved if target < source), default=np.nan)
            rows.append({"source": source, "up": up, "down": down})
        return pd.DataFrame(rows, columns=["source", "up", "down"])

    def cosine_correlation(self) -> float:
        """Pearson correlation of the cosine of two layers' vectors with the effect, over all cells off the diagonal."""
        cells = self.summary(n_resamples=0)
        off = cells[cells["source"] != cells["target"]]
        return float(np.corrcoef(off["cosine"], off["mean"])[0, 1])

    def plot(self) -> "go.Figure":
        """Heat map of the matrix with the diagonal framed; intervals on hover."""
        from caa_lens.plots_transfer import transfer_heatmap  # plotly takes a second to import

        return transfer_heatmap(self)

    def plot_cosine(self) -> "go.Figure":
        """Effect against cosine, one point a cell."""
        from caa_lens.plots_transfer import effect_by_cosine

        return effect_by_cosine(self)

    def __repr__(self) -> str:
        rows, columns = self.matrix().shape
        return (
            f"LayerTransfer({self.vectors.behavior}, {self.metric}, {rows} source x {columns} target layers, "
            f"{self.frame['question'].nunique()} questions, size {self.settings.get('size', '?')!r}, "
            f"unsteered {self.unsteered:.3f})"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        return self.plot()._repr_mimebundle_(include, exclude)


def transfer(
    model: Any,
    test: ContrastSet,
    vectors: SteeringVectors,
    *,
    multiplier: float | int = 1.0,
    targets: Sequence[int] | None = None,
    size: str = "keep",
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> LayerTransfer:
    """Add every layer's vector at every layer and score a test set.

    Args:
        multiplier: how much of the vector; effects are given per unit of it.
        targets: layers to add at; those of the vectors by default.
        size: "keep" or "target", see the module.

    Raises:
        ValueError: for multiplier 0, an unknown size rule, a layer out of range, or "target" at a layer that has no
            vector.
    """
    import pandas as pd

    if multiplier == 0:
        raise ValueError("multiplier 0 steers nothing, and effects are per unit of it: give another number")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    targets = check_layers(model, vectors.layers if targets is None else targets)
    check_layers(model, vectors.layers)
    cells = [(source, target) for source in vectors.layers for target in targets]
    conditions: list[Condition] = [()]
    for source, target in cells:
        moved = _resized(vectors, source, target, size)
        conditions.append((Intervention(vector=moved, multiplier=float(multiplier)),))
    scores = score(
        model,
        test,
        conditions,
        prompt_format=prompt_format,
        system=system,
        max_tokens=max_tokens,
        progress=progress,
    )
    values = scores.values.numpy()  # [pair condition], the unsteered model first
    n_pairs = len(test)
    frame = pd.DataFrame(
        {
            "behavior": vectors.behavior,
            "source": np.repeat([source for source, _ in cells], n_pairs),
            "target": np.repeat([target for _, target in cells], n_pairs),
            "question": np.tile(np.arange(n_pairs), len(cells)),
            "score": values[:, 1:].T.flatten(),
            "effect": ((values[:, 1:] - values[:, :1]) / multiplier).T.flatten(),
        }
    )
    return LayerTransfer(
        frame=frame,
        cosines=cosine_map(vectors).frame,
        metric=scores.metric,
        unsteered=float(values[:, 0].mean()),
        vectors=vectors.provenance,
        settings={**scores.settings, "multiplier": f"{multiplier:g}", "size": size},
    )


def _resized(vectors: SteeringVectors, source: int, target: int, size: str) -> SteeringVector:
    vector = vectors[source]
    if source == target:
        return vector
    if size == "target":
        if target not in vectors:
            raise ValueError(
                f"size='target' needs a vector of layer {target}, whose norm is taken: extract it, or use size='keep'"
            )
        vector = vector.normalized(to=vectors[target].norm)
    return vector.at_layer(target)
