"""What Inspect finds by its entry point: the models `caa-lens/NAME`, and the task `caa_lens/easy_questions`.

Inspect imports this module whenever it starts, so the model's own module, and torch with it, comes on first use.
"""

from typing import Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ModelAPI, modelapi
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, choice, scorer, stderr
from inspect_ai.solver import TaskState, generate, multiple_choice

from caa_lens.evaluation.questions import load_easy_questions, named_first


@modelapi(name="caa-lens")
def caa_lens() -> type[ModelAPI]:
    """A model of TransformerLens, steered by a file of vectors or not."""
    from caa_lens.evaluation.inspect_provider import CaaLensAPI

    return CaaLensAPI


@task
def easy_questions(form: Literal["words", "letters"] = "words", max_tokens: int = 24) -> Task:
    """Twenty easy questions with four choices.

    Args:
        form: "words": the choices stand in the question, and the one that the answer names first counts. "letters":
            Inspect's own multiple choice, which wants `ANSWER: B`.
        max_tokens: of an answer.
    """
    if form not in ("words", "letters"):
        raise ValueError(f"got form={form!r}, expected 'words' or 'letters'")
    samples = [
        Sample(
            id=number,
            input=one.in_words if form == "words" else one.question,
            choices=list(one.choices),
            target=one.right if form == "words" else one.answer,
        )
        for number, one in enumerate(load_easy_questions(), 1)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="easy_questions"),
        solver=generate() if form == "words" else multiple_choice(),
        scorer=first_named() if form == "words" else choice(),
        config=GenerateConfig(max_tokens=max_tokens),
    )


@scorer(metrics=[accuracy(), stderr()])
def first_named() -> Scorer:
    """Right where the first choice that an answer names is the target."""

    async def score(state: TaskState, target: Target) -> Score:
        named = named_first(state.output.completion, [one.value for one in state.choices])
        return Score(
            value=CORRECT if named == target.text else INCORRECT, answer=named, explanation=state.output.completion
        )

    return score
