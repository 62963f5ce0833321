"""How do answers follow the multiplier?

    python -m experiments multipliers --model demo

Asked: the chosen layer's vector at -1, -0.5, 0, 0.5 and 1, on held-out questions. The paper (Figure 4 and its table)
finds p(matching) rising with the multiplier for all seven behaviors; at +1 sycophancy (both sizes) and myopia (7B)
fall back. Expected of a small model: the same for behaviors scored by completions; by letters it is near chance, and
nothing moves.
"""

from typing import TYPE_CHECKING

from experiments.paper.layer_choice import chosen_layer, needs_layer, units
from experiments.running.comparison import grid, paper_tables
from experiments.running.costs import Cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.scores import means, scored, steered
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

MULTIPLIERS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    layer = chosen_layer(context)
    vector = context.vectors(unit["behavior"])[layer]
    cells = [({"layer": layer, "multiplier": m}, steered(vector, m)) for m in MULTIPLIERS]
    return scored(context.model, context.sets(unit["behavior"]).test, cells)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves_by_metric

    layer = int(together(frames)["layer"].iloc[0])
    cells = means(frames, ["layer", "multiplier"])
    tables = [("Mean score and 95 % interval by multiplier", grid(cells, ["behavior", "metric"], "multiplier"))]
    tables += paper_tables(cells, "ab", config)
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"The layer-{layer} vector at five multipliers. Paper: the score rises with the multiplier for all "
        "seven behaviors; at +1 sycophancy and (7B) myopia fall back.",
        found=[rise(name, rows.sort_values("multiplier")) for name, rows in cells.groupby("behavior", sort=False)],
        figures=curves_by_metric(
            cells,
            x="multiplier",
            by="behavior",
            title=f"Score by multiplier at layer {layer}, 95 % interval",
            label="multiplier",
        ),
        tables=tables,
    )


def rise(behavior: object, rows: "pd.DataFrame") -> str:
    """A sentence: whether means rise at every step, and from where to where."""
    steps = rows["mean"].diff().dropna()
    falls = [f"{m:g}" for m, step in zip(rows["multiplier"].iloc[1:], steps, strict=True) if step <= 0]
    first, last = rows.iloc[0], rows.iloc[-1]
    how = (
        "rises at every step"
        if not falls
        else f"does not rise at the step{'s' if len(falls) > 1 else ''} to {', '.join(falls)}"
    )
    return (
        f"{behavior}: the score {how}; {first['mean']:.3f} at {first['multiplier']:+g}, {last['mean']:.3f} at "
        f"{last['multiplier']:+g}."
    )


def cost(unit: Unit, context: "Context") -> Cost:
    return scoring_cost(context.sets(unit["behavior"]).test, len(MULTIPLIERS), depth=0.6)


EXPERIMENT = Experiment(
    name="multipliers",
    title="Effect by multiplier",
    source="Figure 4",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=needs_layer,
)
