"""What does steering do to knowledge and truthfulness?

    python -m experiments mmlu truthful_qa --model meta-llama/Llama-2-7b-chat-hf

Asked: p(correct) on MMLU cut to two options, under every behavior's vector; and on TruthfulQA under sycophancy's. The
paper finds that MMLU changes little at -1 and +1 (Table 5; 13B: 0.63 to between 0.57 and 0.65), and that subtracting
sycophancy helps TruthfulQA slightly while adding it hurts (Table 12, mean over categories). Expected of a small model:
chance throughout, as it does not answer by letter. Skipped where the questions have not been fetched (`caa-lens data
fetch`).
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from experiments.paper.layer_choice import chosen_layer, needs_layer
from experiments.paper.layer_choice import units as behavior_units
from experiments.running.behavior_sets import N_TRUTHFUL_QA, stand_in
from experiments.running.comparison import grid, paper_tables
from experiments.running.costs import Cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.identity import content_hash
from experiments.running.scores import means, scored, steered
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def questions(name: str, config: "RunConfig") -> "tuple[ContrastSet, tuple[str, ...]]":
    """The questions and their categories; of fewer, as evenly many of each category as can be."""
    from dataclasses import replace

    from caa_lens.paper.questions import load_paper_questions, published_size

    if name in config.stand_ins:
        pairs = stand_in(name, published_size(name, "questions") or N_TRUTHFUL_QA)
        categories: tuple[str, ...] = ("",) * len(pairs)
    else:
        pairs, categories = load_paper_questions(name)
    if config.n_questions is None or config.n_questions >= len(pairs):
        return pairs, categories
    place_within: dict[str, int] = {}
    order = []
    for i, category in enumerate(categories):
        place_within[category] = place_within.get(category, 0) + 1
        order.append((place_within[category], i))
    chosen = sorted(i for _, i in sorted(order)[: config.n_questions])
    return replace(pairs, pairs=tuple(pairs[i] for i in chosen)), tuple(categories[i] for i in chosen)


def questions_hash(name: str, config: "RunConfig") -> dict[str, str]:
    """What makes these questions these: others, fetched later, are not mixed into a run."""
    pairs, categories = questions(name, config)
    return {f"{name}/questions": content_hash([pairs.content_hash, categories])}


def skip_without(name: str, config: "RunConfig") -> str | None:
    try:
        questions(name, config)
    except FileNotFoundError:
        return f"the questions of {name} are not here: `caa-lens data fetch` gets all of the paper's data"
    return None


def run_on(name: str, unit: Unit, context: "Context") -> "pd.DataFrame":
    layer = chosen_layer(context)
    vector = context.vectors(unit["behavior"])[layer]
    pairs, categories = questions(name, context.config)
    cells = [({"layer": layer, "multiplier": m}, steered(vector, m)) for m in MULTIPLIERS]
    frame = scored(context.model, pairs, cells)
    return frame.assign(category=[categories[i] for i in frame["question"]])


def section_mmlu(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section

    cells = means(frames, ["layer", "multiplier"])
    unsteered = cells.loc[cells["multiplier"] == 0, "mean"].iloc[0]
    at_one = cells[cells["multiplier"].abs() == 1]["mean"]
    tables = [("Mean p(correct) and 95 % interval", grid(cells, ["behavior"], "multiplier"))]
    tables += paper_tables(cells, "mmlu", config)
    return Section(
        title=MMLU.title,
        source=MMLU.source,
        text="Two-option MMLU under every behavior's vector. Paper: little changes at -1 and +1.",
        found=[f"Unsteered {unsteered:.3f}; at -1 and +1 between {at_one.min():.3f} and {at_one.max():.3f}."],
        tables=tables,
    )


def category_mean(rows: "pd.DataFrame", n_resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Unweighted mean over categories of `score`, and its 95 % interval; NaN of one question.

    The bootstrap has two stages: categories are drawn with replacement, and for each that was drawn, questions within
    it. Questions alone would leave no spread where categories have one question each. All of a category's draws of one
    resample are made at once: a category drawn m times gives m n questions.
    """
    import numpy as np

    if len(rows) == 1:
        return float(rows["score"].iloc[0]), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    by_category = [np.asarray(scores) for _, scores in rows.groupby("category")["score"]]
    k = len(by_category)
    times = rng.multinomial(k, np.full(k, 1 / k), size=n_resamples)  # [resample category]
    resampled: np.ndarray = np.zeros(n_resamples)
    for i, scores in enumerate(by_category):
        n = len(scores)
        resampled += rng.multinomial(n * times[:, i], np.full(n, 1 / n)) @ scores / n / k
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean([scores.mean() for scores in by_category])), float(low), float(high)


def section_truthful_qa(frames: Frames, config: "RunConfig") -> "Section":
    import pandas as pd

    from caa_lens.report.page import Section

    rows = [
        dict(zip(("behavior", "layer", "multiplier", "mean", "low", "high"), (*key, *category_mean(part)), strict=True))
        for key, part in together(frames).groupby(["behavior", "layer", "multiplier"], sort=False)
    ]
    cells = pd.DataFrame(rows)
    level = cells.set_index("multiplier")["mean"]
    tables = [("Mean over categories of p(correct), 95 % interval", grid(cells, ["behavior"], "multiplier"))]
    tables += paper_tables(cells, "truthful_qa", config)
    return Section(
        title=TRUTHFUL_QA.title,
        source=TRUTHFUL_QA.source,
        text="Two-option TruthfulQA under sycophancy's vector. Paper: -1 helps slightly, +1 hurts.",
        found=[f"p(correct) {level[-1.0]:.3f} at -1, {level[0.0]:.3f} unsteered, {level[1.0]:.3f} at +1."],
        tables=tables,
    )


def cost_of(name: str, unit: Unit, context: "Context") -> Cost:
    return scoring_cost(questions(name, context.config)[0], len(MULTIPLIERS), depth=0.6)


def _skip_truthful_qa(config: "RunConfig") -> str | None:
    if "sycophancy" not in config.behaviors:
        return "needs sycophancy among the behaviors"
    return skip_without("truthfulqa", config)


def _sycophancy_only(config: "RunConfig") -> Sequence[Unit]:
    return [Unit.of(behavior="sycophancy")]


MMLU = Experiment(
    name="mmlu",
    title="Knowledge under steering (MMLU)",
    source="Table 5",
    units=behavior_units,
    run=partial(run_on, "mmlu"),
    section=section_mmlu,
    cost=partial(cost_of, "mmlu"),
    needs=needs_layer,
    skip=partial(skip_without, "mmlu"),
    own=partial(questions_hash, "mmlu"),
)
TRUTHFUL_QA = Experiment(
    name="truthful_qa",
    title="Truthfulness under steering (TruthfulQA)",
    source="Table 12",
    units=_sycophancy_only,
    run=partial(run_on, "truthfulqa"),
    section=section_truthful_qa,
    cost=partial(cost_of, "truthfulqa"),
    needs=needs_layer,
    skip=_skip_truthful_qa,
    own=partial(questions_hash, "truthfulqa"),
)
