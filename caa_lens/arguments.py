"""What public functions check before anything runs: that each argument is the kind of thing it is taken for.

Python is told the types by annotations and does not look at them; without these checks a contrast set's name in the
place of the set, or one layer in the place of a list, would fail somewhere inside, in words about something else.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from caa_lens.contrast import ContrastSet
from caa_lens.model_check import check_model as check_model
from caa_lens.number_checks import as_float as as_float
from caa_lens.number_checks import as_multiplier as as_multiplier
from caa_lens.number_checks import as_seed as as_seed
from caa_lens.number_checks import check_count as check_count
from caa_lens.number_checks import check_list as check_list
from caa_lens.number_checks import describe as describe
from caa_lens.prompts import Prompt, PromptFormat
from caa_lens.provenance import PAIR_HASHES
from caa_lens.vectors import SteeringVector, SteeringVectors


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


def count_training_pairs(test: ContrastSet, *vectors: SteeringVectors) -> int:
    """How many pairs of a test set any of the vectors were extracted from; of vectors that list none, all or none."""
    trained: set[str] = set()
    for one in vectors:
        if listed := one.provenance.details.get(PAIR_HASHES):
            trained |= set(listed.split())
        elif test.content_hash == one.provenance.dataset_hash:
            return len(test)
    return sum(pair in trained for pair in test.pair_hashes)


def warn_of_training_pairs(test: ContrastSet, *vectors: SteeringVectors, name: str = "") -> None:
    """Warns where pairs of the test set are among those that any of the vectors were extracted from.

    Args:
        name: which test set, where there are several.
    """
    if n_pairs := count_training_pairs(test, *vectors):
        warnings.warn(
            f"{n_pairs} of the {len(test)} pairs scored{f' in {name!r}' if name else ''} are among those that the "
            "vectors were extracted from, which flatters them: extract from train and score test of train, test = "
            "pairs.split(test=0.2)",
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
        if system is not None and not isinstance(system, str):
            raise TypeError(f"expected a system prompt in words, got {describe(system)}")
        if system or prompt_format is not None:
            what = "a system prompt" if system else "a prompt format"
            raise ValueError(f"got {what} for a Prompt, which is taken as it is: give a question, or leave it out")
        check_prompt(model, prompt)
        return prompt
    if not isinstance(prompt, str):
        raise TypeError(
            f"expected a question in words, or a Prompt as Prompt.of makes it, got {describe(prompt)}; several stand "
            "in a list"
        )
    return Prompt.of(model, prompt, prompt_format=prompt_format, system=system)


def check_prompt(model: Any, prompt: object) -> None:
    """Refuses what is no `Prompt`, and one made by hand that the model cannot run.

    Raises:
        TypeError: for anything but a `Prompt`.
        ValueError: for no tokens, a token that the model does not have, or a position outside of the prompt.
    """
    if not isinstance(prompt, Prompt):
        raise TypeError(
            f"expected Prompts, got {describe(prompt)} among them: Prompt.of(model, question) makes one of words, "
            "Prompt.from_tokens(ids) one of token ids"
        )
    n_pos, (first, last) = len(prompt), prompt.read
    if not n_pos:
        raise ValueError("the prompt has no tokens: expected at least one")
    if not (0 <= prompt.steer_start <= n_pos and 0 <= prompt.answer_start <= n_pos and 0 <= first < last <= n_pos):
        raise ValueError(
            f"the prompt has {n_pos} tokens, but steer_start={prompt.steer_start}, answer_start={prompt.answer_start} "
            f"and read={prompt.read}: positions count from 0, and read is a span such as ({n_pos - 1}, {n_pos})"
        )
    lowest, highest = min(prompt.tokens), max(prompt.tokens)
    if lowest < 0 or highest >= model.cfg.d_vocab:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"the prompt has token id {wrong}, but {model.cfg.model_name} has ids 0 to {model.cfg.d_vocab - 1}: make "
            "it with this model's tokenizer"
        )


def check_width(model: Any, vectors: SteeringVector | SteeringVectors) -> None:
    """Raises `ValueError` if vectors are of another width than the model's residual stream."""
    if vectors.d_model != model.cfg.d_model:
        what, them = ("vector has", "it") if isinstance(vectors, SteeringVector) else ("vectors have", "them")
        raise ValueError(
            f"{what} d_model={vectors.d_model}, but {model.cfg.model_name!r} has d_model={model.cfg.d_model}: "
            f"extract {them} from this model"
        )


def check_vector(model: Any, vector: SteeringVector) -> None:
    """Raises `ValueError` for a vector that cannot be added in this model: its layer, its width, its hook points."""
    check_layers(model, [vector.layer])
    check_width(model, vector)
    check_hook_points(model, vector.layer)


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
