"""Scores of held-out pairs under named conditions, as one tidy frame, and their means with intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.running.units import Frames, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.measures.answers import Condition
    from caa_lens.prompts.prompt_formats import PromptFormat
    from caa_lens.vectors.steering_vectors import SteeringVector

Cell = Mapping[str, Any]


def steered(vector: "SteeringVector", multiplier: float) -> "Condition":
    """The condition that adds one vector; the unsteered model at multiplier 0."""
    from caa_lens.steering.interventions import Intervention

    return () if multiplier == 0 else (Intervention(vector=vector, multiplier=multiplier),)


def scored(
    model: Any,
    test: "ContrastSet",
    cells: "Sequence[tuple[Cell, Condition]]",
    *,
    prompt_format: "PromptFormat | None" = None,
    system: str | None = None,
) -> "pd.DataFrame":
    """One row a cell and question: the cell's labels, `question`, `metric` and `score`.

    Args:
        prompt_format: the model's own by default; of a copy of a model, give the original's.
    """
    import pandas as pd

    from caa_lens.measures.answers import score_answers

    conditions = [condition for _, condition in cells]
    scores = score_answers(model, test, conditions, prompt_format=prompt_format, system=system, progress=False)
    parts = [
        pd.DataFrame({**labels, "question": range(len(test)), "metric": scores.metric, "score": scores.values[:, i]})
        for i, (labels, _) in enumerate(cells)
    ]
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs.update(scores.settings)
    return frame


def means(frames: Frames, cells: Sequence[str], *, value: str = "score") -> "pd.DataFrame":
    """Mean and 95 % interval over questions: `behavior, metric`, the cells' columns, `mean, low, high`."""
    import pandas as pd

    from caa_lens.measures.intervals import mean_with_interval

    parts = []
    for (behavior, metric), rows in together(frames).groupby(["behavior", "metric"], sort=False):
        part = mean_with_interval(rows, list(cells), value)
        part.insert(0, "metric", metric)
        part.insert(0, "behavior", behavior)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def effects(frames: Frames, cells: Sequence[str] = (), *, multiplier: float = 1.0) -> "pd.DataFrame":
    """score(+m) - score(-m) of every question: `behavior, metric`, the cells' columns, `question, effect`."""
    rows = together(frames)
    keys = ["behavior", "metric", *cells, "question"]
    table = rows[rows["multiplier"].abs() == multiplier].pivot(index=keys, columns="multiplier", values="score")
    each = (table[multiplier] - table[-multiplier]).rename("effect").reset_index()
    order = list(dict.fromkeys(rows["behavior"]))  # pivot sorts
    return each.sort_values("behavior", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)
