"""What steering costs elsewhere: one table of side effects, each beside random directions of the same norm.

    found = side_effects(model, vectors[14], 1.5)
    found                     # what changed, by how much, and whether a random direction does as much
    found.texts               # the answers behind it
    found.plot()

`neutral` has the questions of the first and third group, `capability`, `refusals` and `other_behaviors` the others;
`changes` says what the intervals are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from tqdm.auto import tqdm

from caa_lens.arguments import as_multiplier, as_seed, check_count, describe
from caa_lens.contrast.messages import Asked
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.overflow import check_steps
from caa_lens.measures.answers import Condition
from caa_lens.measures.divergence import token_kl
from caa_lens.measures.elsewhere.answer_texts import answered_under, of_answers, words_of
from caa_lens.measures.elsewhere.capability import CAPABILITY, as_capability, at_chance, of_scores
from caa_lens.measures.elsewhere.changes import COLUMNS, LEAST, Measure, change_of, mean_of
from caa_lens.measures.elsewhere.neutral import REPORTING
from caa_lens.measures.elsewhere.neutral_text import distinct_questions
from caa_lens.measures.elsewhere.other_behaviors import (
    BUNDLED,
    OTHERS,
    as_tests,
    bundled_others,
    of_cosines,
    other_vectors,
)
from caa_lens.measures.elsewhere.refusals import HARMLESS, refuses
from caa_lens.measures.training_pairs import warn_of_training_pairs
from caa_lens.models.checks import check_model
from caa_lens.models.placement import dtype_name
from caa_lens.plots.unwanted import changes_forest
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.provenance import last_part
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.checks import check_vector
from caa_lens.vectors.steering_vectors import SteeringVector

DIVERGENCE, REFUSALS = "divergence", "refusals"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBeside:
    """A greedy answer without steering, and with it.

    Attributes:
        group: "neutral" or "harmless", the kind of question.
    """

    group: str
    question: str
    unsteered: str
    steered: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideEffects(Result):
    """What steering changes where it should change nothing.

    Attributes:
        frame: one row a measure: `group, of, measure, unit, unsteered, steered, change, low, high, interval, random,
            random_low, random_high, n`. `change` is steered - unsteered, of divergences and cosines the number itself;
            `low, high` its 95 % interval over the `n` questions, paired, and `interval` how it is made: "bootstrap",
            "score" (of shares) or "" for none. `random` is the mean change under random directions of the same norm,
            `random_low` and `random_high` are the smallest and the largest.
        settings: what else the numbers depend on.
        provenance: of the `vector`.
        answers: the answers that texts and refusals are measured on, in the order of the questions.
        multiplier: times the vector.
        n_random: how many random directions there are.
    """

    answers: tuple[AnswerBeside, ...]
    multiplier: float
    n_random: int

    def summary(self) -> pd.DataFrame:
        """The frame by group, set and measure, with what it says in words (`reading`)."""
        table = self.frame.assign(reading=[_reading(row) for row in self.frame.to_dict("records")])
        return table.drop(columns="interval").set_index(["group", "of", "measure"])

    @property
    def texts(self) -> pd.DataFrame:
        """The answers: `group, question, unsteered, steered`, and whether each of the two refuses by its words."""
        table = pd.DataFrame([(a.group, a.question, a.unsteered, a.steered) for a in self.answers])
        table.columns = ["group", "question", "unsteered", "steered"]
        for side in ("unsteered", "steered"):
            table[f"{side}_refuses"] = [refuses(text) for text in table[side]]
        return table

    @property
    def notes(self) -> list[str]:
        """What keeps single numbers from saying much, in sentences."""
        return [note for row in self.frame.to_dict("records") if (note := _note(row, self.settings))]

    def plot(self) -> go.Figure:
        """Each change with its interval, over the range of the random directions; each row has its own scale."""
        model = last_part(self.provenance["vector"].model)
        return changes_forest(self.frame, of=self._of, n_random=self.n_random, model=model)

    @property
    def _of(self) -> str:
        about = self.provenance["vector"]
        return f"{self.multiplier:g} × {about.expression or about.behavior}"

    def __repr__(self) -> str:
        shown = ["unsteered", "steered", "change", "low", "high", "random", "random_low", "random_high", "n", "reading"]
        directions = f"{self.n_random} random direction{'s' if self.n_random > 1 else ''}"
        lines = [
            f"SideEffects({self._of} of {self.provenance['vector'].model}, beside {directions} of the same norm)",
            self.summary()[shown].round(4).to_string(),
            *self.notes,
        ]
        return "\n".join(lines)


def side_effects(
    model: Any,
    vector: SteeringVector,
    multiplier: float | int = 1.0,
    *,
    neutral: Sequence[Asked] = REPORTING,
    capability: Mapping[str, ContrastSet] | ContrastSet | None = None,
    requests: Sequence[Asked] = HARMLESS,
    others: Mapping[str, Any] | str | None = None,
    other_tests: Mapping[str, ContrastSet] | None = None,
    positions: str = "caa",
    n_tokens: int = 32,
    n_random: int = 3,
    n_resamples: int = 2000,
    seed: int | None = 0,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 48,
    max_tokens: int | None = None,
    progress: bool = True,
) -> SideEffects:
    """What adding a vector does to things that are none of its business, with intervals and beside random directions.

    ===================  ==========================================================================================
    divergence           KL by token on the unsteered model's answers to neutral questions, `token_kl`: its mean over
                         all tokens and its 95th percentile, in nats
    capability           share of questions whose right answer is preferred (`accuracy`), and mean score
    text                 greedy answers to neutral questions: tokens; share that reaches the limit; share of 4-grams
                         that were there before (`repetition`); perplexity without steering
    refusals             share of harmless requests whose greedy answer is a refusal by its words, see `refusals`
    other behaviors      cosine of multiplier times vector with other vectors; change of the mean score of their tests
    ===================  ==========================================================================================

    A random direction is drawn uniformly and acts like the vector: same norm, layer, multiplier and positions.

    Args:
        vector: of one layer, as in `vectors[14]`.
        neutral: questions that the vector does not come from.
        capability: sets whose positive answer is the right one, by name; by default the bundled easy questions, with
            MMLU and TruthfulQA where they have been fetched. `{}` leaves it out.
        requests: harmless ones; `[]` leaves refusals out.
        others: other behaviors' vectors by name, each with the vector's layer; or "bundled", which extracts those of
            the bundled behaviors from some of their pairs and tests on the rest.
        other_tests: their held-out pairs, by name.
        positions: where it acts, by name, see `caa_lens.steering.placing`.
        n_tokens: the limit of every answer.
        n_random: how many random directions; the costliest part is answers, and so in proportion to this.
        batch_size: rows of answers at once.
        max_tokens: of scores and divergences, as `score_answers` takes it.

    Raises:
        TypeError: for anything but one vector, a model without a tokenizer, or sets and vectors that are none.
        ValueError: for a vector that does not fit the model or is 0, a multiplier that is not finite or beyond the
            model's dtype, questions that are there twice or are questions of the sets.

    Warns:
        TrainingPairsWarning: of tests with pairs that the vector came from.
    """
    check_model(model)
    if not isinstance(vector, SteeringVector):
        raise TypeError(
            f"expected a SteeringVector, got {describe(vector)}: of a set choose a layer, as in vectors[13]"
        )
    check_vector(model, vector)
    if not vector.norm:
        raise ValueError("the vector is 0, so that nothing would be steered: look at how it was made")
    if model.tokenizer is None:
        raise TypeError("this model has no tokenizer to answer questions with: load it from a folder that has one")
    multiplier, seed = as_multiplier(multiplier), as_seed(seed)
    n_tokens, n_random = check_count("n_tokens", n_tokens), check_count("n_random", n_random)
    n_resamples = check_count("n_resamples", n_resamples, least=0)
    batch_size = check_count("batch_size", batch_size)
    max_tokens = None if max_tokens is None else check_count("max_tokens", max_tokens)
    for name, value, most in (("n_random", n_random, 1000), ("n_resamples", n_resamples, 10**6)):
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")
    fmt = resolve_format(model, prompt_format)
    sets, tests = as_capability(capability), as_tests(other_tests)
    if isinstance(others, str):
        if others != BUNDLED:
            raise ValueError(f"others must be vectors by name, or {BUNDLED!r}, got {others!r}")
        found, its = bundled_others(model, vector, fmt, system=system, seed=seed, progress=progress)
        others, tests = found, its | tests
    near = other_vectors(model, others, vector.layer)
    asked = distinct_questions("neutral questions", neutral, [*sets.values(), *tests.values()])
    if not asked:
        raise ValueError("no neutral questions given: expected at least one")
    requested = distinct_questions("harmless requests", requests, [])
    for name, test in tests.items():
        warn_of_training_pairs(test, vector, name=name)

    randoms = _random_vectors(vector, n_random, seed)
    conditions: list[Condition] = [()]
    for one in (vector, *randoms):
        step = Intervention(vector=one, multiplier=multiplier, positions=None if positions == "caa" else positions)
        conditions.append((step,) if multiplier else ())
    check_steps(model, [step._at((0, None)) for some in conditions for step in some])

    prompts = [fmt.encode(model.tokenizer, question, system=system) for question in (*asked, *requested)]
    texts = answered_under(
        model, prompts, conditions, n_tokens=n_tokens, batch_size=batch_size, progress=progress
    )  # [condition][prompt]
    of_neutral = [some[: len(asked)] for some in texts]
    answers = [[words_of(model, one) for one in some] for some in texts]
    how: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress}
    scoring = {"prompt_format": fmt, "system": system, **how}
    measures = [
        *_of_divergence(model, of_neutral[0], conditions, how),
        *of_scores(model, sets, conditions, group=CAPABILITY, accuracy=True, **scoring),
        *of_answers(model, of_neutral, n_tokens=n_tokens, progress=progress),
        *_of_refusals([some[len(asked) :] for some in answers]),
        *of_cosines(vector, multiplier, randoms, near),
        *of_scores(model, tests, conditions, group=OTHERS, accuracy=False, **scoring),
    ]
    rows = [
        change_of(one, n_random, n_resamples=n_resamples, seed=seed)
        for one in tqdm(measures, desc="intervals", unit="measure", disable=not progress)
    ]
    return SideEffects(
        frame=pd.DataFrame(rows, columns=list(COLUMNS)),
        answers=tuple(
            AnswerBeside(
                group="neutral" if i < len(asked) else "harmless", question=str(question), unsteered=a, steered=b
            )
            for i, (question, a, b) in enumerate(zip((*asked, *requested), answers[0], answers[1], strict=True))
        ),
        multiplier=multiplier,
        n_random=n_random,
        settings={
            "model": str(model.cfg.model_name),
            "dtype": dtype_name(model),
            "layer": str(vector.layer),
            "positions": positions,
            "norm": f"{vector.norm:.6g}",
            "n_tokens": str(n_tokens),
            "n_resamples": str(n_resamples),
            "seed": str(seed),
            "prompt_format": fmt.name,
            "system": system or "",
            "sets": ", ".join(f"{name} {one.content_hash[:8]}" for name, one in (sets | tests).items()),
        },
        provenance={"vector": vector.provenance},
    )


def _random_vectors(vector: SteeringVector, n: int, seed: int) -> list[SteeringVector]:
    """Directions drawn uniformly, of the vector's norm; on the CPU, so that a seed gives the same ones everywhere."""
    drawn = torch.randn(n, vector.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled = drawn * (vector.norm / drawn.norm(dim=-1, keepdim=True))
    return [
        SteeringVector.from_direction(
            row.to(vector.direction.dtype), vector.layer, behavior="random", model=vector.provenance.model
        )
        for row in scaled
    ]


def _of_divergence(
    model: Any, unsteered: Sequence[Prompt], conditions: Sequence[Condition], how: Mapping[str, Any]
) -> list[Measure]:
    """Mean and 95th percentile over the tokens of all answers of some questions."""
    kl = [one.double().numpy() for one in token_kl(model, unsteered, conditions, **how)]  # [prompt][condition pos]
    sums, counts = np.stack([one.sum(1) for one in kl], axis=1), np.array([one.shape[1] for one in kl])
    about: dict[str, Any] = {
        "group": DIVERGENCE,
        "of": "neutral questions",
        "unit": "nats a token",
        "n_questions": len(kl),
    }
    return [
        Measure(**about, measure="KL", value=lambda c, some: float(sums[c, some].sum() / counts[some].sum())),
        Measure(
            **about,
            measure="KL, 95th percentile",
            value=lambda c, some: float(np.quantile(np.concatenate([kl[i][c] for i in some]), 0.95)),
        ),
    ]


def _of_refusals(answers: Sequence[Sequence[str]]) -> list[Measure]:
    """Answers `[condition][request]`."""
    n = len(answers[0])
    if not n:
        return []
    refused = np.array([[refuses(text) for text in some] for some in answers], dtype=float)
    about: dict[str, Any] = {"group": REFUSALS, "of": "harmless requests", "measure": "refused", "unit": "share"}
    return [Measure(**about, n_questions=n, value=mean_of(refused), share=True)]


def _reading(row: Mapping[Any, Any]) -> str:
    """A row in words."""
    most = max(abs(row["random_low"]), abs(row["random_high"]))
    beyond = "more than random" if abs(row["change"]) > most else "as random"
    if row["group"] == DIVERGENCE or row["measure"] == "cosine":  # no change of anything, and never below 0 or no n
        return beyond
    if np.isnan(row["low"]):
        return "no interval"
    return "none shown" if row["low"] <= 0 <= row["high"] else f"changed, {beyond}"


def _note(row: Mapping[Any, Any], settings: Mapping[str, str]) -> str:
    """What to know of a row, if there is something."""
    where = f"{row['measure']} of {row['of']}"
    if row["measure"] == "cosine":
        return ""
    if row["n"] < LEAST:
        return f"{where}: {row['n']} are too few for an interval; give at least {LEAST}."
    if row["measure"] == "at the limit" and max(row["unsteered"], row["steered"]) > 0.5:
        counts = [round(row[side] * row["n"]) for side in ("unsteered", "steered")]
        return (
            f"length: {counts[0]} of {row['n']} answers reach the limit of {settings['n_tokens']} tokens without "
            f"steering and {counts[1]} with it, so that lengths say little; raise n_tokens."
        )
    if row["measure"] == "accuracy" and at_chance(row["unsteered"] * row["n"], row["n"]):
        return f"{where}: without steering it is not told from guessing, so that it cannot show a loss."
    return ""
