"""A linear map from one model's residual stream to another's, fitted on activations of the same pairs.

For models of different width or training, whose streams share no basis. Every layer of the target model gets the source
layer at the same relative depth, (layer + 1) / n_layers, and a ridge regression

    h_target ~ h_source W + b

over the pairs' activations (two rows a pair). A steering vector is a difference, so it is carried by W alone: v W.

How far to trust it stands in the frame: R^2 on pairs that the fit never saw. The penalty is chosen by cross-validation
inside the other pairs; both sides of a pair are always on the same side of every split. Activations come from files
(`pair_activations(...).save`), so that neither model need be in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import as_float, as_seed, check_list, describe
from caa_lens.engine.pair_reading import PairActivations
from caa_lens.extras import needed_for
from caa_lens.plots.transfers import map_quality
from caa_lens.provenance import Provenance, one_model
from caa_lens.results import Result
from caa_lens.vectors.checks import check_vector_set
from caa_lens.vectors.steering_vectors import SteeringVectors

PENALTIES = tuple(float(penalty) for penalty in 10.0 ** np.arange(0, 7))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResidualMap(Result):
    """A fitted map.

    Attributes:
        frame: columns `layer, source_layer, r2, r2_weighted, penalty, n_fit, n_held_out`. `r2` is the mean over the
            target's dimensions of the held-out R^2; `r2_weighted` weighs them by variance, so that the few huge
            dimensions of a residual stream decide it.
        settings: how the pairs were held out, and the candidates for the penalty.
        provenance: what the activations were read from, "source" and "target".
        weights: W of every target layer, float32 on the CPU.
        layers: the target model's 0-based blocks, ascending.
        source_layers: the source model's block for each of them.
    """

    weights: Float[Tensor, "layer d_source d_target"]
    layers: tuple[int, ...]
    source_layers: tuple[int, ...]

    def carry(self, vectors: SteeringVectors) -> SteeringVectors:
        """The source model's vectors in the target model: v W at every target layer.

        Raises:
            ValueError: if the vectors are not of the map's source model or width, or lack a source layer.
        """
        check_vector_set(vectors)
        source, target = self.provenance["source"], self.provenance["target"]
        if one_model((vectors.provenance.model, source.model)) is None or vectors.d_model != self.weights.shape[1]:
            raise ValueError(
                f"vectors of {vectors.provenance.model} with d_model={vectors.d_model}, but the map leads from "
                f"{source.model} with d_model={self.weights.shape[1]}: extract them from that model"
            )
        missing = sorted(set(self.source_layers) - set(vectors.layers))
        if missing:
            raise ValueError(f"the map needs vectors of layers {missing} too: extract them, or fit it for fewer layers")
        rows = torch.stack([vectors[layer].direction.cpu().float() for layer in self.source_layers])
        p = vectors.provenance
        return SteeringVectors(
            directions=einsum(rows, self.weights, "layer source, layer source target -> layer target"),
            layers=self.layers,
            provenance=replace(
                p,
                model=target.model,
                expression=f"map({p.expression or p.behavior})",
                details={**p.details, "mapped_from": p.model, "map_fitted_on": source.behavior},
            ),
        )

    def summary(self) -> pd.DataFrame:
        """How far to trust it: `layer, source_layer, r2, r2_weighted`."""
        return self.frame[["layer", "source_layer", "r2", "r2_weighted"]]

    def plot(self) -> go.Figure:
        """Held-out R^2 by layer."""
        return map_quality(self.frame, source=self.provenance["source"].model, target=self.provenance["target"].model)

    def __repr__(self) -> str:
        r2, (_, d_source, d_target) = self.frame["r2"], self.weights.shape
        between = f"{self.provenance['source'].model} -> {self.provenance['target'].model}"
        return (
            f"ResidualMap({between}, {len(self.layers)} layers, "
            f"d_model {d_source} -> {d_target}, held-out R^2 {r2.min():.2f} to {r2.max():.2f})"
        )


def fit_residual_map(
    source: PairActivations | Sequence[PairActivations],
    target: PairActivations | Sequence[PairActivations],
    *,
    layers: Sequence[int] | None = None,
    held_out: float | int = 0.2,
    penalties: Sequence[float | int] = PENALTIES,
    seed: int | None = 0,
    progress: bool = True,
) -> ResidualMap:
    """Fit the map of every target layer by ridge regression.

    Args:
        source, target: both models' activations of the same sets of pairs, in the same order; several sets are joined.
            A map has d_source x d_target weights a layer: give it as many pairs as you have.
        layers: the target's layers; all that were read by default.
        held_out: share of the pairs on which R^2 is measured.
        penalties: candidates; source dimensions are standardised, so a penalty counts in rows.

    Raises:
        ValueError: if the two were not read on the same pairs, are too few, or do not tell their model's depth.
    """
    sources, targets = _as_list(source), _as_list(target)
    _check_same_pairs(sources, targets)
    seed = as_seed(seed)
    penalties = check_list("penalties", penalties, float)
    if not penalties or not all(0 <= penalty < float("inf") for penalty in penalties):
        raise ValueError(f"penalties must be finite numbers from 0 on, got {penalties}: expected at least one")
    if not 0 < as_float("held_out", held_out) < 1:
        raise ValueError(f"held_out is a share of the pairs, got {held_out}: expected a number between 0 and 1")
    n_pairs = sum(map(len, targets))
    n_held_out = round(held_out * n_pairs)
    if n_held_out < 1 or n_pairs - n_held_out < 4:
        raise ValueError(f"{n_pairs} pairs are too few to fit a map and test it: give at least 5, better hundreds")
    order = np.random.default_rng(seed).permutation(n_pairs)
    test, fit = order[:n_held_out], order[n_held_out:]
    layers = targets[0].layers if layers is None else tuple(sorted(set(check_list("layers", layers, int))))
    source_layers = tuple(_matched(layer, targets[0], sources[0]) for layer in layers)
    if not layers:
        raise ValueError("no layers given: expected at least one")
    weights, rows = [], []
    matched = list(zip(layers, source_layers, strict=True))
    for layer, source_layer in tqdm(matched, desc="fit map", unit="layer", disable=not progress):
        x, y = _joined(sources, source_layer), _joined(targets, layer)  # [pair side d_model]
        weight, about = _ridge(x, y, fit, test, penalties)
        weights.append(torch.from_numpy(weight).float())
        rows.append(
            {"layer": layer, "source_layer": source_layer, **about, "n_fit": len(fit), "n_held_out": n_held_out}
        )
    return ResidualMap(
        frame=pd.DataFrame(rows),
        settings={"held_out": str(held_out), "penalties": ", ".join(map(str, penalties)), "seed": str(seed)},
        provenance={"source": _together(sources), "target": _together(targets)},
        weights=torch.stack(weights),
        layers=layers,
        source_layers=source_layers,
    )


def _ridge(
    x: Float[np.ndarray, "pair side d_source"],
    y: Float[np.ndarray, "pair side d_target"],
    fit: np.ndarray,
    test: np.ndarray,
    penalties: Sequence[float | int],
) -> tuple[Float[np.ndarray, "d_source d_target"], dict[str, float]]:
    """Weights in the units of x and y, and what the held-out pairs say of them."""
    with needed_for("a map between two models"):
        from sklearn.linear_model import Ridge  # scikit-learn takes a second to import
        from sklearn.metrics import r2_score
        from sklearn.model_selection import GridSearchCV, GroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    def rows(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        return values[pairs].reshape(-1, values.shape[-1])

    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": [float(penalty) for penalty in penalties]},
        cv=GroupKFold(n_splits=3),
        scoring="r2",
    )
    search.fit(rows(x, fit), rows(y, fit), groups=np.repeat(np.arange(len(fit)), 2))
    best = search.best_estimator_
    truth, guess = rows(y, test), best.predict(rows(x, test))
    weight = np.atleast_2d(best["ridge"].coef_).T / best["standardscaler"].scale_[:, None]
    return weight, {
        "r2": float(r2_score(truth, guess)),
        "r2_weighted": float(r2_score(truth, guess, multioutput="variance_weighted")),
        "penalty": float(search.best_params_["ridge__alpha"]),
    }


def _matched(layer: int, target: PairActivations, source: PairActivations) -> int:
    """The source layer, of those that were read, whose relative depth is nearest to that of a target's layer."""
    depth = (layer + 1) / _n_layers(target)
    return min(source.layers, key=lambda other: abs((other + 1) / _n_layers(source) - depth))


def _n_layers(activations: PairActivations) -> int:
    try:
        return int(activations.provenance.details["n_layers"])
    except KeyError:
        raise ValueError(
            f"the activations of {activations.provenance.model} do not tell the model's number of layers: "
            "read them again with pair_activations"
        ) from None


def _check_same_pairs(sources: Sequence[PairActivations], targets: Sequence[PairActivations]) -> None:
    hashes = [[each.provenance.dataset_hash for each in side] for side in (sources, targets)]
    if hashes[0] != hashes[1] or [len(a) for a in sources] != [len(b) for b in targets]:
        names = [", ".join(each.provenance.behavior for each in side) or "nothing" for side in (sources, targets)]
        raise ValueError(
            f"the models' activations are not of the same pairs: {names[0]} against {names[1]}; read both on the same "
            "sets, in the same order"
        )
    if not sources:
        raise ValueError("no activations given: read both models on the same pairs with pair_activations")
    for side in (sources, targets):
        shapes = {(each.values.shape[-1], each.layers) for each in side}
        if len(shapes) > 1 or one_model(each.provenance.model for each in side) is None:
            raise ValueError("the sets of one side must be read from one model at the same layers")


def _joined(side: Sequence[PairActivations], layer: int) -> Float[np.ndarray, "pair side d_model"]:
    return np.concatenate([each[layer].double().numpy() for each in side])


def _together(side: Sequence[PairActivations]) -> Provenance:
    names = ", ".join(each.provenance.behavior for each in side)
    return replace(side[0].provenance, behavior=names, expression=names, n_pairs=sum(map(len, side)))


def _as_list(activations: PairActivations | Sequence[PairActivations]) -> list[PairActivations]:
    given: list[Any] = list(activations) if isinstance(activations, list | tuple) else [activations]
    for each in given:
        if not isinstance(each, PairActivations):
            raise TypeError(
                f"expected PairActivations, as pair_activations(model, pairs) reads, or a list, got {describe(each)}"
            )
    return given
