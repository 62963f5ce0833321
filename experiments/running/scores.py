"""Scores of held-out pairs under named conditions, as one tidy frame, and their means with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.running.units import Frames, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.measures.answers import Condition
    from caa_lens.prompts.prompt_formats import PromptFormat
    from caa_lens.vectors.steering_vectors import SteeringVector
    from experiments.running.context import Context

Cell = Mapping[str, Any]
UNSTEERED = -1  # the layer of the unsteered row of a sweep over layers


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


def swept(context: "Context", behavior: str, pairs: "ContrastSet") -> "pd.DataFrame":
    """Every swept layer's own vector at -1 and +1, and the unsteered model: `layer, multiplier, question, score`."""
    vectors = context.vectors(behavior)
    cells = [
        ({"layer": layer, "multiplier": m}, steered(vectors[layer], m))
        for layer in context.swept_layers
        for m in (-1.0, 1.0)
    ]
    unsteered = ({"layer": UNSTEERED, "multiplier": 0.0}, ())
    frame = scored(context.model, pairs, [unsteered, *cells])
    frame.attrs["n_layers"] = context.n_layers
    return frame


def layer_effects(frames: Frames) -> "pd.DataFrame":
    """Mean of score(+1) - score(-1) by behavior and layer, with its interval."""
    import pandas as pd

    from caa_lens.measures.intervals import mean_with_interval

    each = effects(frames, ["layer"])
    parts = [
        mean_with_interval(rows, ["layer"], "effect").assign(behavior=behavior, metric=metric)
        for (behavior, metric), rows in each.groupby(["behavior", "metric"], sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


def best_layers(frames: Frames) -> "pd.DataFrame":
    """Each behavior's layer of the largest effect, and what that choice is worth on questions that did not make it.

    One row a behavior: `behavior, metric, layer, effect, low, high, folds that agree`. The questions choose and report
    in turn, by folds, with an interval of that whole procedure (`caa_lens.measures.honest_choice`); of fewer than 8
    questions the effect is NaN. Layers at which some score is NaN take no part.
    """
    import pandas as pd

    from caa_lens.measures.honest_choice import MIN_QUESTIONS, choose_honestly

    rows = []
    for (behavior, metric), own in effects(frames, ["layer"]).groupby(["behavior", "metric"], sort=False):
        table = own.pivot(index="question", columns="layer", values="effect")
        table = table.dropna(axis="columns")  # layers at which a score is NaN are not compared
        if table.empty:
            continue
        row = {"behavior": behavior, "metric": metric, "layer": int(table.mean().idxmax())}
        if len(table) >= MIN_QUESTIONS:
            found = choose_honestly(table.to_numpy())
            row |= {"effect": found.effect, "low": found.low, "high": found.high, "folds that agree": found.agreeing}
        rows.append(row)
    columns = ["behavior", "metric", "layer", "effect", "low", "high", "folds that agree"]
    return pd.DataFrame(rows).reindex(columns=columns)


def best_layer_told(row: Any) -> str:
    """A row of `best_layers` in words: the layer, and the choice's effect on questions that did not make it."""
    if math.isnan(row.effect):
        return f"{row.behavior}: largest at layer {row.layer}; too few questions to say what that choice is worth."
    verdict = "excludes" if row.low > 0 or row.high < 0 else "includes"
    return (
        f"{row.behavior}: largest at layer {row.layer}; on questions that did not choose it (by folds) "
        f"{row.effect:+.3f} (95 % interval {row.low:.3f} to {row.high:.3f}, which {verdict} 0)."
    )
