"""Checks of notebook 2, steering."""

import warnings
from typing import Any

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.interpretation.pair_geometry import vector_norms
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.lessons import verdicts
from caa_lens.lessons.verdicts import Mistake, Verdict, exercise, judged, within
from caa_lens.measures.answers import Condition, score_answers
from caa_lens.prompts.prompt_formats import resolve_format
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.steering_vectors import SteeringVectors

CLOSE = 1e-3  # nats per token


@exercise(verdicts.a_number)
def quarter(answer: float, model: Any, pairs: ContrastSet, vectors: SteeringVectors, layer: int) -> Verdict:
    """Part 1: the multiplier whose push is a quarter of the stream's norm."""
    layers = [each for each in (layer - 1, layer, layer + 1) if each in vectors.layers]
    size = vector_norms(vectors, pair_activations(model, pairs, layers=layers, progress=False))
    right = size.multiplier_for(layer, share=0.25)
    mistakes: list[Mistake] = [
        (-right, "that is the one direction: give the positive multiplier"),
        (0.25, "this is a quarter of the vector: what is a quarter of the stream?"),
        (1 / right, "the ratio is upside down: a short vector needs a large multiplier"),
        (4 * right, "this makes a push as long as the stream: take a quarter of it"),
        (2 * right, "this is half of the stream"),
    ]
    for other in layers:
        if other != layer:
            mistakes.append((size.multiplier_for(other, share=0.25), "this is of a layer beside it"))
    hint = "another multiplier: which push is as long as 0.25 times `residual`, at LAYER?"
    return judged(answer, right, near=within(0.01 * right), mistakes=mistakes, otherwise=hint)


@exercise(verdicts.numbers(3))
def two_layers(
    answer: list[float], model: Any, pairs: ContrastSet, vectors: SteeringVectors, one: int, other: int
) -> Verdict:
    """Part 2: the margins of one layer's vector, of the other's, and of both at half the multiplier."""

    def push(layer: int, multiplier: float) -> Intervention:
        return Intervention(vector=vectors[layer], multiplier=multiplier)

    conditions: list[Condition] = [(push(one, 1.0),), (push(other, 1.0),), (push(one, 0.5), push(other, 0.5))]
    conditions += [(push(one, 1.0), push(other, 1.0)), ()]
    margins = score_answers(model, pairs, conditions, progress=False).values.mean(0).tolist()
    first, second, right_both, whole_both, plain = margins
    right = [first, second, right_both]
    mistakes: list[Mistake] = [
        ([first, second, whole_both], "the third has both vectors in full: each is to have half the multiplier"),
        ([second, first, right_both], "the first two are in the wrong order"),
        ([first, second, (first + second) / 2], "the third is the mean of the two: measure it, with both at once"),
        ([each - plain for each in right], "these are changes of the margin: give the margins themselves"),
    ]
    hint = "other margins: is it the mean over the test pairs, at multiplier 1 and 1/2?"
    return judged(answer, right, near=within(2 * CLOSE), mistakes=mistakes, otherwise=hint)


@exercise(verdicts.a_number)
def whole_prompt(answer: float, model: Any, pairs: ContrastSet, vectors: SteeringVectors, layer: int) -> Verdict:
    """Part 3: the margin at +1 when every token is steered, from the prompt's first on."""
    where = ("all", "caa", "after_first", "prompt")
    conditions: list[Condition] = [(Intervention(vector=vectors[layer], positions=name),) for name in where]
    conditions += [(Intervention(vector=vectors[layer], multiplier=-1.0, positions="all"),), ()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SharedPrefixWarning)
        margins = score_answers(model, pairs, conditions, progress=False).values.mean(0).tolist()
    right, from_the_end, but_the_first, only_prompt, down, plain = margins
    mistakes: list[Mistake] = [
        (from_the_end, "this is steered from the end of the instruction on, as by default"),
        (plain, "this is the unsteered margin"),
        (down, "this is the margin at -1"),
        (only_prompt, "here the answer's tokens are left alone: steer them, too"),
        (but_the_first, "the first token is left out: steer it, too"),
    ]
    hint = "another margin: is it the mean over the test pairs, at multiplier 1 and LAYER?"
    return judged(answer, right, near=within(CLOSE), mistakes=mistakes, otherwise=hint)


@exercise(verdicts.numbers(3))
def hooks_around(answer: list[float], model: Any, question: str, vectors: SteeringVectors, layer: int) -> Verdict:
    """Part 4: how far the stream lies along the vector below, at and above the steered layer, seen from outside."""
    prompt = resolve_format(model, None).encode(model.tokenizer, question)
    layers = [layer - 1, layer, layer + 1]

    def along() -> dict[int, float]:
        dots = token_similarity(model, prompt, vectors, layers=layers).summary("dot").iloc[-1]
        return {each: float(dots[each]) / vectors[each].norm ** 2 for each in layers}

    plain = along()
    with steer(model, vectors[layer], prompt=prompt):
        steered = along()
    below, at, above = layers
    right = [plain[below], plain[at], steered[above]]
    mistakes: list[Mistake] = [
        ([steered[each] for each in layers], "your hooks came after the steering: open them around it"),
        ([plain[each] for each in layers], "nothing is steered here: does the model run inside both blocks?"),
        (right[::-1], "the layers are in the wrong order: from the lowest to the highest"),
        (
            [each * vectors[of].norm for each, of in zip(right, layers, strict=True)],
            "the unit is another one: divide by the vector's norm once more",
        ),
    ]
    hint = "other numbers: at the prompt's last token, in units of each layer's own vector?"
    return judged(answer, right, near=within(0.02), mistakes=mistakes, otherwise=hint)
