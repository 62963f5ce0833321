"""Is there anything to steer with? What contrast pairs agree on, by layer, from their activations alone.

    activations = pair_activations(model, pairs)
    found = reliability(activations)
    found                     # a verdict a layer, and the numbers behind it
    found.pairs(14)           # which pairs are against, and which turn the vector
    found.learning_curve(14)  # how sure the vector would be of fewer pairs, or of more

`letter_groups` says how the answer letter is taken out first, `letter_orders` what becomes of a question that stands in
both letter orders, `shared_part` what the numbers are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import as_seed, check_count, check_list
from caa_lens.engine.pair_reading import PairActivations, check_pair_activations, layers_among
from caa_lens.measures.agreement.held_out import d_prime, held_out, held_out_cosines, influences
from caa_lens.measures.agreement.letter_groups import group_by_letters, without_letter
from caa_lens.measures.agreement.letter_orders import Members, join_letter_orders
from caa_lens.measures.agreement.shared_part import (
    by_chance,
    cone,
    cosine_of,
    relabelled,
    resamples,
    shared_part,
    squared_lengths,
)
from caa_lens.plots.agreement import agreement_curves, learning_curves, sorted_pairs
from caa_lens.provenance import PAIR_HASHES, label, layer_ranges
from caa_lens.results import Result

CONSISTENT, WEAK, NOTHING = "consistent", "weak", "nothing to steer with"
CHANCE = 0.05  # p at or above which nothing is told from chance, over all layers
SURELY = 0.5  # what the split-half cosine's interval lies above where pairs are consistent
AGAINST = 0.2  # the largest share of pairs against where pairs are consistent
AIM = 0.95


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reliability(Result):
    """What contrast pairs agree on, by layer.

    Attributes:
        frame: one row a layer, see `reliability`: `layer, verdict, because, split_half, low, high, p, agreement,
            against, d_prime, shared, shared_low, shared_high, cone, pairs_for_95, letter`.
        settings: pairs, what was taken out, resamples, seed.
        provenance: of the `activations`.
        cosines: of each pair with the direction that the others share; below 0 it is against them.
        influences: by how many degrees the direction turns without that pair.
        members: by number in the set, the pair that each is; both letter orders of a question are one pair here.
    """

    cosines: Float[Tensor, "layer pair"]
    influences: Float[Tensor, "layer pair"]
    members: tuple[tuple[int, ...], ...]

    @property
    def n_pairs(self) -> int:
        """How many pairs were compared; both letter orders of a question count as one."""
        return int(self.cosines.shape[1])

    def layers(self, verdict: str = CONSISTENT) -> tuple[int, ...]:
        """The layers of a verdict: "consistent", "weak" or "nothing to steer with"."""
        if verdict not in (CONSISTENT, WEAK, NOTHING):
            raise ValueError(f"no verdict {verdict!r}: expected {CONSISTENT!r}, {WEAK!r} or {NOTHING!r}")
        return tuple(int(layer) for layer in self.frame["layer"][self.frame["verdict"] == verdict])

    def pairs(self, layer: int) -> pd.DataFrame:
        """One row a pair, the most against first: `pair` (its number in the set), `cosine, influence`.

        Where a question stands in both letter orders, `other_order` is the number of the second of its two pairs.
        """
        row = self._row(layer)
        found = {"cosine": self.cosines[row].double().numpy(), "influence": self.influences[row].double().numpy()}
        table = pd.DataFrame({"pair": [one[0] for one in self.members], **found})
        if any(len(one) > 1 for one in self.members):
            others = [one[1] if len(one) > 1 else None for one in self.members]
            table.insert(1, "other_order", pd.Series(others, dtype="Int64"))
        return table.sort_values("cosine", kind="stable").reset_index(drop=True)

    def learning_curve(self, layer: int, sizes: Sequence[int] | None = None) -> pd.DataFrame:
        """The cosine of two vectors from so many pairs each: `n_pairs, cosine, low, high, measured`.

        Up to half of the pairs it is measured, as the mean over all splits; beyond that it is what follows from the
        same numbers (`measured` is False). Where pairs share nothing, it is 0.

        Args:
            sizes: numbers of pairs; by default 1, 2, 5, 10 ... to four times the pairs.
        """
        row = self.frame.iloc[self._row(layer)]
        if sizes is None:
            steps = [step * 10**power for power in range(7) for step in (1, 2, 5)]
            sizes = sorted({*(n for n in steps if n < 4 * self.n_pairs), self.n_pairs // 2, self.n_pairs})
        sizes = [check_count("sizes", n) for n in check_list("sizes", sizes, int)]
        curve = pd.DataFrame({"n_pairs": sizes})
        for name, column in (("cosine", "shared"), ("low", "shared_low"), ("high", "shared_high")):
            curve[name] = cosine_of(np.full(len(sizes), max(row[column], 0.0)), np.array(sizes, dtype=float))
        return curve.assign(measured=curve["n_pairs"] <= self.n_pairs / 2)

    def summary(self) -> pd.DataFrame:
        """Verdict and main numbers, one row a layer."""
        columns = ["verdict", "split_half", "low", "high", "p", "agreement", "against", "d_prime", "cone"]
        return self.frame.set_index("layer")[[*columns, "pairs_for_95", "letter"]]

    def plot(self) -> go.Figure:
        """Split-half cosine with its interval by layer, coloured by the verdict; agreement and d' below."""
        return agreement_curves(self.frame, of=self._of, n_pairs=self.n_pairs)

    def plot_pairs(self, layer: int) -> go.Figure:
        """Each pair's held-out cosine at a layer, sorted; pairs against stand below 0."""
        return sorted_pairs(self.pairs(layer), of=self._of, layer=layer)

    def plot_learning(self, layer: int) -> go.Figure:
        """The learning curve of a layer, with its interval."""
        return learning_curves(self.learning_curve(layer), of=self._of, layer=layer, n_pairs=self.n_pairs)

    @property
    def _of(self) -> str:
        return label(self.provenance["activations"])

    def _row(self, layer: int) -> int:
        layers = list(self.frame["layer"])
        if (layer := check_count("layer", layer, least=0)) not in layers:
            raise ValueError(f"layer {layer} was not asked for: expected one of {layer_ranges(layers)}")
        return layers.index(layer)

    def __repr__(self) -> str:
        p = self.provenance["activations"]
        by_verdict = {verdict: self.layers(verdict) for verdict in (CONSISTENT, WEAK, NOTHING)}
        said = [f"{verdict} at layers {layer_ranges(found)}" for verdict, found in by_verdict.items() if found]
        return (
            f"Reliability({p.behavior} of {p.model}, {self.n_pairs} pairs: {'; '.join(said)})\n"
            f"{self.summary().round(3).to_string()}"
        )


def reliability(
    activations: PairActivations,
    *,
    layers: Sequence[int] | None = None,
    n_resamples: int = 2000,
    seed: int | None = 0,
    progress: bool = True,
) -> Reliability:
    """What the pairs of a set agree on, layer by layer, before anything is steered.

    d_i is the difference of pair i's sides. Of A/B pairs the answer letter is taken out first: pairs are grouped by
    which letter is the positive one, and the direction v is the mean of the groups' means, in which the letter cancels.
    Resamples, halves and what is held out keep to the groups; the letter in a single pair's difference is estimated
    from others (see `measures.agreement.letter_groups`). A question that stands in both letter orders is one pair, the
    mean of its two, in which the letter cancels (`measures.agreement.letter_orders`). Columns of the frame:

        split_half    cosine of the vectors of two halves of the pairs: their mean inner product over all splits by
                      their mean squared length; `low, high`: 95 % bootstrap interval over pairs
        p             how often pairs whose sides are exchanged at random have, at any of the layers, as long a vector
        agreement     mean cosine of d_i and d_j over all two pairs
        against       share of pairs whose difference has a negative cosine with the vector of the others
        d_prime       distance of the sides of held-out pairs along the others' vector, in standard deviations
        shared        what all pairs share of the mean square of d_i, with its interval `shared_low, shared_high`
        cone          degrees about v that hold the true direction in 95 % of cases; 90 is any direction
        pairs_for_95  pairs that would bring the split-half cosine to 0.95; NaN where nothing is told from chance
        letter        the letter's share of the mean square of d_i, of which joined letter orders have none

    The verdict of a layer is "nothing to steer with" where p >= 0.05; "consistent" where the interval of `split_half`
    lies above 0.5 and at most a fifth of the pairs are against; else "weak". Of pure noise one set in twenty at most
    reads otherwise than "nothing", at however many layers. `because` says the numbers that decided.

    It asks whether the pairs agree, not on what: whatever differs between the sides in every pair (length, a word) is
    found as well as a behavior is. Nor does it say that the direction moves the model's answers.

    Args:
        activations: of `pair_activations(model, pairs)`.
        layers: those that were read by default. p is over all that are named here.
        n_resamples: of the bootstrap and of the relabelling.

    Raises:
        ValueError: for fewer than 8 pairs (of A/B pairs 4 with each letter as the positive one), letters of which one
            is always the positive one, one to three questions in both letter orders beside pairs in one, pairs that
            stand twice otherwise or with their answers exchanged, pairs whose sides are alike, or numbers that are not
            finite.
        IndexError: for a layer that was not read.

    Source: pairwise cosines and d' as in Braun et al. 2025 (arXiv 2505.22637); the rest is classical (Spearman and
    Brown 1910; Westfall and Young 1993).
    """
    check_pair_activations(activations)
    n_resamples, seed = check_count("n_resamples", n_resamples, least=100), as_seed(seed)
    chosen = layers_among(activations, layers)
    _check_finite(activations, chosen)
    activations, members = join_letter_orders(activations)
    n_joined = sum(len(one) > 1 for one in members)
    groups = group_by_letters(activations.letters, n_joined)
    _check_pairs(activations, chosen, members)
    rng = np.random.default_rng(seed)
    counts, labels = resamples(groups, n_resamples, rng), relabelled(groups, n_resamples + 1, rng)
    weights, n_pairs = held_out(groups), groups.n_pairs
    rows, squares, cosines, turns = [], [], [], []
    for layer in tqdm(chosen, desc="reliability", unit="layer", disable=not progress):
        sides = activations[layer].double().numpy()
        differences, letter = without_letter(sides[:, 0] - sides[:, 1], groups)
        gram = differences @ differences.T
        across = differences @ (sides.mean(1) - sides.mean((0, 1))).T
        shared = float(shared_part(gram, groups)[0])
        ends = np.quantile(shared_part(gram, groups, counts), [0.025, 0.975])
        squares.append(squared_lengths(gram, labels))
        cosines.append(held_out_cosines(gram, weights))
        turns.append(influences(gram, groups))
        low, high = cosine_of(ends, n_pairs / 2)
        rows.append(
            {
                "layer": layer,
                "split_half": cosine_of(np.array([shared]), n_pairs / 2).item(),
                "low": low,
                "high": high,
                "agreement": _mean_cosine(gram),
                "against": float((cosines[-1] < 0).mean()),
                "d_prime": d_prime(gram, across, weights),
                "shared": shared,
                "shared_low": ends[0],
                "shared_high": ends[1],
                "cone": cone(gram, groups, counts, 0.95),
                "letter": letter,
            }
        )
    frame = pd.DataFrame(rows)
    frame["p"] = by_chance(np.stack(squares, axis=1))
    frame["verdict"] = [_verdict(row) for row in frame.to_dict("records")]
    frame["because"] = [_because(row, n_pairs) for row in frame.to_dict("records")]
    known = frame["shared"].where((frame["verdict"] != NOTHING) & (frame["shared"] > 0)).to_numpy()
    frame["pairs_for_95"] = np.ceil(2 * AIM / (1 - AIM) * (1 - known) / known)
    order = ["split_half", "low", "high", "p", "agreement", "against", "d_prime", "shared", "shared_low", "shared_high"]
    return Reliability(
        frame=frame[["layer", "verdict", "because", *order, "cone", "pairs_for_95", "letter"]],
        settings={
            "pairs": str(n_pairs),
            "taken_out": "answer letter" if groups.opposite or n_joined else "nothing",
            "joined": f"{n_joined} questions in both letter orders, as one pair each" if n_joined else "nothing",
            "n_resamples": str(n_resamples),
            "seed": str(seed),
        },
        provenance={"activations": activations.provenance},
        cosines=torch.from_numpy(np.stack(cosines)),
        influences=torch.from_numpy(np.stack(turns)),
        members=members,
    )


def _verdict(row: dict) -> str:
    if row["p"] >= CHANCE:
        return NOTHING
    return CONSISTENT if row["low"] > SURELY and row["against"] <= AGAINST else WEAK


def _because(row: dict, n_pairs: int) -> str:
    numbers = (
        f"split-half cosine {row['split_half']:.2f} [{row['low']:.2f}, {row['high']:.2f}], "
        f"{round(row['against'] * n_pairs)} of {n_pairs} pairs against"
    )
    if row["verdict"] == NOTHING:
        return f"exchanging sides at random gives as long a vector in {row['p']:.1%} of draws; {numbers}"
    short = [f"the interval does not lie above {SURELY}"] * (row["low"] <= SURELY)
    short += [f"more than {AGAINST:.0%} are against"] * (row["against"] > AGAINST)
    return numbers + (f": {' and '.join(short)}" if short else "")


def _mean_cosine(gram: Float[np.ndarray, "pair pair"]) -> float:
    """Over all two different pairs."""
    lengths = np.sqrt(np.diag(gram))
    n_pairs = len(gram)
    cosines = gram / np.outer(lengths, lengths)
    return float((cosines.sum() - n_pairs) / (n_pairs * (n_pairs - 1)))


def _check_finite(activations: PairActivations, layers: Sequence[int]) -> None:
    for layer in layers:
        if not bool(torch.isfinite(activations[layer]).all()):
            raise ValueError(f"activations of layer {layer} are not finite: read them in bfloat16 or float32")


def _check_pairs(activations: PairActivations, layers: Sequence[int], members: Members) -> None:
    """Refuses sides that are alike, and pairs that stand twice; they are told by their numbers in the set."""
    for layer in layers:
        sides = activations[layer].double()  # [pair side d_model]
        gaps = (sides[:, 0] - sides[:, 1]).norm(dim=-1)
        if found := (gaps <= 1e-6 * sides.norm(dim=-1).mean(1)).nonzero().flatten().tolist():
            alike = sorted(i for one in found for i in members[one])
            raise ValueError(
                f"both sides of pair{'s' if len(alike) > 1 else ''} {layer_ranges(alike)} are the same at layer "
                f"{layer}: give pairs whose answers differ at the tokens that are read, or name layers= where they do"
            )
    points = sides.flatten(1)  # of the last layer
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    twice = [(i, j) for i, j in (distances <= 1e-6 * points.norm(dim=-1).mean()).nonzero().tolist() if i < j]
    hashes = activations.provenance.details.get(PAIR_HASHES, "").split()
    if len(hashes) == len(activations):
        twice += [(hashes.index(one), i) for i, one in enumerate(hashes) if hashes.index(one) < i]
    if twice:
        (i, j), n_twice = twice[0], len({j for _, j in twice})
        raise ValueError(
            f"{n_twice} pair{'s stand' if n_twice > 1 else ' stands'} twice, such as {members[j][0]}, which is "
            f"{members[i][0]}: a pair agrees with itself. Keep one of each, then read the activations again"
        )
