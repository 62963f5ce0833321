"""Checks of notebook 3, what the vector says."""

from collections.abc import Sequence
from typing import Any

from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation.lens import logit_lens, word_ranks
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.lessons import verdicts
from caa_lens.lessons.verdicts import RIGHT, Mistake, Verdict, bare, exercise, judged, within, wrong
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

ENOUGH = 0.75  # share of tokens that have to agree: another sample of pairs gives about the same ones
MULTIPLIERS = (1, 8)


@exercise(verdicts.some_words)
def promoted(answer: list[str], model: Any, pairs: ContrastSet, vectors: SteeringVectors, k: int = 8) -> Verdict:
    """Part 1: the tokens that the vector of other pairs promotes most at the last layer."""
    last = model.cfg.n_layers - 1
    if len(answer) != k:
        return wrong(f"expected {k} tokens")

    def tokens(of: SteeringVectors, layer: int, side: str = "promoted", reading: str = "normed") -> list[str]:
        lens = logit_lens(model, of, layers=[layer], k=k, reading=reading, progress=False)
        return [bare(token) for token in lens.tokens()[side].iloc[0]]

    def near(one: list[str], other: list[str]) -> bool:
        return sum(token in other for token in one) >= ENOUGH * k

    others = extract(model, pairs, progress=False)
    return judged(
        answer,
        tokens(others, last),
        near=near,
        mistakes=[
            (lambda: tokens(others, last, "suppressed"), "these are the suppressed ones"),
            (lambda: tokens(vectors, last), "these are the sentiment vector's: extract from the other set of pairs"),
            (lambda: tokens(others, last - 4), "these are of a lower layer: which is the last one?"),
            (lambda: tokens(others, last - 1), "these are of the layer below: blocks are counted from 0"),
        ],
        otherwise="other tokens: is it the last layer, and the vector of these pairs?",
    )


@exercise(verdicts.numbers(2))
def linearity(
    answer: list[float], model: Any, vectors: SteeringVectors, layer: int, questions: Sequence[str]
) -> Verdict:
    """Part 2: how linear the model's answer is at multipliers 1 and 8."""
    frames = {
        multiplier: logit_lens(
            model,
            vectors,
            layers=[layer],
            reading="effect",
            prompts=questions,
            multiplier=multiplier,
            controls=0,
            progress=False,
        ).frame.iloc[0]
        for multiplier in MULTIPLIERS
    }
    right = [float(frames[multiplier]["linearity"]) for multiplier in MULTIPLIERS]
    sizes = [float(frames[multiplier]["size_ratio"]) for multiplier in MULTIPLIERS]
    mistakes: list[Mistake] = [
        (right[::-1], "the two are in the wrong order: first 1, then 8"),
        (sizes, "this is another column of the frame: how much larger the answer is, not how alike it is"),
        ([right[0]] * 2, "both are of multiplier 1: was `multiplier` given the second time?"),
        ([right[1]] * 2, "both are of multiplier 8"),
    ]
    hint = "other numbers: is it the vector of LAYER, at the same questions?"
    return judged(answer, right, near=within(0.02), mistakes=mistakes, otherwise=hint)


@exercise(verdicts.a_word_and_a_layer)
def steered_down(answer: tuple[str, int], model: Any, prompt: Prompt, v: SteeringVector) -> Verdict:
    """Part 3: the word that comes out at multiplier -2, and the layer from which on it is the first choice."""
    lenses = {sign: residual_lens(model, prompt, vectors=[(v, sign * 2.0)]) for sign in (-1, 1)}
    words = {sign: _answer_of(lens.frame, "steered") for sign, lens in lenses.items()}
    right = lenses[-1].settles_at()
    word, layer = answer
    if word != words[-1]:
        if word == words[1]:
            return wrong("this word comes out at +2: the multiplier is to be negative")
        if word == _answer_of(lenses[-1].frame, "unsteered"):
            return wrong("this is the unsteered word")
        return wrong("another word: is it the next one after the whole prompt, with the vector of LAYER?")
    if layer == right:
        return RIGHT
    if layer == v.layer:
        return wrong("the word is right; this layer is where the vector is added: where is it turned into the word?")
    if right is not None and layer in (right - 1, right + 1):
        return wrong("the word is right; the layer is one off: blocks are counted from 0")
    return wrong("the word is right; the layer is not: look at the steered run, at the last position")


@exercise(verdicts.a_number)
def kind(answer: float, model: Any, text: str, vectors: SteeringVectors, layer: int, before: str) -> Verdict:
    """Part 4: the cosine at *kind* in the text that was turned round.

    Args:
        before: the text before it was turned.
    """

    def at_kind(text: str, layer: int, measure: str = "cosine") -> float:
        found = token_similarity(model, text, vectors, layers=[layer], raw_text=True)
        position = [bare(piece) for piece in found.pieces].index("kind")
        return float(found.summary(measure)[layer].iloc[position])

    if "kind" not in text:
        return wrong("the word is not in your text")
    right = at_kind(text, layer)
    mistakes: list[Mistake] = [
        (-right, "the sign is turned"),
        (lambda: at_kind(before, layer), "this is from the sentence as it was: compare the turned one"),
        (lambda: at_kind(text, layer, "dot"), "this is the dot product: the cosine is divided by both norms"),
    ]
    for other in (layer - 1, layer + 1):
        if other in vectors.layers:
            mistakes.append((lambda of=other: at_kind(text, of), "this is of a layer beside it"))
    hint = "another number: is it at the token *kind*, at LAYER, with raw_text=True?"
    return judged(answer, right, near=within(max(0.0015, 0.01 * abs(right))), mistakes=mistakes, otherwise=hint)


@exercise(verdicts.numbers())
def direct_part(
    answer: list[float], model: Any, vectors: SteeringVectors, layers: Sequence[int], measured: Sequence[float]
) -> Verdict:
    """Part 5: the lens' margin of *wonderful* over *terrible*, one a layer.

    Args:
        measured: the direct parts, which it is to be compared with.
    """
    if len(answer) != len(layers):
        return wrong("expected one number a layer of `by_layer`")

    def margins(reading: str) -> list[float]:
        found = word_ranks(
            model, vectors, ["wonderful", "terrible"], layers=list(layers), reading=reading, progress=False
        )
        return [float(each) for each in found.margin(positive=["wonderful"], negative=["terrible"])["margin"]]

    right = margins("direct")
    mistakes: list[Mistake] = [
        ([-each for each in right], "the sign is turned: *wonderful* minus *terrible*"),
        (right[::-1], "the layers are in the wrong order: from the lowest to the highest"),
        (lambda: margins("normed"), "this is the reading `normed`: which one sends the bare vector through?"),
        (list(measured), "these are the measured parts themselves: what does the lens say?"),
    ]
    hint = "other numbers: is it `margin` of these two words, at these layers?"
    near = within(0.02 * sum(each**2 for each in right) ** 0.5)
    return judged(answer, right, near=near, mistakes=mistakes, otherwise=hint)


def _answer_of(frame: Any, run: str) -> str:
    last = frame[frame["position"] == frame["position"].max()]
    return bare(str(last[f"{run}_answer"].iloc[0]))
