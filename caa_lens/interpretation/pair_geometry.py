"""How the activations of contrast pairs lie: their norms, their principal components, and how well the sides part.

The analyses take activations that `pair_reading.pair_activations` read, and no model::

    activations = pair_activations(model, pairs)
    vector_norms(vectors, activations).multiplier_for(layer=13, share=0.3)
    pair_pca(activations, layers=[5, 10, 15]).plot()
    pair_separability(activations).emergence

Source: the paper's figure 2 (both sides' activations, by letter).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from einops import rearrange, reduce
from jaxtyping import Float
from tqdm.auto import tqdm

from caa_lens.arguments import as_float, as_seed, check_count
from caa_lens.engine.pair_reading import PairActivations, check_pair_activations, layers_among
from caa_lens.extras import needed_for
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.plots.geometry import norm_curves, pca_panels, separability_curves
from caa_lens.provenance import label
from caa_lens.results import Result
from caa_lens.vectors.checks import check_vector_set
from caa_lens.vectors.steering_vectors import SteeringVectors

SIDES = ("positive", "negative")
RESIDUAL = ("residual_positive", "residual_negative")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VectorNorms(Result):
    """Norms of vectors beside those of the residual stream that they are added to.

    Attributes:
        frame: columns `layer, vector, residual_positive, residual_negative, residual, ratio`. `vector` is ||v||;
            the residual columns are the mean over pairs of ||resid_post|| of the read tokens, of a side and of both;
            `ratio` is vector / residual, the share of the residual's norm that multiplier 1 adds.
        provenance: of the `vectors` and of the `activations`.
    """

    def multiplier_for(self, layer: int, share: float | int) -> float:
        """The multiplier whose steering step is `share` of the residual's mean norm at that layer."""
        ratios = dict(zip(self.frame["layer"], self.frame["ratio"], strict=True))
        layer = check_count("layer", layer, least=0)
        if layer not in ratios:
            raise ValueError(f"layer {layer} was not measured: expected one of {list(ratios)}")
        if ratios[layer] == 0:
            raise ValueError(f"the vector of layer {layer} is zero: no multiplier gives it a norm")
        return as_float("share", share) / ratios[layer]

    def summary(self) -> pd.DataFrame:
        """One row a layer: both norms, their ratio, and the multipliers whose step is 10 % and 50 % of the residual."""
        table = self.frame.set_index("layer")[["vector", "residual", "ratio"]]
        return table.assign(**{f"multiplier for {share:.0%}": share / table["ratio"] for share in (0.1, 0.5)})

    def plot(self) -> go.Figure:
        """Both norms by layer, and their ratio below."""
        read = self.provenance["activations"]
        of = label(self.provenance["vectors"])
        return norm_curves(self.frame, of=of, n_pairs=read.n_pairs, read_at=read.token_position)

    def __repr__(self) -> str:
        vectors, read = self.provenance["vectors"], self.provenance["activations"]
        return f"VectorNorms({vectors.expression}, {read.model})\n{self.summary().round(3).to_string()}"


def vector_norms(vectors: SteeringVectors, activations: PairActivations) -> VectorNorms:
    """How large each layer's vector is, and how large the residual stream where it was read; at layers both have.

    Raises:
        ValueError: if the widths differ, or there is no layer in common.
    """
    check_vector_set(vectors)
    check_pair_activations(activations)
    width = activations.values.shape[-1]
    if vectors.d_model != width:
        where = f"the activations of {activations.provenance.model}"
        raise ValueError(f"vectors have d_model={vectors.d_model}, but {where} have d_model={width}: use one model's")
    layers = [layer for layer in vectors.layers if layer in activations.layers]
    if not layers:
        raise ValueError(
            f"no layer in common: vectors have layers {list(vectors.layers)}, activations {list(activations.layers)}"
        )
    rows = []
    for layer in layers:
        positive, negative = activations.norms[:, :, activations.layers.index(layer)].double().mean(0).tolist()
        residual, size = (positive + negative) / 2, vectors[layer].norm
        rows.append((layer, size, positive, negative, residual, size / residual))
    frame = pd.DataFrame(rows, columns=["layer", "vector", *RESIDUAL, "residual", "ratio"])
    return VectorNorms(frame=frame, provenance={"vectors": vectors.provenance, "activations": activations.provenance})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairPCA(Result):
    """Both sides' activations on the two principal components of a layer.

    Attributes:
        frame: columns `layer, pair, side, letter, pc1, pc2, explained_pc1, explained_pc2`; coordinates are in units of
            the residual stream, about the mean of all; `explained_*` is the component's share of the layer's variance.
        provenance: of the `activations`.
    """

    def summary(self) -> pd.DataFrame:
        """One row a layer: the shares of its variance that both components explain."""
        return self.frame.groupby("layer")[["explained_pc1", "explained_pc2"]].first()

    def plot(self) -> go.Figure:
        """Layers side by side; colour is the side, the marker's shape the letter."""
        read = self.provenance["activations"]
        return pca_panels(self.frame, of=label(read), n_pairs=read.n_pairs, read_at=read.token_position)

    def __repr__(self) -> str:
        p = self.provenance["activations"]
        return f"PairPCA({p.behavior} of {p.model}, {p.n_pairs} pairs)\n{self.summary().round(3).to_string()}"


def pair_pca(activations: PairActivations, *, layers: Sequence[int] | None = None) -> PairPCA:
    """Two principal components of each layer, fitted on the positive and negative activations together.

    An axis has no sign of its own: each is turned so that the positive side's mean lies on its positive half.

    Raises:
        ValueError: for fewer than two pairs.
        IndexError: for a layer that was not read.
    """
    with needed_for("the principal components of pairs"):
        from sklearn.decomposition import PCA  # scikit-learn takes a second to import

    check_pair_activations(activations)
    if (n_pairs := len(activations)) < 2:
        raise ValueError(f"two components need at least two pairs, got {n_pairs}")
    parts = []
    for layer in layers_among(activations, layers):
        fit = PCA(n_components=2, svd_solver="full")
        coordinates = fit.fit_transform(activations[layer].double().flatten(0, 1).numpy())  # [(pair side) 2]
        coordinates *= np.where(coordinates[::2].mean(0) < 0, -1, 1)  # even rows are the positive side
        part = pd.DataFrame({"layer": layer, "pair": np.repeat(np.arange(n_pairs), 2), "side": SIDES * n_pairs})
        part["letter"] = [letter for both in activations.letters for letter in both]
        part[["pc1", "pc2"]] = coordinates
        part[["explained_pc1", "explained_pc2"]] = fit.explained_variance_ratio_
        parts.append(part)
    return PairPCA(frame=pd.concat(parts, ignore_index=True), provenance={"activations": activations.provenance})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairSeparability(Result):
    """How well the two sides part, by layer.

    Attributes:
        frame: columns `layer, accuracy, low, high, explained, silhouette`; see `pair_separability`.
        emergence: the layer at which the behavior emerges, if any, by the rule that `pair_separability` states.
        chance: accuracy of knowing nothing but the answer letter; 0.5 for even letters and for completions.
        settings: folds and seed.
        provenance: of the `activations`.
    """

    emergence: int | None
    chance: float

    def summary(self) -> pd.DataFrame:
        """The three measures, one row a layer."""
        return self.frame.set_index("layer")

    def plot(self) -> go.Figure:
        """Accuracy with its interval by layer, the other two measures below; the emergence layer is marked."""
        read = self.provenance["activations"]
        return separability_curves(
            self.frame, of=label(read), n_pairs=read.n_pairs, emergence=self.emergence, chance=self.chance
        )

    def __repr__(self) -> str:
        p, where = self.provenance["activations"], "emerges at no layer"
        if self.emergence is not None:
            first = ", the first one measured" if self.emergence == self.frame["layer"].iloc[0] else ""
            where = f"emerges at layer {self.emergence}{first}"
        table = self.summary().round(3).to_string()
        return f"PairSeparability({p.behavior} of {p.model}, {p.n_pairs} pairs: {where})\n{table}"


def pair_separability(
    activations: PairActivations,
    *,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    seed: int | None = 0,
    progress: bool = True,
) -> PairSeparability:
    """Three measures of how far the positive activations of a layer lie from the negative ones.

        accuracy    share of held-out activations that a logistic regression puts on their side; 0.5 by chance.
                    Features are standardised and the probe fitted inside the folds; both sides of a pair are in one
                    fold. `low, high`: 95 % bootstrap interval over pairs.
        explained   ||mean(positive) - mean(negative)||^2 / 4, divided by the mean squared distance of all
                    activations from their mean: the variance's share between the sides; chance gives 1 / (2 pairs).
        silhouette  scikit-learn's silhouette score of the two sides, -1 to 1.

    A behavior emerges at the first layer from which on, up to the best layer, accuracy stays at or above the half-way
    point between chance and the best layer's; at none, where the best layer's own interval, widened for having been
    chosen among all (Bonferroni), includes chance.

    The probe finds whatever tells the sides apart, the words of completions too: those part from the first layer on.

    Args:
        folds: of the cross-validation.
        seed: of the folds and the bootstrap.

    Raises:
        ValueError: for fewer pairs than folds, or one fold.
    """
    with needed_for("how well pairs separate"):
        from sklearn.metrics import silhouette_score  # scikit-learn takes a second to import

    check_pair_activations(activations)
    n_pairs = len(activations)
    folds, seed = check_count("folds", folds, least=None), as_seed(seed)
    if not 2 <= folds <= n_pairs:
        raise ValueError(f"got {folds} folds for {n_pairs} pairs, expected 2 to {n_pairs}: give more pairs, or folds=")
    layers = layers_among(activations, layers)
    correct, explained, silhouettes = [], [], []
    for layer in tqdm(layers, desc="probe", unit="layer", disable=not progress):
        points = activations[layer].double()
        correct.append(held_out_accuracy(points.numpy(), folds=folds, seed=seed))
        shift = points[:, 0].mean(0) - points[:, 1].mean(0)
        spread = (points - points.mean((0, 1))).pow(2).sum(-1).mean()
        explained.append(float(shift.pow(2).sum() / 4 / spread) if spread > 0 else 0.0)
        silhouettes.append(float(silhouette_score(points.flatten(0, 1).numpy(), np.tile([1, 0], n_pairs))))
    table = np.stack(correct, axis=1)  # [pair layer]
    accuracy = table.mean(0)
    low, high = bootstrap_interval(table, seed=seed)
    surely, _ = bootstrap_interval(table, seed=seed, level=1 - 0.05 / len(layers))
    positive, negative = (Counter(side) for side in zip(*activations.letters, strict=True))
    chance = sum((positive | negative).values()) / (2 * n_pairs)  # each letter guessed as its commoner side
    emergence = emergence_layer(layers, accuracy, chance) if surely[accuracy.argmax()] > chance else None
    columns = {"layer": layers, "accuracy": accuracy, "low": low, "high": high}
    frame = pd.DataFrame({**columns, "explained": explained, "silhouette": silhouettes})
    return PairSeparability(
        frame=frame,
        settings={"folds": str(folds), "seed": str(seed)},
        provenance={"activations": activations.provenance},
        emergence=emergence,
        chance=chance,
    )


def held_out_accuracy(
    points: Float[np.ndarray, "pair side d_model"], *, folds: int = 5, seed: int | None = 0
) -> Float[np.ndarray, " pair"]:
    """Share of each pair's two points that a probe puts on their side while the pair is held out.

    The probe is scikit-learn's logistic regression (C=1) on features standardised inside the folds. Both sides of a
    pair are in the same fold, so that what a pair's sides share cannot give one away.
    """
    with needed_for("how well pairs separate"):
        from sklearn.linear_model import LogisticRegression  # scikit-learn takes a second to import
        from sklearn.model_selection import GroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    n_pairs = len(points)
    sides = np.tile([1, 0], n_pairs)
    # GroupKFold deals groups out by their number: drawing the numbers shuffles the pairs over the folds.
    groups = np.repeat(np.random.default_rng(as_seed(seed)).permutation(n_pairs), 2)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
    features = rearrange(points, "pair side d_model -> (pair side) d_model")
    guessed = cross_val_predict(probe, features, sides, groups=groups, cv=GroupKFold(n_splits=folds))
    return reduce((guessed == sides).astype(float), "(pair side) -> pair", "mean", side=2)


def emergence_layer(layers: Sequence[int], accuracy: Float[np.ndarray, " layer"], chance: float | int = 0.5) -> int:
    """First layer from which on, up to the best one, accuracy is at least half-way between chance and the best.

    What happens above the best layer does not count: late layers may forget. Of equally good layers the first is best.
    """
    best = int(accuracy.argmax())
    below = np.flatnonzero(accuracy[: best + 1] < (chance + accuracy[best]) / 2)
    return layers[int(below[-1]) + 1 if len(below) else 0]
