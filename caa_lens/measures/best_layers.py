"""The layer that a sweep finds best, and what its effect is worth: on what was it chosen?

A layer that is chosen among many on some questions has too large an effect on these, and an interval that is too seldom
right. So its effect is reported on others: either a sweep is given validation questions to choose on, or the swept
questions choose and report in turn (`honest_choice`).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from caa_lens.measures.honest_choice import choose_honestly
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.provenance import layer_ranges


class ChosenLayer(int):
    """The number of a layer that remembers on what it was chosen; in all else an `int`.

    Attributes:
        chosen_on: in words, such as "20 validation questions".
    """

    chosen_on: str

    def __new__(cls, layer: int, chosen_on: str) -> "ChosenLayer":
        made = super().__new__(cls, layer)
        made.chosen_on = chosen_on
        return made

    def __repr__(self) -> str:
        return f"{int(self)} (chosen on {self.chosen_on})"

    def __str__(self) -> str:
        return str(int(self))

    def __reduce__(self) -> tuple:
        return ChosenLayer, (int(self), self.chosen_on)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationEffects:
    """What validation questions say of each layer, of which nothing is reported but the choice.

    Attributes:
        layers: those that were swept.
        effects: by layer, mean over the questions of score(+m) - score(-m); NaN where a score is.
        multiplier: m.
        n_questions: how many they are.
        test, test_hash: which pairs.
    """

    layers: tuple[int, ...]
    effects: tuple[float, ...]
    multiplier: float
    n_questions: int
    test: str
    test_hash: str

    @property
    def best_layer(self) -> ChosenLayer:
        """The layer with the largest effect on them."""
        layer = largest(list(self.layers), np.array(self.effects), self.multiplier)
        return ChosenLayer(layer, f"{self.n_questions} validation questions")


@dataclass(frozen=True, slots=True, kw_only=True)
class BestLayer:
    """The best layer's effect on questions that did not choose it.

    Attributes:
        layer: the one with the largest effect where it was chosen.
        multiplier: m of the effect score(+m) - score(-m).
        effect: mean over questions, of layers that other questions chose.
        low, high: its 95 % interval.
        reported_on: in words, what the effect is of.
        agreeing: the share of folds that chose this layer; 1 where no folds were needed.
    """

    layer: ChosenLayer
    multiplier: float
    effect: float
    low: float
    high: float
    reported_on: str
    agreeing: float = 1.0

    def __str__(self) -> str:
        agreeing = "" if self.agreeing == 1 else f"; {self.agreeing:.0%} of the folds choose it"
        return (
            f"layer {self.layer}, chosen on {self.layer.chosen_on}{agreeing}: {self.effect:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}] of +{self.multiplier:g} against -{self.multiplier:g} on "
            f"{self.reported_on}"
        )


def deciding(multipliers: list[float]) -> float:
    """Of multipliers above 0 the smallest from 1 on, else the largest: what layers are chosen at."""
    return min((m for m in multipliers if m >= 1), default=max(multipliers))


def largest(layers: list[int], effects: Float[np.ndarray, " layer"], multiplier: float) -> int:
    """The layer with the largest mean effect.

    Raises:
        ValueError: if an effect is NaN, or all are the same.
    """
    if unknown := [layer for layer, effect in zip(layers, effects, strict=True) if not np.isfinite(effect)]:
        raise ValueError(
            f"the effect at multiplier {multiplier:g} is NaN at layer{'s' if len(unknown) > 1 else ''} "
            f"{layer_ranges(unknown)}: sweep smaller multipliers, or load the model in bfloat16 or float32"
        )
    if len(set(effects.tolist())) == 1 and len(layers) > 1:
        raise ValueError(
            f"no layer is the best: the effect at multiplier {multiplier:g} is {effects[0]:.3g} at every layer; name a "
            "layer, or sweep other multipliers"
        )
    return layers[int(np.argmax(effects))]


def effect_of(
    layer: ChosenLayer, effects: Float[np.ndarray, " question"], multiplier: float, n_resamples: int, seed: int | None
) -> BestLayer:
    """The effect of a layer that these questions did not choose."""
    (low,), (high,) = bootstrap_interval(effects[:, None], n_resamples=n_resamples, seed=seed)
    return BestLayer(
        layer=layer,
        multiplier=multiplier,
        effect=float(effects.mean()),
        low=float(low),
        high=float(high),
        reported_on=f"{len(effects)} questions that did not choose it",
    )


def effect_by_folds(
    layer: ChosenLayer, effects: Float[np.ndarray, "question layer"], multiplier: float, seed: int | None
) -> BestLayer:
    """The effect of the choice that these questions make, each reporting on what others chose.

    Raises:
        ValueError: for fewer than 8 questions.
    """
    found = choose_honestly(effects, seed=seed)
    return BestLayer(
        layer=layer,
        multiplier=multiplier,
        effect=found.effect,
        low=found.low,
        high=found.high,
        reported_on=f"these {len(effects)} questions in folds, each on the layer that the others choose",
        agreeing=found.agreeing,
    )
