"""What does steered text look like?

    python -m experiments open_ended --model demo --out runs/demo
    python -m experiments judged --model demo --out runs/demo --judge MODEL --judge-url http://localhost:8000/v1

Asked: greedy answers to open-ended prompts at multipliers -2 to 2; measures that need no judge (sentiment, repetition,
perplexity under the unsteered model); and, where a judge is given, its score from 0 to 10. The paper (Figure 5) finds
scores that rise with the multiplier, flat for refusal, and text that large multipliers degrade. Expected of a small
model: sentiment and formality follow the multiplier; at -2 and +2 text starts to repeat itself and is unlikely
unsteered.

The rubrics are ours, so scores and the paper's are on scales of one range, not on one scale.
"""

from typing import TYPE_CHECKING

from experiments.behavior_sets import behavior_sets
from experiments.comparison import beside_the_paper, grid, has_paper_numbers
from experiments.experiment import Cost, Experiment, Frames, Unit, together
from experiments.layer_sweep import needs_layer
from experiments.measures import means
from experiments.plan import generation_cost

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report import Section
    from experiments.context import Context
    from experiments.settings import RunConfig

MULTIPLIERS = (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
BATCH = 10  # prompts at a time
MEASURES = ("sentiment", "repetition", "distinct_2", "n_tokens", "mean_logp")
SHOWN_PROMPTS = 2


def units(config: "RunConfig") -> list[Unit]:
    asked = [behavior for behavior in config.behaviors if behavior_sets(config, behavior).open_ended]
    return [Unit.of(behavior=behavior, multiplier=m) for behavior in asked for m in MULTIPLIERS]


def skip(config: "RunConfig") -> str | None:
    return None if units(config) else "none of the behaviors has open-ended prompts"


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    import pandas as pd

    from caa_lens.generation import generate
    from caa_lens.text_measures import measure_texts

    vector, m = context.vectors(unit["behavior"])[context.layer], unit["multiplier"]
    prompts = context.sets(unit["behavior"]).open_ended
    answers: list[str] = []
    for first in range(0, len(prompts), BATCH):
        answers += generate(
            context.model,
            prompts[first : first + BATCH],
            vectors=[(vector, m)] if m else [],
            max_new_tokens=context.config.max_new_tokens,
        )
    frame = pd.DataFrame({"prompt": range(len(prompts)), "question": prompts, "answer": answers})
    measured = measure_texts(context.model, frame, progress=False)
    return measured.assign(layer=context.layer, multiplier=m)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report import Section
    from experiments.figures import curves

    rows = together(frames)
    layer = int(rows["layer"].iloc[0])
    measured = rows.groupby(["behavior", "multiplier"], sort=False)[list(MEASURES)].mean().reset_index()
    labels = {"sentiment": "sentiment, -1 to 1", "repetition": "share of repeated 4-grams"}
    labels |= {"mean_logp": "mean log-probability, unsteered (nats per token)"}
    found = []
    for behavior, part in measured.groupby("behavior", sort=False):
        at = part.set_index("multiplier")
        found.append(
            f"{behavior}: sentiment {at.loc[-2.0, 'sentiment']:+.2f} at -2, {at.loc[0.0, 'sentiment']:+.2f} unsteered, "
            f"{at.loc[2.0, 'sentiment']:+.2f} at +2; mean log-probability {at.loc[-2.0, 'mean_logp']:.2f}, "
            f"{at.loc[0.0, 'mean_logp']:.2f}, {at.loc[2.0, 'mean_logp']:.2f}; repeated 4-grams "
            f"{at.loc[-2.0, 'repetition']:.0%}, {at.loc[0.0, 'repetition']:.0%}, {at.loc[2.0, 'repetition']:.0%}."
        )
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"Greedy answers with the layer-{layer} vector. Sentiment is of the text; log-probability is of the "
        "answer under the unsteered model. Paper: the behavior rises with the multiplier, large ones degrade text.",
        found=found,
        figures=[
            curves(
                measured,
                x="multiplier",
                y=measure,
                by="behavior",
                title=f"{measure.replace('_', ' ').replace('logp', 'log-probability')} of answers by multiplier",
                labels=("multiplier", label),
            )
            for measure, label in labels.items()
        ],
        texts=side_by_side(rows),
        tables=[("Mean over prompts", measured.round(4))],
    )


def side_by_side(rows: "pd.DataFrame") -> list[tuple[str, list[tuple[str, str]]]]:
    """The first prompts' answers of each behavior, by multiplier."""
    groups = []
    for (behavior, prompt), part in rows.groupby(["behavior", "prompt"], sort=False):
        if prompt >= SHOWN_PROMPTS:
            continue
        part = part.sort_values("multiplier")
        answers = [
            (f"{m:+g}" if m else "unsteered", a) for m, a in zip(part["multiplier"], part["answer"], strict=True)
        ]
        groups.append((f"{behavior}: {part['question'].iloc[0]}", answers))
    order = list(dict.fromkeys(rows["behavior"]))
    return sorted(groups, key=lambda group: order.index(group[0].split(":")[0]))


def cost(unit: Unit, context: "Context") -> Cost:
    prompts, n_new = context.sets(unit["behavior"]).open_ended, context.config.max_new_tokens
    batches = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
    generated = sum((generation_cost(batch, n_new) for batch in batches), Cost())
    return generated + Cost(forwards=len(prompts), tokens=generated.tokens)  # read again, for the log-probabilities


# ---- the judge -------------------------------------------------------------------------------------------------


def judged_units(config: "RunConfig") -> list[Unit]:
    from caa_lens.rubrics import RUBRICS

    return [unit for unit in units(config) if unit["behavior"] in RUBRICS]


def skip_judge(config: "RunConfig") -> str | None:
    if not (config.judge and config.judge_url):
        return "no judge was given: name one with --judge and --judge-url"
    return skip(config) or (None if judged_units(config) else "none of the behaviors has a rubric")


def run_judge(unit: Unit, context: "Context") -> "pd.DataFrame":
    from caa_lens.judging import judge

    texts = context.folder.load(EXPERIMENT.name, unit)
    result = judge(
        texts[["prompt", "question", "answer"]],
        unit["behavior"],
        base_url=str(context.config.judge_url),
        model=str(context.config.judge),
        path=context.folder.artefacts(JUDGED.name) / f"{unit.name}.jsonl",
        progress=False,
    )
    if result.failure_rate > 0.5:
        reasons = result.frame.loc[result.frame["score"].isna(), "error"]
        raise RuntimeError(
            f"the judge gave no score for {result.failure_rate:.0%} of the answers ({reasons.iloc[0]}): see that it "
            "runs, and start again; its replies so far are kept"
        )
    return result.frame[["prompt", "score"]].assign(layer=texts["layer"].iloc[0])


def section_judge(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report import Section
    from experiments.figures import curves
    from experiments.multipliers import rise

    tidy = {u: frame.rename(columns={"prompt": "question"}).assign(metric="score") for u, frame in frames.items()}
    scored = {unit: frame.dropna(subset=["score"]) for unit, frame in tidy.items()}
    in_all = together(scored).groupby(["behavior", "question"])["score"].transform("size") == len(MULTIPLIERS)
    complete = together(scored)[in_all]  # intervals need every prompt at every multiplier
    cells = means({Unit.of(): complete}, ["layer", "multiplier"])
    n_left_out = sum(map(len, frames.values())) - len(complete)
    tables = [("Mean score (0 to 10) and 95 % interval", grid(cells, ["behavior"], "multiplier", digits=2))]
    if has_paper_numbers("open_ended", config):
        tables.append(("Beside the paper's, cell by cell", beside_the_paper(cells, "open_ended", config)))
    return Section(
        title=JUDGED.title,
        source=JUDGED.source,
        text=f"{config.judge} rates the answers from 0 to 10, by our rubrics. {n_left_out} answers are left out "
        "because their prompt lacks a score elsewhere. Paper: scores rise with the multiplier, refusal's do not.",
        found=[rise(name, rows.sort_values("multiplier")) for name, rows in cells.groupby("behavior", sort=False)],
        figures=[
            curves(
                cells,
                x="multiplier",
                y="mean",
                by="behavior",
                title="Judge's score by multiplier, 95 % interval",
                labels=("multiplier", "score, 0 to 10"),
            )
        ],
        tables=tables,
    )


EXPERIMENT = Experiment(
    name="open_ended",
    title="Steered text",
    source="Figure 5",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=needs_layer,
    skip=skip,
)
JUDGED = Experiment(
    name="judged",
    title="Steered text, judged",
    source="Figure 5",
    units=judged_units,
    run=run_judge,
    section=section_judge,
    needs=lambda config: ("open_ended",),
    skip=skip_judge,
)
