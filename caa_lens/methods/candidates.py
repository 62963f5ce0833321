"""Methods as they are compared: how each is fitted at some settings, what is done at a strength, and its own range.

Every candidate has as many settings (layers; of masks over all layers, how many elements) and as many strengths as the
others, so that none is tuned more than another. Strengths of both signs push the behavior up and down; 1 is what the
method itself takes:

    CAA           v times the strength
    random        the same of a random direction of CAA's norm, which no pair decides
    ActAdd        the two texts' difference, by position at the front or its mean elsewhere, times the strength
    Linear-AcT    the map from negative to positive answers, or the other way round, up to a strength of 1
    instruction   the projection set to z+ or z-; beyond 1 as much farther as the strength says, in units of z+ - z-
    BiPO          the learned vector times the strength
    SADI          the masked numbers made larger; below 0 smaller, to nothing at -1
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.placed_conditions import Condition
from caa_lens.methods import actadd, bipo, instruction, linear_act, sadi
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVector

Fits = Mapping[int, Any]
VECTORS = (-3.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0)
SHARES = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0)
SETTING = (-3.5, -2.0, -1.5, -1.0, 1.0, 1.5, 2.0, 3.5)
SCALES = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)
N_HEADS = (1, 2, 4, 6, 8, 10, 16, 20, 32)
N_COORDINATES = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A method to be compared.

    Attributes:
        name: in tables and figures.
        fit: `(model, pairs, settings, seed) -> {setting: fitted}`.
        at: `(fitted, strength) -> interventions`.
        strengths: ascending, without 0, of both signs.
        settings: what is chosen among; the layers of the comparison where it is None.
        passes: `n_pairs -> (forward, backward)`, texts run to fit one setting.
        unit: what a setting is.
    """

    name: str
    fit: Callable[[Any, ContrastSet, Sequence[int], int], Fits]
    at: Callable[[Any, float], Condition]
    strengths: tuple[float, ...] = VECTORS
    settings: tuple[int, ...] | None = None
    passes: Callable[[int], tuple[int, int]] = lambda n_pairs: (2 * n_pairs, 0)
    unit: str = "layer"

    def __post_init__(self) -> None:
        found = list(self.strengths)
        if found != sorted(set(found)) or 0 in found or not (min(found) < 0 < max(found)):
            raise ValueError(
                f"{self.name}: strengths must ascend, differ, leave out 0 and have both signs, got {found}"
            )


def named_candidates(
    words: tuple[str, str], *, n_settings: int, bipo_options: Mapping[str, Any] | None = None
) -> dict[str, Candidate]:
    """All candidates that the library knows, by name; those with "original" act where their authors' code does.

    Args:
        words: the instruction in words, for more of the behavior and for less of it; also ActAdd's two texts.
        n_settings: how many of the masks over all layers are tried, as many as there are layers.
        bipo_options: more of `bipo.fit`, such as `epochs`.
    """
    options = dict(bipo_options or {})
    epochs = int(options.get("epochs", 10))
    found = [
        Candidate(name="CAA", fit=_fit_caa, at=_times),
        Candidate(name="random", fit=_fit_random, at=_times),
        Candidate(
            name="ActAdd", fit=_fit_actadd(words), at=_fitted("caa"), strengths=VECTORS, passes=lambda n_pairs: (2, 0)
        ),
        Candidate(
            name="ActAdd, original", fit=_fit_actadd(words), at=_fitted("original"), passes=lambda n_pairs: (2, 0)
        ),
        Candidate(name="Linear-AcT", fit=_fit_maps, at=_mapped("caa"), strengths=SHARES),
        Candidate(name="Linear-AcT, original", fit=_fit_maps, at=_mapped("original"), strengths=SHARES),
        Candidate(name="instruction", fit=_fit_instruction, at=_set("caa"), strengths=SETTING),
        Candidate(name="instruction, original", fit=_fit_instruction, at=_set("original"), strengths=SETTING),
        Candidate(
            name="BiPO",
            fit=_fit_bipo(options),
            at=_fitted("caa"),
            passes=lambda n_pairs: (2 * n_pairs * (2 + epochs), 2 * n_pairs * epochs),
        ),
        Candidate(name="SADI", fit=_fit_sadi, at=_fitted("caa"), strengths=SCALES),
        Candidate(
            name="SADI, original",
            fit=_fit_sadi_heads,
            at=_fitted("original"),
            strengths=SCALES,
            settings=N_HEADS[:n_settings],
            unit="heads",
        ),
    ]
    return {one.name: one for one in found}


def _times(vector: SteeringVector, strength: float) -> Condition:
    return (Intervention(vector=vector, multiplier=strength),)


def _fitted(positions: str) -> Callable[[Any, float], Condition]:
    return lambda fitted, strength: fitted.interventions(strength, positions=positions)


def _fit_caa(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
    vectors = extract(model, pairs, layers=layers, progress=False)
    return {layer: vectors[layer] for layer in layers}


def _fit_random(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
    draw, found = torch.Generator().manual_seed(seed), {}
    for layer, vector in _fit_caa(model, pairs, layers, seed).items():
        direction = torch.randn(vector.direction.shape, generator=draw)
        direction = direction * (vector.direction.norm() / direction.norm())
        found[layer] = SteeringVector.from_direction(direction, layer=layer, model=str(model.cfg.model_name))
    return found


def _fit_actadd(words: tuple[str, str]) -> Callable[[Any, ContrastSet, Sequence[int], int], Fits]:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        both = actadd.fit(model, words[0], words[1], layers=sorted(layers))
        return {layer: both.at([layer]) for layer in layers}

    return fit


def _fit_maps(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
    """A map up and a map down: from the negative answers to the positive ones, and back."""
    swapped = ContrastSet.from_pairs([(p.question, p.negative, p.positive) for p in pairs], name=pairs.name)
    return {
        layer: tuple(linear_act.fit(model, some, layers=[layer], progress=False) for some in (pairs, swapped))
        for layer in layers
    }


def _mapped(positions: str) -> Callable[[Any, float], Condition]:
    return lambda both, strength: both[strength < 0].interventions(abs(strength), positions=positions)


def _fit_instruction(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
    both = instruction.fit(model, pairs, layers=sorted(layers), progress=False)
    return {layer: both.at([layer]) for layer in layers}


def _set(positions: str) -> Callable[[Any, float], Condition]:
    def at(fitted: Any, strength: float) -> Condition:
        share, beyond = min(abs(strength), 1.0), max(abs(strength) - 1.0, 0.0)
        overshoot = beyond if strength > 0 else -1.0 - beyond  # from z-, in units of z+ - z-
        return fitted.interventions(share, positions=positions, how="pull", overshoot=overshoot)

    return at


def _fit_bipo(options: Mapping[str, Any]) -> Callable[[Any, ContrastSet, Sequence[int], int], Fits]:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        given = {"positions": "caa", "seed": seed, **options}
        return {layer: bipo.fit(model, pairs, layer=layer, **given) for layer in layers}

    return fit


def _fit_sadi(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
    k = min(N_COORDINATES, model.cfg.d_model)
    both = sadi.fit(model, pairs, k=k, site="stream", rank="absolute", layers=sorted(layers), progress=False)
    return {layer: both.at([layer]) for layer in layers}


def _fit_sadi_heads(model: Any, pairs: ContrastSet, settings: Sequence[int], seed: int) -> Fits:
    return {k: sadi.fit(model, pairs, k=k, site="heads", progress=False) for k in settings}
