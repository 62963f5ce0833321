"""Does finetuning on letters reach open-ended text, and does steering add to it there?

    python -m experiments finetuned_text --model demo
    python -m experiments finetuned_judged --model demo --judge MODEL --judge-url http://localhost:8000/v1

Asked: the models of `finetuning`, taught the positive or the negative letters, answer the open-ended prompts with the
original model's vector at -1, 0 and 1. `finetuned_text` measures the answers as `open_ended` does (log-probabilities
are the untaught model's, so that all texts are held against one model); `finetuned_judged` has a judge rate them,
beside the untaught model's, which are those of `judged`. The paper (Tables 4, 10 and 13; 7B chat) finds that lessons on
letters do reach text (survival-instinct: from 4.8 to 8.9 taught the positive letters, to 0 taught the negative ones),
and that steering adds to them for some behaviors (myopic-reward, taught the positive letters: from 3.5 to 6.2 at +1)
and not for others (refusal). Expected of a small model: text that its lessons change little, as they hardly change its
letters.
"""

from typing import TYPE_CHECKING

from experiments.paper import figure_5_judged as judged
from experiments.paper.figure_5_open_ended import MEASURES, reading_again, shown_answer
from experiments.paper.tables_4_10_13_finetuning import EXPERIMENT as FINETUNING
from experiments.paper.tables_4_10_13_finetuning import MULTIPLIERS, SIDES, answers_file
from experiments.paper.tables_4_10_13_finetuning import units as taught_units
from experiments.running.behavior_sets import behavior_sets
from experiments.running.comparison import paper_tables
from experiments.running.costs import Cost
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unfinished, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

UNTAUGHT = "none"
SHOWN_PROMPTS = 1


def units(config: "RunConfig") -> list[Unit]:
    asked = [u for u in taught_units(config) if behavior_sets(config, u["behavior"]).open_ended]
    return [Unit.of(**dict(unit.arguments), multiplier=m) for unit in asked for m in MULTIPLIERS]


def skip(config: "RunConfig") -> str | None:
    return None if units(config) else "none of the behaviors that are answered by letter has open-ended prompts"


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    import pandas as pd

    from caa_lens.measures.open_ended.text_measures import measure_texts

    taught = Unit.of(behavior=unit["behavior"], finetune=unit["finetune"])
    file = answers_file(context.folder, taught)
    if not file.exists():
        done = context.folder.unit_file(FINETUNING.name, taught)
        raise FileNotFoundError(f"the taught model's answers are not in {file}: delete {done} to have them made again")
    texts = pd.read_parquet(file)
    texts = texts[texts["multiplier"] == unit["multiplier"]].reset_index(drop=True)
    return measure_texts(context.model, texts, progress=False)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section

    rows = together(frames)
    cells = rows.groupby(["behavior", "finetune", "multiplier"], sort=False)
    measured = cells[list(MEASURES)].mean().reset_index()
    measured.insert(3, "n", cells.size().to_numpy())
    at = measured.set_index(["behavior", "finetune", "multiplier"])["sentiment"]
    found = []
    for behavior in dict.fromkeys(rows["behavior"]):
        parts = [
            f"taught the {side} letters {at[behavior, side, 0.0]:+.2f}, steered {at[behavior, side, -1.0]:+.2f} at -1 "
            f"and {at[behavior, side, 1.0]:+.2f} at +1"
            for side in SIDES
        ]
        found.append(f"{behavior}: sentiment of the text {'; '.join(parts)}.")
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"Greedy answers of the models that were taught letters, with the original model's layer-"
        f"{int(rows['layer'].iloc[0])} vector. Log-probability is of the answer under the untaught, unsteered model. "
        "Paper: lessons on letters reach text, and steering adds to them for some behaviors.",
        found=found,
        texts=side_by_side(rows),
        tables=[("Mean over prompts (n)", measured.round(4))],
    )


def side_by_side(rows: "pd.DataFrame") -> list[tuple[str, list[tuple[str, str]]]]:
    """The first prompts' answers of each behavior, by what was taught and by multiplier."""
    few = rows[rows["prompt"] < SHOWN_PROMPTS]
    return [
        (
            f"{behavior}: {part['question'].iloc[0]}",
            [(f"taught {r.finetune}, {r.multiplier:+g}", shown_answer(r)) for r in part.itertuples(index=False)],
        )
        for (behavior, _), part in few.groupby(["behavior", "prompt"], sort=False)
    ]


def cost(unit: Unit, context: "Context") -> Cost:
    return reading_again(context.sets(unit["behavior"]).open_ended, context.config.max_new_tokens)


# ---- the judge -------------------------------------------------------------------------------------------------


def judged_units(config: "RunConfig") -> list[Unit]:
    from caa_lens.measures.open_ended.rubrics import RUBRICS

    behaviors = dict.fromkeys(unit["behavior"] for unit in units(config) if unit["behavior"] in RUBRICS)
    return [
        Unit.of(behavior=behavior, finetune=side, multiplier=m)
        for behavior in behaviors
        for side in (UNTAUGHT, *SIDES)
        for m in MULTIPLIERS
    ]


def skip_judged(config: "RunConfig") -> str | None:
    has_units = skip(config) or (None if judged_units(config) else "none of the behaviors has a rubric")
    return judged.skip_without_judge(config) or has_units


def run_judged(unit: Unit, context: "Context") -> "pd.DataFrame":
    if unit["finetune"] != UNTAUGHT:
        return judged.judge_answers(JUDGED.name, unit, context.folder.load(EXPERIMENT.name, unit), context)
    same = Unit.of(behavior=unit["behavior"], multiplier=unit["multiplier"])
    if not context.folder.is_done(judged.EXPERIMENT.name, same):
        raise Unfinished(f"the untaught model's answers are not all judged: see {judged.EXPERIMENT.name}")
    frame = context.folder.load(judged.EXPERIMENT.name, same)
    frame.attrs = {}
    return frame


def section_judged(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section

    every = judged_units(config)
    rows = judged.rows_of(frames)
    cells = judged.cell_means(rows, ["behavior", "layer", "finetune", "multiplier"])
    by = ["behavior", "finetune"]
    scores = [("Mean score (0 to 10), 95 % interval, number of answers", judged.shown(cells, by))] if len(cells) else []
    paper = paper_tables(cells, "finetune_open_ended", config) if config.finetune == "full" else []
    found = [
        judged.found(f"{name}, {'untaught' if side == UNTAUGHT else f'taught the {side} letters'}", part)
        for (name, side), part in cells.groupby(by, sort=False)
    ]
    return Section(
        title=JUDGED.title,
        source=JUDGED.source,
        text=f"{config.judge} rates the answers of models that were taught letters, from 0 to 10, by our rubrics. "
        f"{judged.counted(rows, len(frames), len(every))} Paper: lessons on letters reach text, and steering adds to "
        "them for some behaviors.",
        found=[*found, *judged.unscored(rows, list(dict.fromkeys(unit["behavior"] for unit in every)))],
        tables=[*scores, *paper, *([("Answers without a score", judged.failures(rows, by))] if len(rows) else [])],
    )


def cost_judged(unit: Unit, context: "Context") -> Cost:
    return Cost() if unit["finetune"] == UNTAUGHT else judged.cost(unit, context)


EXPERIMENT = Experiment(
    name="finetuned_text",
    title="Text on top of finetuning",
    source=FINETUNING.source,
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=lambda config: (FINETUNING.name,),
    skip=skip,
)
JUDGED = Experiment(
    name="finetuned_judged",
    title="Text on top of finetuning, judged",
    source=FINETUNING.source,
    units=judged_units,
    run=run_judged,
    section=section_judged,
    cost=cost_judged,
    needs=lambda config: (judged.EXPERIMENT.name, EXPERIMENT.name),
    by_driver=True,
    skip=skip_judged,
)
