"""Layer x multiplier grids: how much each vector at each strength moves the model's answers.

One row a layer, multiplier and question, in a tidy frame; intervals are 95 % bootstrap intervals over questions.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from caa_lens.arguments import check_count, check_list
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.operators import Formula, name_of
from caa_lens.measures.answers import METRIC_LABEL, Condition, score_answers
from caa_lens.measures.best_layers import (
    BestLayer,
    ChosenLayer,
    ValidationEffects,
    deciding,
    effect_by_folds,
    effect_of,
    largest,
)
from caa_lens.measures.intervals import bootstrap_interval, mean_with_interval
from caa_lens.measures.training_pairs import warn_of_training_pairs
from caa_lens.models.checks import check_layers, check_model
from caa_lens.plots.measures import dose_response, sweep_heatmap
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.provenance import last_part
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention, is_fitted
from caa_lens.stops import kept_if_stopped
from caa_lens.vectors.checks import check_vector_set


class RepeatedQuestionsWarning(UserWarning):
    """Questions stand twice in what is scored, so that intervals over questions are too narrow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep(Result):
    """A finished sweep.

    Attributes:
        frame: columns `behavior, layer, multiplier, question, p_matching` (A/B) or `margin` (completions), and
            `logp_positive`, `logp_negative`; `positions`, by name. `question` is the pair's index in the test set.
        settings: model, test set and its hash, prompt format, system prompt, dtype.
        provenance: of the `vectors`.
        metric: "p_matching" or "margin".
        validation: the effects on validation questions, if `sweep` was given some: they choose the best layer.
        same_question: where some questions stand twice, as with their letters exchanged, the number of the first of
            each; empty where all differ.
    """

    metric: str
    validation: ValidationEffects | None = None
    same_question: tuple[int, ...] = ()

    def table(self) -> pd.DataFrame:
        """Mean score over questions: one row a layer, one column a multiplier."""
        return self.summary(n_resamples=0).pivot(index="layer", columns="multiplier", values="mean")

    def summary(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """Mean over questions with its 95 % bootstrap interval: `layer, multiplier, mean, low, high`."""
        return mean_with_interval(self.frame, ["layer", "multiplier"], self.metric, n_resamples=n_resamples, seed=seed)

    def effect(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """By layer, the paired difference between a multiplier and its negative, per question, with its interval.

        Columns `layer, multiplier, effect, low, high`, for each multiplier m > 0 whose -m was swept too: the mean over
        questions of score(+m) - score(-m), in the metric's units.
        """
        _ = self.deciding_multiplier  # refuses a sweep that has no effects
        paired = self.paired_multipliers
        keys = [(layer, m) for layer in sorted(set(self.frame["layer"])) for m in paired]
        differences = self._differences(keys)
        low, high = bootstrap_interval(differences, n_resamples=n_resamples, seed=seed)
        layers, ms = zip(*keys, strict=True)
        return pd.DataFrame(
            {"layer": layers, "multiplier": ms, "effect": differences.mean(0), "low": low, "high": high}
        )

    @property
    def paired_multipliers(self) -> list[float]:
        """Those above 0 that were swept together with their negatives, ascending."""
        multipliers = set(self.frame["multiplier"])
        return sorted(m for m in multipliers if m > 0 and -m in multipliers)

    @property
    def best_layer(self) -> ChosenLayer:
        """The layer with the largest mean effect of +m against -m, at the smallest swept m >= 1 (else the largest).

        It prints on what it was chosen: on the validation questions, or on the very questions that this sweep reports,
        which flatters its effect here; `best` has an effect that is not flattered.

        Raises:
            ValueError: if of several layers no multiplier was swept with its negative, no layer stands out from the
                others, or the effect of one is NaN.
        """
        layers = sorted(set(self.frame["layer"]))
        if not layers:
            raise ValueError("the sweep has no rows: there is no best layer")
        if len(layers) == 1:
            return ChosenLayer(layers[0], "nothing: it is the only layer that was swept")
        if self.validation is not None:
            return self.validation.best_layer
        effect = self.effect(n_resamples=0)
        chosen = effect[effect["multiplier"] == self.deciding_multiplier].sort_values("layer")
        best = largest(layers, chosen["effect"].to_numpy(), self.deciding_multiplier)
        return ChosenLayer(best, f"the {self.frame['question'].nunique()} questions that this sweep reports")

    @property
    def best(self) -> BestLayer:
        """The best layer's effect with its 95 % interval, on questions that did not choose it.

        With validation questions that is its plain effect on the swept ones. Without them, these choose and report in
        turn: five folds, dealt four times, each on the layer that the others choose, with an interval of that whole
        procedure (see `measures.honest_choice`). A question that stands twice counts as one, the mean of its effects.

        Raises:
            ValueError: as `best_layer`; or of several layers without validation, for fewer than 8 questions.
        """
        layer, m = self.best_layer, self.deciding_multiplier
        layers = sorted(set(self.frame["layer"]))
        if len(layers) > 1 and self.validation is None:
            effects = self._one_each(self._differences([(one, m) for one in layers]))
            return effect_by_folds(layer, effects, m, seed=0)
        own = self._one_each(self._differences([(layer, m)]))[:, 0]
        return effect_of(layer, own, m, n_resamples=2000, seed=0)

    def _differences(self, cells: Sequence[tuple[int, float]]) -> Float[np.ndarray, "question cell"]:
        """score(+m) - score(-m) of every question, at each layer and m."""
        table = self.frame.pivot(index="question", columns=["layer", "multiplier"], values=self.metric)
        return np.stack([table[(layer, m)] - table[(layer, -m)] for layer, m in cells], axis=1)

    def _one_each(self, effects: Float[np.ndarray, "question layer"]) -> Float[np.ndarray, "different layer"]:
        """The mean effects of each different question."""
        if not self.same_question:
            return effects
        return pd.DataFrame(effects).groupby(list(self.same_question)).mean().to_numpy()

    @property
    def deciding_multiplier(self) -> float:
        """The smallest multiplier >= 1 that was swept with its negative, else the largest: layers are chosen at it.

        Raises:
            ValueError: if none was swept with its negative.
        """
        paired = self.paired_multipliers
        if not paired:
            multipliers = sorted(set(self.frame["multiplier"]))
            raise ValueError(
                f"no multiplier was swept with its negative, got {multipliers}: sweep e.g. -1 and 1, or name a layer"
            )
        return deciding(paired)

    @property
    def unsteered(self) -> float:
        """Mean score without steering (multiplier 0); NaN if 0 was not swept."""
        return float(self.frame.loc[self.frame["multiplier"] == 0, self.metric].mean())

    @property
    def label(self) -> str:
        """What a score is, in words, with its units."""
        return METRIC_LABEL[self.metric]

    def plot(self) -> go.Figure:
        """Heat map of the mean score, layer x multiplier."""
        return sweep_heatmap(
            self.summary(),
            behavior=self.provenance["vectors"].behavior,
            test=self.settings.get("test", ""),
            label=self.label,
            unsteered=self.unsteered,
            n_questions=self.frame["question"].nunique(),
            model=last_part(self.provenance["vectors"].model),
        )

    def plot_layer(self, layer: int | None = None) -> go.Figure:
        """Dose-response curve of one layer (the best by default) with its interval."""
        return dose_response(
            self.summary(),
            self.best_layer if layer is None else check_count("layer", layer, least=0),
            behavior=self.provenance["vectors"].behavior,
            label=self.label,
            n_questions=self.frame["question"].nunique(),
            model=last_part(self.provenance["vectors"].model),
        )

    def __repr__(self) -> str:
        f = self.frame
        try:
            best = f", best layer {self.best_layer!r}" if self.paired_multipliers else ""
        except ValueError:
            best = ", no best layer"
        return (
            f"Sweep({self.provenance['vectors'].behavior}, {self.metric}, {f['layer'].nunique()} layers x "
            f"{f['multiplier'].nunique()} multipliers x {f['question'].nunique()} questions{best})"
        )


def sweep(
    model: Any,
    test: ContrastSet,
    vectors: Any,
    *,
    operator: str | Formula = "add",
    positions: str = "caa",
    multipliers: Sequence[float | int] = (-1.0, 0.0, 1.0),
    layers: Sequence[int] | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    validation: ContrastSet | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Score a test set with each layer's vector at each multiplier.

    Args:
        test: held-out pairs (use `ContrastSet.split`).
        vectors: `SteeringVectors`, each added at its own layer; or a fitted method of `caa_lens.methods`, of which
            each layer acts alone.
        operator: what is done with vectors, a name in `caa_lens.engine.OPERATORS` that needs no more, or a function; a
            fitted method knows its own.
        positions: a name, see `caa_lens.steering.placing`; of a fitted method also "original". What does not begin at
            the end of the instruction runs in full, after a `SharedPrefixWarning`.
        multipliers: different numbers v is multiplied by; of a fitted method its strengths.
        layers: those of the vectors by default.
        system: a system prompt for every question.
        validation: other held-out pairs, on which the best layer is chosen instead; they run at one multiplier and its
            negative only, and nothing else is reported of them.

    Raises:
        ValueError: for an empty test set, validation pairs that are test pairs or of another kind or without a
            multiplier and its negative, no multipliers, repeated multipliers, one that the model's dtype cannot hold
            times its vector, or scores that are all NaN.
        IndexError: for a layer without a vector.

    Warns:
        NotFiniteWarning: of layers and multipliers under which scores are NaN, as half precision can give.
        RepeatedQuestionsWarning: of questions that stand twice.
    """
    check_model(model)
    check_contrast_set(test)
    fitted = is_fitted(vectors)
    if not fitted:
        check_vector_set(vectors)
    elif operator != "add":
        raise ValueError("a fitted method knows what it does: leave operator out")
    warn_of_training_pairs(test, vectors)
    multipliers = check_list("multipliers", multipliers, float)
    if not multipliers:
        raise ValueError("no multipliers given: expected at least one number")
    if len(set(multipliers)) != len(multipliers):
        raise ValueError(f"multipliers must differ, got {multipliers}")
    layers = check_layers(model, vectors.layers if layers is None else layers)
    how: dict[str, Any] = {
        "operator": operator,
        "positions": positions,
        "layers": layers,
        "prompt_format": prompt_format,
        "system": system,
        "max_tokens": max_tokens,
        "progress": progress,
    }
    with kept_if_stopped():
        chosen_on = None if validation is None else _on_validation(model, validation, test, vectors, multipliers, how)
    cells = [(layer, m) for layer in layers for m in multipliers]
    conditions: list[Condition]
    if fitted:
        alone = {layer: vectors.at([layer]) for layer in layers}
        conditions = [alone[layer].interventions(m, positions=positions) for layer, m in cells]
    else:
        conditions = [
            (Intervention(vector=vectors[layer], multiplier=m, operator=operator, positions=positions),)
            for layer, m in cells
        ]
    with kept_if_stopped():
        scores = score_answers(
            model,
            test,
            conditions,
            prompt_format=prompt_format,
            system=system,
            max_tokens=max_tokens,
            progress=progress,
        )
    n_pairs = len(test)
    frame = pd.DataFrame(
        {
            "behavior": vectors.behavior,
            "layer": np.repeat([layer for layer, _ in cells], n_pairs),
            "multiplier": np.repeat([m for _, m in cells], n_pairs),
            "question": np.tile(np.arange(n_pairs), len(cells)),
            scores.metric: scores.values.T.flatten().numpy(),
            "logp_positive": scores.positive.T.flatten().numpy(),
            "logp_negative": scores.negative.T.flatten().numpy(),
            "positions": positions,
        }
    )
    what = vectors.provenance.method if fitted else name_of(operator)
    return Sweep(
        frame=frame,
        settings={**scores.settings, "operator": what, "positions": positions},
        provenance={"vectors": vectors.provenance},
        metric=scores.metric,
        validation=chosen_on,
        same_question=_repeated(test),
    )


def _repeated(test: ContrastSet) -> tuple[int, ...]:
    """The first number of each question, where one stands twice."""
    first: dict[str, int] = {}
    numbers = tuple(first.setdefault(digest, i) for i, digest in enumerate(test.pair_hashes))
    if len(first) == len(numbers):
        return ()
    warnings.warn(
        f"{len(numbers) - len(first)} of the {len(numbers)} questions of {test.name!r} stand twice (perhaps with "
        "letters exchanged): intervals over questions take them for different ones and are too narrow, but for `best`, "
        "where each counts once",
        RepeatedQuestionsWarning,
        stacklevel=3,
    )
    return numbers


def _on_validation(
    model: Any, validation: ContrastSet, test: ContrastSet, vectors: Any, multipliers: list[float], how: dict[str, Any]
) -> ValidationEffects:
    """The effect of each layer on the validation questions, at the one multiplier that decides."""
    check_contrast_set(validation)
    if validation.kind != test.kind:
        raise ValueError(f"validation has pairs of kind {validation.kind!r}, test {test.kind!r}: give both of one kind")
    if shared := len({*validation.pair_hashes} & {*test.pair_hashes}):
        raise ValueError(
            f"{shared} of the {len(validation)} validation pairs are test pairs, which would flatter what is chosen: "
            "train, validation, test = pairs.split(test=20, validation=20)"
        )
    if not (paired := [m for m in multipliers if m > 0 and -m in multipliers]):
        raise ValueError(
            f"validation pairs choose by the effect of +m against -m, got the multipliers {multipliers}: sweep e.g. -1 "
            "and 1, or leave validation out"
        )
    m = deciding(paired)
    effect = sweep(model, validation, vectors, multipliers=[-m, m], **how).effect(n_resamples=0)
    return ValidationEffects(
        layers=tuple(int(layer) for layer in effect["layer"]),
        effects=tuple(float(one) for one in effect["effect"]),
        multiplier=m,
        n_questions=len(validation),
        test=validation.name,
        test_hash=validation.content_hash,
    )
