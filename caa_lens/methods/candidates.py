"""Methods as they are compared: how each is fitted at some settings, what is done at a strength, and its own range.

Every candidate has as many settings (layers; of masks over all layers, how many elements) and as many strengths as the
others, so that none is tuned more than another. Strengths of both signs push the behavior up and down; 1 is what the
method itself takes:

    CAA           v times the strength
    random        the same of a random direction of CAA's norm, which no pair decides
    ActAdd        the two texts' difference, by position at the front or its mean elsewhere, times the strength
    Linear-AcT    the map from negative to positive answers, or the other way round, up to a strength of 1
    instruction   the projection set to z+ or z-; beyond 1 as much farther as the strength says, in units of z+ - z-;
                  the original reads prompts with either instruction and without, and sets to what each leads to
    BiPO          the learned vector times the strength
    SADI          the masked numbers made larger; below 0 smaller, to nothing at -1
    InferAligner  the difference of prompts with either instruction, times the strength, with its gate held open

InferAligner's gate asks what kind of prompt it is given, and all questions here are of one kind: left alone, it would
only say for which questions nothing is done. Activation scaling is no candidate, since its numbers are tied to the
positions of prompts of one length, and the questions that show side effects have others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from caa_lens.contrast.messages import followed_by
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.placed_conditions import Condition
from caa_lens.methods import actadd, bipo, inferaligner, instruction, linear_act, sadi
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVector

Fits = Mapping[int, Any]
VECTORS = (-3.0, -2.0, -1.0, -0.35, 0.35, 1.0, 2.0, 3.0)
SHARES = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0)
SETTING = (-3.5, -2.0, -1.0, -0.4, 0.4, 1.0, 2.0, 3.5)
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
    words: tuple[str, str],
    *,
    n_settings: int,
    bipo_options: Mapping[str, Any] | None = None,
    prompt_format: PromptFormat | None = None,
) -> dict[str, Candidate]:
    """All candidates that the library knows, by name; those with "original" act where their authors' code does.

    Args:
        words: the instruction in words, for more of the behavior and for less of it; also ActAdd's two texts.
        n_settings: how many of the masks over all layers are tried, as many as there are layers.
        bipo_options: more of `bipo.fit`, such as `epochs`.
        prompt_format: of all prompts that are fitted on; the model's own by default.
    """
    options, how = dict(bipo_options or {}), {"prompt_format": prompt_format, "progress": False}
    epochs = int(options.get("epochs", 10))

    def both_answers(n_pairs: int) -> tuple[int, int]:
        return 2 * n_pairs, 0

    def both_answers_twice(n_pairs: int) -> tuple[int, int]:
        return 4 * n_pairs, 0

    def two_texts(n_pairs: int) -> tuple[int, int]:
        return 2, 0

    def of_training(n_pairs: int) -> tuple[int, int]:
        return 2 * n_pairs * (2 + epochs), 2 * n_pairs * epochs

    texts, maps, answers = _fit_actadd(words), _fit_maps(how), _fit_instruction(how)
    found = [
        Candidate(name="CAA", fit=_fit_caa(how), at=_times),
        Candidate(name="random", fit=_fit_random(how), at=_times),
        Candidate(name="ActAdd", fit=texts, at=_fitted("caa"), passes=two_texts),
        Candidate(name="ActAdd, original", fit=texts, at=_fitted("original"), passes=two_texts),
        Candidate(name="Linear-AcT", fit=maps, at=_mapped("caa"), strengths=SHARES, passes=both_answers_twice),
        Candidate(
            name="Linear-AcT, original", fit=maps, at=_mapped("original"), strengths=SHARES, passes=both_answers_twice
        ),
        Candidate(name="instruction", fit=answers, at=_set, strengths=SETTING),
        Candidate(
            name="instruction, original",
            fit=_fit_told(words, how),
            at=_set_as_told,
            strengths=SETTING,
            passes=both_answers_twice,
        ),
        Candidate(name="BiPO", fit=_fit_bipo("caa", options, how), at=_fitted("caa"), passes=of_training),
        Candidate(
            name="BiPO, original", fit=_fit_bipo("all", options, how), at=_fitted("original"), passes=of_training
        ),
        Candidate(name="SADI", fit=_fit_sadi(how), at=_fitted("caa"), strengths=SCALES),
        Candidate(
            name="SADI, original",
            fit=_fit_sadi_heads(how),
            at=_fitted("original"),
            strengths=SCALES,
            settings=N_HEADS[:n_settings],
            unit="heads",
        ),
        Candidate(name="InferAligner", fit=_fit_inferaligner(words, how), at=_opened, passes=both_answers),
    ]
    return {one.name: one for one in found}


Fit = Callable[[Any, ContrastSet, Sequence[int], int], Fits]
How = Mapping[str, Any]


def _times(vector: SteeringVector, strength: float) -> Condition:
    return (Intervention(vector=vector, multiplier=strength),)


def _fitted(positions: str) -> Callable[[Any, float], Condition]:
    return lambda fitted, strength: fitted.interventions(strength, positions=positions)


def _fit_caa(how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        vectors = extract(model, pairs, layers=layers, **how)
        return {layer: vectors[layer] for layer in layers}

    return fit


def _fit_random(how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        draw, found = torch.Generator().manual_seed(seed), {}
        for layer, vector in _fit_caa(how)(model, pairs, layers, seed).items():
            direction = torch.randn(vector.direction.shape, generator=draw)
            direction = direction * (vector.direction.norm() / direction.norm())
            found[layer] = SteeringVector.from_direction(direction, layer=layer, model=str(model.cfg.model_name))
        return found

    return fit


def _fit_actadd(words: tuple[str, str]) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        both = actadd.fit(model, words[0], words[1], layers=sorted(layers))
        return {layer: both.at([layer]) for layer in layers}

    return fit


def _fit_maps(how: How) -> Fit:
    """A map up and a map down: from the negative answers to the positive ones, and back."""

    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        swapped = ContrastSet.from_pairs([(p.question, p.negative, p.positive) for p in pairs], name=pairs.name)
        return {
            layer: tuple(linear_act.fit(model, some, layers=[layer], **how) for some in (pairs, swapped))
            for layer in layers
        }

    return fit


def _mapped(positions: str) -> Callable[[Any, float], Condition]:
    return lambda both, strength: both[strength < 0].interventions(abs(strength), positions=positions)


def _fit_instruction(how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        both = instruction.fit(model, pairs, layers=sorted(layers), **how)
        return {layer: both.at([layer]) for layer in layers}

    return fit


def _set(fitted: Any, strength: float) -> Condition:
    share, beyond = min(abs(strength), 1.0), max(abs(strength) - 1.0, 0.0)
    overshoot = beyond if strength > 0 else -1.0 - beyond  # from z-, in units of z+ - z-
    return fitted.interventions(share, positions="caa", how="pull", overshoot=overshoot)


def _fit_told(words: tuple[str, str], how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        questions = [pair.question for pair in pairs]
        both = [instruction.fit(model, questions, instruction=one, layers=sorted(layers), **how) for one in words]
        return {layer: tuple(one.at([layer]) for one in both) for layer in layers}

    return fit


def _set_as_told(both: Any, strength: float) -> Condition:
    share, beyond = min(abs(strength), 1.0), max(abs(strength) - 1.0, 0.0)
    return both[strength < 0].interventions(share, positions="original", how="pull", overshoot=beyond)


def _fit_bipo(positions: str, options: Mapping[str, Any], how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        given = {"positions": positions, "seed": seed, "prompt_format": how["prompt_format"], **options}
        return {layer: bipo.fit(model, pairs, layer=layer, **given) for layer in layers}

    return fit


def _fit_sadi(how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        k = min(N_COORDINATES, model.cfg.d_model)
        both = sadi.fit(model, pairs, k=k, site="stream", rank="absolute", layers=sorted(layers), **how)
        return {layer: both.at([layer]) for layer in layers}

    return fit


def _fit_sadi_heads(how: How) -> Fit:
    return lambda model, pairs, settings, seed: {k: sadi.fit(model, pairs, k=k, site="heads", **how) for k in settings}


def _fit_inferaligner(words: tuple[str, str], how: How) -> Fit:
    def fit(model: Any, pairs: ContrastSet, layers: Sequence[int], seed: int) -> Fits:
        more, less = ([followed_by(pair.question, one) for pair in pairs] for one in words)
        both = inferaligner.fit(model, (more, less), layers=sorted(layers), **how)
        return {layer: both.at([layer]) for layer in layers}

    return fit


def _opened(fitted: Any, strength: float) -> Condition:
    return fitted.interventions(strength, positions="caa", gated=False)
