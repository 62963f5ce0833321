"""Questions with right answers: does the model still know them?

The bundled ones are easy enough for a small model, and scored by the margin of two completed sentences that differ in a
word. They come in twos: the word that is right in one question is the wrong one in the next, so that steering which
merely favours some words, long ones or rare ones, changes nothing on the whole.

MMLU and TruthfulQA, as the paper's authors publish them with two options a question, are asked as well where they have
been fetched (`caa-lens data fetch mmlu truthfulqa`). Small models answer those at chance, where nothing can be lost.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from caa_lens.contrast import files as contrast_files
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.measures.answers import score_answers
from caa_lens.measures.elsewhere.changes import Measure, mean_of
from caa_lens.measures.placed_conditions import Condition
from caa_lens.paper.questions import data_folder, load_paper_questions
from caa_lens.paper.sources import QUESTIONS

CAPABILITY = "capability"
EVEN = {"p_matching": 0.5, "margin": 0.0}  # the score above which the right answer is preferred
UNIT = {"p_matching": "probability", "margin": "nats a token"}


def easy_questions() -> ContrastSet:
    """The bundled questions; the right answer is the positive one."""
    file = files("caa_lens.measures") / "data" / "easy_questions.jsonl"
    pairs = tuple(contrast_files.read_pairs(file, ContrastPair))
    return ContrastSet(name="easy questions", pairs=pairs, source="bundled:easy_questions")


def capability_sets(folder: str | Path | None = None) -> dict[str, ContrastSet]:
    """The bundled questions, and those of the paper's sets that are at hand, by name."""
    found = {"easy questions": easy_questions()}
    where = data_folder() if folder is None else Path(folder)
    for name in QUESTIONS:
        if (where / name / "questions.jsonl").is_file():
            found[name] = load_paper_questions(name, where)[0]
    return found


def as_capability(given: Mapping[str, ContrastSet] | ContrastSet | None) -> dict[str, ContrastSet]:
    """Sets by name: those at hand for None, one by its own name.

    Raises:
        TypeError: for anything else.
    """
    if given is None:
        return capability_sets()
    if isinstance(given, Mapping):
        for one in given.values():
            check_contrast_set(one)
        return dict(given)
    check_contrast_set(given)
    return {given.name: given}


def of_scores(
    model: Any,
    sets: Mapping[str, ContrastSet],
    conditions: Sequence[Condition],
    *,
    group: str,
    accuracy: bool,
    **options: Any,
) -> list[Measure]:
    """Each set's mean score under all conditions, and the share of questions whose right answer is preferred.

    Args:
        accuracy: whether there is a right answer.
        options: more of `score_answers`.
    """
    found = []
    for name, pairs in sets.items():
        scores = score_answers(model, pairs, conditions, **options)
        values = scores.values.T.double().numpy()  # [condition question]
        about: dict[str, Any] = {"group": group, "of": name, "n_questions": len(pairs)}
        if accuracy:
            right = (values > EVEN[scores.metric]).astype(float)
            found.append(Measure(**about, measure="accuracy", unit="share", value=mean_of(right), share=True))
        found.append(Measure(**about, measure=scores.metric, unit=UNIT[scores.metric], value=mean_of(values)))
    return found


def at_chance(n_right: float, n: int) -> bool:
    """Whether an accuracy is not told from guessing between two answers, by Wilson's 95 % interval."""
    from scipy.stats import binomtest

    ends = binomtest(int(np.rint(n_right)), n).proportion_ci(method="wilson")
    return bool(ends.low <= 0.5)
