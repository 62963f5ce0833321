"""What public functions check before anything runs: that each argument is the kind of thing it is taken for.

Python is told the types by annotations and does not look at them; without these checks a contrast set's name in the
place of the set, or one layer in the place of a list, would fail somewhere inside, in words about something else.
"""

import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from caa_lens.contrast import ContrastSet
from caa_lens.prompts import Prompt, PromptFormat
from caa_lens.provenance import PAIR_HASHES
from caa_lens.vectors import SteeringVector, SteeringVectors


def check_model(model: Any) -> None:
    """Raises `TypeError` for anything but a TransformerLens model, `ValueError` for one whose dtypes disagree."""
    if not (hasattr(model, "cfg") and hasattr(model, "hooks")):
        raise TypeError(
            f"expected a model from caa_lens.load_model, got {describe(model)}: the model is the first argument, and "
            "a model of transformers is loaded from its folder or hub id"
        )
    if model.W_E.dtype != model.cfg.dtype:
        has, says = (str(dtype).removeprefix("torch.") for dtype in (model.W_E.dtype, model.cfg.dtype))
        raise ValueError(
            f"the model's weights are {has}, but its cfg.dtype says {says}: load it with dtype={has!r}, or convert it "
            f"with model.to(torch.{has}), which changes both"
        )


def check_contrast_set(pairs: object) -> None:
    """Raises `TypeError` for anything but a `ContrastSet`, `ValueError` for one that was emptied."""
    if isinstance(pairs, ContrastSet):
        if not pairs.pairs:
            raise ValueError("the contrast set is empty: expected at least one pair")
        return
    remedy = "make one with ContrastSet.from_pairs(...) or .load(...)"
    if isinstance(pairs, str):
        remedy = f"make one with ContrastSet.load({pairs!r})"
    elif isinstance(pairs, SteeringVectors):
        remedy = "the pairs come before the vectors"
    elif isinstance(pairs, tuple) and all(isinstance(one, ContrastSet) for one in pairs):
        remedy = "a split gives two, as in train, test = pairs.split(test=0.2)"
    raise TypeError(f"expected a ContrastSet, got {describe(pairs)}: {remedy}")


class TrainingPairsWarning(UserWarning):
    """Vectors are scored on pairs that they were extracted from, which flatters them."""


def count_training_pairs(test: ContrastSet, vectors: SteeringVectors) -> int:
    """How many pairs of a test set vectors were extracted from; of vectors that do not list theirs, all or none."""
    provenance = vectors.provenance
    if listed := provenance.details.get(PAIR_HASHES):
        trained = set(listed.split())
        return sum(pair in trained for pair in test.pair_hashes)
    return len(test) if test.content_hash == provenance.dataset_hash else 0


def warn_of_training_pairs(test: ContrastSet, vectors: SteeringVectors) -> None:
    """Warns where pairs of the test set are among those that the vectors were extracted from."""
    if n_pairs := count_training_pairs(test, vectors):
        warnings.warn(
            f"{n_pairs} of the {len(test)} pairs scored are among those that the vectors were extracted from, which "
            "flatters them: extract from train and score test of train, test = pairs.split(test=0.2)",
            TrainingPairsWarning,
            stacklevel=3,
        )


def check_vector_set(vectors: object) -> None:
    """Raises `TypeError` for anything but `SteeringVectors`."""
    if isinstance(vectors, SteeringVectors):
        return
    if isinstance(vectors, SteeringVector):
        raise TypeError(
            "expected SteeringVectors, got one SteeringVector: give the set, with the layer as layers=[...] or "
            f"vectors.at([{vectors.layer}]), or make a set with SteeringVectors.from_vectors([...])"
        )
    remedy = "extract them, or SteeringVectors.load(a file)"
    if isinstance(vectors, list | tuple) and any(isinstance(one, SteeringVector) for one in vectors):
        remedy = "make a set of them with SteeringVectors.from_vectors([...])"
    raise TypeError(f"expected SteeringVectors, got {describe(vectors)}: {remedy}")


def as_vector_set(vectors: object) -> SteeringVectors:
    """A set, also of one vector or of a list of them. Raises `TypeError` for anything else."""
    if isinstance(vectors, SteeringVector):
        return SteeringVectors.from_vectors([vectors])
    if isinstance(vectors, list | tuple) and vectors and all(isinstance(one, SteeringVector) for one in vectors):
        return SteeringVectors.from_vectors(vectors)
    check_vector_set(vectors)
    assert isinstance(vectors, SteeringVectors)
    return vectors


def as_prompt(
    model: Any, prompt: object, *, prompt_format: PromptFormat | str | None = None, system: str | None = None
) -> Prompt:
    """A prompt, also of a question in words. Raises `TypeError` for anything else."""
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        raise TypeError(
            f"expected a question in words, or a Prompt as Prompt.of makes it, got {describe(prompt)}; several stand "
            "in a list"
        )
    return Prompt.of(model, prompt, prompt_format=prompt_format, system=system)


def check_width(model: Any, vectors: SteeringVector | SteeringVectors) -> None:
    """Raises `ValueError` if vectors are of another width than the model's residual stream."""
    if vectors.d_model != model.cfg.d_model:
        what, them = ("vector has", "it") if isinstance(vectors, SteeringVector) else ("vectors have", "them")
        raise ValueError(
            f"{what} d_model={vectors.d_model}, but {model.cfg.model_name!r} has d_model={model.cfg.d_model}: "
            f"extract {them} from this model"
        )


def check_hook_points(model: Any, layer: int) -> None:
    """Raises `ValueError` where TransformerLens' hooks do not reach the two hook points that a layer's vector needs.

    Another module may stand in a hook point's place, as sparse autoencoders are attached; and where nobody called
    `model.setup()` afterwards, hooks would still be added to the point that was taken out, and change nothing.
    """
    for place in ("attn.hook_pattern", "hook_resid_post"):
        name, found = f"blocks.{layer}.{place}", model.blocks[layer]
        for part in place.split("."):
            found = getattr(found, part, None)
        if found is not None and found is model.hook_dict.get(name):
            continue
        if any(base.__name__ == "HookPoint" for base in type(found).__mro__):
            raise ValueError(
                f"the model does not know its hook point {name}, so that hooks would change nothing at layer {layer}: "
                "call model.setup() after putting a module in a hook point's place or taking it away"
            )
        what = f"{name} is missing" if found is None else f"{type(found).__name__} stands in the place of {name}"
        raise ValueError(
            f"{what}, so that nothing can be steered at layer {layer}: steer at another layer, or take the module away "
            "that was put there (of SAELens: model.reset_saes())"
        )


def check_layers(model: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers as distinct block ids in order; all of the model's by default.

    Raises:
        TypeError: for one number, or a list of anything but whole numbers.
        ValueError: for a layer that the model does not have, negative ones included, or an empty list.
    """
    n_layers = model.cfg.n_layers
    if layers is None:
        return tuple(range(n_layers))
    layers = check_list("layers", layers, int)
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"layer {layer} is out of range: {model.cfg.model_name} has layers 0 to {n_layers - 1}"
                + (f"; the last is {n_layers - 1}, not -1" if layer < 0 else "")
            )
    if not layers:
        raise ValueError("no layers given: expected at least one")
    return tuple(sorted(set(layers)))


def check_count(name: str, value: object) -> None:
    """Raises `TypeError` for anything but a whole number, `ValueError` for one below 1."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {describe(value)}")
    if operator.index(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_list(name: str, values: object, kind: type[int] | type[float]) -> list:
    """A list of numbers, as plain numbers of Python.

    Raises:
        TypeError: for one number, a text, or a list with anything but numbers (with `int`: whole numbers) in it.
    """
    wanted = "whole numbers" if kind is int else "numbers"
    if isinstance(values, int | float):
        raise TypeError(f"{name} must be a list of {wanted}, got {values!r}: write {name}=[{values!r}]")
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of {wanted}, got {describe(values)}: write e.g. {name}=[1, 2]")
    found = []
    for value in values:
        try:
            number = None if isinstance(value, str) else kind(value)
        except (TypeError, ValueError):
            number = None
        if number is None or (kind is int and number != value):
            raise TypeError(f"{name} must be {wanted}, got {describe(value)} among them")
        found.append(number)
    return found


def describe(value: object) -> str:
    """A value as an error message shows it: its type, and itself where that is short; never a tensor's numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, tuple | list):
        return f"a {kind} of {', '.join(type(one).__name__ for one in value[:4])}{', ...' if value[4:] else ''}"
    shown = repr(value)
    return f"the {kind} {shown}" if len(shown) <= 60 and isinstance(value, str | int | float) else kind
