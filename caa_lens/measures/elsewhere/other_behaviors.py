"""Other behaviors: how near their vectors lie, and what steering does to their test sets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from caa_lens.arguments import describe
from caa_lens.contrast.files import bundled_names
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.measures.elsewhere.changes import STEERED, Measure
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.vectors.checks import check_width
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

BUNDLED = "bundled"
OTHERS = "other behaviors"
N_TEST = 20  # pairs of a bundled set that are tested on; the vector is of the others


def other_vectors(
    model: Any, others: Mapping[str, SteeringVector | SteeringVectors] | None, layer: int
) -> dict[str, SteeringVector]:
    """The other behaviors' vectors at a layer, by name.

    Raises:
        TypeError: for anything but vectors by name.
        ValueError: for a vector of another layer or width, or a set without that layer.
    """
    if others is None:
        return {}
    if not isinstance(others, Mapping):
        raise TypeError(f"others must be vectors by name, {{'refusal': vectors}}, or 'bundled'; got {describe(others)}")
    found = {}
    for name, one in others.items():
        if not isinstance(one, SteeringVector | SteeringVectors):
            raise TypeError(f"others[{name!r}] must be SteeringVectors or a SteeringVector, got {describe(one)}")
        if isinstance(one, SteeringVectors) and layer in one:
            one = one[layer]
        if not isinstance(one, SteeringVector) or one.layer != layer:
            has = f"layer {one.layer}" if isinstance(one, SteeringVector) else f"layers {list(one.layers)}"
            raise ValueError(
                f"others[{name!r}] has {has}, and the vector is of layer {layer}: extract the other behavior's vector "
                "at that layer, since directions of two layers cannot be compared"
            )
        check_width(model, one)
        if not one.norm:
            raise ValueError(f"others[{name!r}] is 0 at layer {layer}, so that it has no direction to compare with")
        found[name] = one
    return found


def bundled_others(
    model: Any, vector: SteeringVector, prompt_format: PromptFormat, *, system: str | None, seed: int, progress: bool
) -> tuple[dict[str, SteeringVector], dict[str, ContrastSet]]:
    """Vectors and test sets of the bundled behaviors but the vector's own, extracted from the other pairs of each."""
    vectors, tests = {}, {}
    for name in bundled_names():
        if name == vector.provenance.behavior:
            continue
        train, tests[name] = ContrastSet.load(name).split(test=N_TEST, seed=seed)
        options: dict[str, Any] = {"prompt_format": prompt_format, "system": system, "progress": progress}
        vectors[name] = extract(model, train, layers=[vector.layer], **options)[vector.layer]
    return vectors, tests


def as_tests(tests: Mapping[str, ContrastSet] | None) -> dict[str, ContrastSet]:
    """Test sets by name. Raises `TypeError` for anything else."""
    if tests is None:
        return {}
    if not isinstance(tests, Mapping):
        raise TypeError(f"other_tests must be contrast sets by name, {{'refusal': test}}, got {describe(tests)}")
    for one in tests.values():
        check_contrast_set(one)
    return dict(tests)


def of_cosines(
    vector: SteeringVector, multiplier: float, randoms: Sequence[SteeringVector], others: Mapping[str, SteeringVector]
) -> list[Measure]:
    """The cosine of what is added with each other vector. It is of two vectors, not of questions: no interval."""
    sign = float(np.sign(multiplier))
    found = []
    for name, other in others.items():
        values = [sign * _cosine(one, other) for one in (vector, *randoms)]
        found.append(
            Measure(group=OTHERS, of=name, measure="cosine", unit="", n_questions=0, value=_from_steered(values))
        )
    return found


def _from_steered(values: Sequence[float]) -> Any:
    def value(condition: int, some: Int[np.ndarray, " question"]) -> float:
        return values[condition - STEERED] if condition >= STEERED else 0.0

    return value


def _cosine(one: SteeringVector, other: SteeringVector) -> float:
    first, second = (_wide(each) for each in (one, other))
    return float(first @ second / (first.norm() * second.norm()))


def _wide(vector: SteeringVector) -> Float[torch.Tensor, " d_model"]:
    return vector.direction.detach().cpu().double()
