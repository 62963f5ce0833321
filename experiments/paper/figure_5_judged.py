"""What does a judge say of steered text?

    python -m experiments judged --model demo --judge MODEL --judge-url http://localhost:8000/v1

Asked: the answers of `open_ended`, rated from 0 to 10 by any model behind an OpenAI-compatible endpoint (our rubrics,
temperature 0). The paper (Figure 5) finds scores that rise with the multiplier, and refusal's that do not. Expected of
a small model: scores near those of its unsteered text, apart from sentiment and formality.

An answer whose request failed (time-outs, cut connections, errors of the server) leaves its unit undone: what there is
is shown, and the same command asks again for what is missing, and only for that. An answer to which the judge gave no
score in five replies, or that the endpoint refuses for itself, has none for good. Every mean is over the answers of its
own cell that have a score; how many stands beside it, and how many have none is a table of its own.

The judge can be given at any start of a run, and is then what this experiment is held to (see `identity`).
`--judge-concurrency`, `--judge-rpm` and `--judge-timeout` say how patiently it is asked, `--judge-settings` what is
sent beside the prompt. The rubrics are ours, so scores and the paper's are on scales of one range, not on one scale.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.paper.figure_4_multipliers import rise
from experiments.paper.figure_5_open_ended import EXPERIMENT as OPEN_ENDED
from experiments.paper.figure_5_open_ended import skip as skip_open_ended
from experiments.paper.figure_5_open_ended import units as open_ended_units
from experiments.running.comparison import paper_tables
from experiments.running.costs import Cost
from experiments.running.experiment import Experiment
from experiments.running.identity import content_hash, without_password
from experiments.running.units import Frames, Unfinished, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

MAX_ATTEMPTS = 5
KEPT = ["prompt", "score", "raw", "attempts", "error", "again"]


def units(config: "RunConfig") -> list[Unit]:
    from caa_lens.measures.open_ended.rubrics import RUBRICS

    return [unit for unit in open_ended_units(config) if unit["behavior"] in RUBRICS]


def skip_without_judge(config: "RunConfig") -> str | None:
    return None if config.judge else "no judge was given: name one with --judge and --judge-url"


def skip(config: "RunConfig") -> str | None:
    has_units = skip_open_ended(config) or (None if units(config) else "none of the behaviors has a rubric")
    return skip_without_judge(config) or has_units


def own(config: "RunConfig") -> dict[str, Any]:
    """The judge and what it is asked."""
    from caa_lens.measures.open_ended.rubrics import RUBRICS

    rubrics = content_hash({name: RUBRICS[name].text for name in config.behaviors if name in RUBRICS})
    settings = {"judge": config.judge, "judge_url": without_password(config.judge_url)}
    return settings | {"judge_settings": config.judge_settings, "judge/rubrics": rubrics}


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    return judge_answers(EXPERIMENT.name, unit, context.folder.load(OPEN_ENDED.name, unit), context)


def judge_answers(experiment: str, unit: Unit, texts: "pd.DataFrame", context: "Context") -> "pd.DataFrame":
    """The answers' `prompt`, `score`, `raw`, `attempts`, `error` and whether to ask `again`, and their `layer`.

    Raises:
        Unfinished: some answers, or all, could not be asked about now.
    """
    from caa_lens.measures.open_ended.judge_endpoint import JudgeError
    from caa_lens.measures.open_ended.judging import judge_texts

    config = context.config
    # Replies are kept by judge, settings and prompt; another endpoint may have another judge of the same name.
    place = hashlib.sha256(str(config.judge_url).encode()).hexdigest()[:8]
    try:
        result = judge_texts(
            texts[["prompt", "question", "answer"]],
            unit["behavior"],
            base_url=str(config.judge_url),
            model=str(config.judge),
            path=context.folder.artefacts(experiment) / place / f"{unit.name}.jsonl",
            settings=json.loads(config.judge_settings or "{}"),
            max_attempts=MAX_ATTEMPTS,
            concurrency=config.judge_concurrency,
            requests_per_minute=config.judge_rpm,
            timeout=config.judge_timeout,
            progress=False,
        )
    except JudgeError as error:
        raise Unfinished(str(error), stop=True) from None
    frame = result.frame.assign(again=ask_again(result.frame), layer=texts["layer"].iloc[0])[[*KEPT, "layer"]]
    if frame["again"].any():
        first = frame.loc[frame["again"], "error"].iloc[0]
        n_missing = int(frame["again"].sum())
        raise Unfinished(f"the judge could not be asked about {n_missing} of {len(frame)} answers: {first}", frame)
    return frame


def ask_again(judged: "pd.DataFrame") -> "pd.Series":
    """Of every answer, whether asking again may help.

    It does not where the last of all replies was no score, nor where there was no reply and attempts are left: the
    endpoint refused this one request for itself.
    """
    replied = judged["error"].str.startswith("the reply ")
    return judged["score"].isna() & ~replied & (judged["attempts"] >= MAX_ATTEMPTS)


def cell_means(rows: "pd.DataFrame", cells: Sequence[str]) -> "pd.DataFrame":
    """Of every cell (the columns `cells`) the scored answers' `n`, `mean`, and 95 % interval, if there are two or more.

    Each is over its own prompts, so that one answer without a score costs nothing elsewhere; cells without any are
    left out.
    """
    import pandas as pd

    from caa_lens.measures.intervals import mean_with_interval

    scored = rows.dropna(subset=["score"])
    parts = []
    for key, part in scored.groupby(list(cells), sort=False):
        one = mean_with_interval(part.assign(question=part["prompt"], cell=0), ["cell"], "score").iloc[0]
        values = {"n": len(part), "mean": one["mean"], "low": one["low"], "high": one["high"]}
        parts.append(dict(zip(cells, key, strict=True)) | values)
    return pd.DataFrame(parts, columns=[*cells, "n", "mean", "low", "high"])


def shown(cells: "pd.DataFrame", rows: Sequence[str]) -> "pd.DataFrame":
    """For reading: a row for each `rows`, a column a multiplier, `mean [low, high] (n)`; of one answer no interval."""
    import pandas as pd

    table: dict[tuple[object, ...], dict[str, str]] = {}
    labels = {m: f"{m:+g}" if m else "0" for m in sorted(set(cells["multiplier"]))}
    for cell in cells.to_dict("records"):
        interval = f" [{cell['low']:.2f},\N{NO-BREAK SPACE}{cell['high']:.2f}]" if cell["n"] > 1 else ""
        place = table.setdefault(tuple(cell[name] for name in rows), {})
        place[labels[cell["multiplier"]]] = f"{cell['mean']:.2f}{interval} (n={cell['n']})"
    lines = [
        dict(zip(rows, key, strict=True)) | {m: by.get(m, "-") for m in labels.values()} for key, by in table.items()
    ]
    return pd.DataFrame(lines, columns=[*rows, *labels.values()])


def failures(rows: "pd.DataFrame", by: Sequence[str]) -> "pd.DataFrame":
    """How many answers have a score and why others have none, and the share without, for each of `by`."""
    import pandas as pd

    lines = []
    for key, part in rows.groupby(list(by), sort=False):
        lacks = part["score"].isna()
        again = part["again"].astype(bool)
        line = {"answers": len(part), "scored": int((~lacks).sum()), "no score for good": int((lacks & ~again).sum())}
        line |= {"to be asked again": int(again.sum()), "failure rate": f"{lacks.mean():.1%}"}
        why = part.loc[lacks, "error"]
        lines.append(dict(zip(by, key, strict=True)) | line | {"first reason": why.iloc[0] if len(why) else ""})
    columns = [*by, "answers", "scored", "no score for good", "to be asked again", "failure rate", "first reason"]
    return pd.DataFrame(lines, columns=columns)


def unscored(rows: "pd.DataFrame", behaviors: Sequence[str]) -> list[str]:
    """A sentence for each behavior without any score."""
    scored = set(rows.dropna(subset=["score"])["behavior"])
    return [f"{name}: no answer has a score." for name in behaviors if name not in scored]


def rows_of(frames: Frames) -> "pd.DataFrame":
    """All judged answers; an empty frame of their columns if there are none."""
    import pandas as pd

    if frames:
        return together(frames)
    return pd.DataFrame(columns=[*KEPT, "layer", "behavior", "finetune", "multiplier"])


def counted(rows: "pd.DataFrame", n_units: int, n_all: int) -> str:
    """A sentence: how many answers were judged, how many of them have a score, and whether more is to come."""
    lacks, again = int(rows["score"].isna().sum()), int(rows["again"].astype(bool).sum())
    text = f"{len(rows) - lacks} of {len(rows)} answers have a score."
    if again or n_units < n_all:
        missing = f" {n_all - n_units} of {n_all} units have no answers yet." if n_units < n_all else ""
        text += f"{missing} Not complete: {again} answers are to be asked again at the next start."
    return text


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves

    every = units(config)
    rows = rows_of(frames)
    cells = cell_means(rows, ["behavior", "layer", "multiplier"])
    scores = [("Mean score (0 to 10), 95 % interval, number of answers", shown(cells, ["behavior"]))]
    figure = {"x": "multiplier", "y": "mean", "by": "behavior", "labels": ("multiplier", "score, 0 to 10")}
    one_each = len(cells) and not cells["low"].notna().any()
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"{config.judge} rates the answers from 0 to 10, by our rubrics. {counted(rows, len(frames), len(every))} "
        f"{'One answer a cell has a score, so there are no intervals. ' if one_each else ''}"
        "Paper: scores rise with the multiplier, refusal's do not.",
        found=[
            *(found(str(name), part) for name, part in cells.groupby("behavior", sort=False)),
            *unscored(rows, list(dict.fromkeys(unit["behavior"] for unit in every))),
        ],
        figures=[curves(cells, title="Judge's score by multiplier, 95 % interval", **figure)] if len(cells) else [],
        tables=[
            *(scores if len(cells) else []),
            *paper_tables(cells, "open_ended", config),
            *([("Answers without a score", failures(rows, ["behavior"]))] if len(rows) else []),
        ],
    )


def found(behavior: str, cells: "pd.DataFrame") -> str:
    """Whether a behavior's scores rise, if there are at least two to compare."""
    cells = cells.sort_values("multiplier")
    if len(cells) > 1:
        return rise(behavior, cells)
    return f"{behavior}: {cells['mean'].iloc[0]:.2f} at {cells['multiplier'].iloc[0]:+g}; no score elsewhere."


def cost(unit: Unit, context: "Context") -> Cost:
    return Cost(requests=len(context.sets(unit["behavior"]).open_ended))


EXPERIMENT = Experiment(
    name="judged",
    title="Steered text, judged",
    source="Figure 5",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=lambda config: (OPEN_ENDED.name,),
    by_driver=True,
    skip=skip,
    own=own,
)
