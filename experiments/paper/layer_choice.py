"""At which layer do the single-layer experiments steer?

    python -m experiments layer_choice --model demo

Asked: every layer's vector at -1 and +1 on validation pairs, which no vector is made from and which no other experiment
reports. The chosen layer has the largest effect of +1 against -1, divided by the standard deviation of the unsteered
scores so that probabilities and margins can be averaged over behaviors. A layer that was chosen on the questions that
are then reported would flatter all that is reported there.

For Llama 2's chat models the layers are the paper's (13 and 14), and nothing is chosen.
"""

from typing import TYPE_CHECKING

from experiments.running.beforehand import n_layers as depth_of
from experiments.running.costs import Cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.scores import UNSTEERED, effects, layer_effects, swept
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig


def units(config: "RunConfig") -> list[Unit]:
    return [Unit.of(behavior=behavior) for behavior in config.behaviors]


def skip(config: "RunConfig") -> str | None:
    return None if config.layer is None else f"the settings name layer {config.layer}"


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    return swept(context, unit["behavior"], _validation(unit, context))


def _validation(unit: Unit, context: "Context") -> "ContrastSet":
    """The validation pairs. Where a layer is named the experiment is skipped; a plan times it on test pairs then."""
    sets = context.sets(unit["behavior"])
    return sets.test if sets.validation is None else sets.validation


def needs_layer(config: "RunConfig") -> tuple[str, ...]:
    """What experiments need that steer at the chosen layer."""
    return ("vectors",) if config.layer is not None else ("vectors", "layer_choice")


def best_layer(frames: Frames) -> int:
    """The layer with the largest effect, in standard deviations of the unsteered scores, averaged over behaviors.

    Raises:
        ValueError: if a score is NaN, or all unsteered scores of a behavior are the same.
    """
    rows = together(frames)
    spread = rows[rows["layer"] == UNSTEERED].groupby("behavior")["score"].std()
    if unknown := sorted({str(one) for one in rows["behavior"][rows["score"].isna()]}):
        raise ValueError(
            f"some scores of {', '.join(unknown)} are NaN, so that layers cannot be compared: name a layer with "
            "--layer, or take --dtype float32"
        )
    if still := sorted(str(one) for one in spread.index[~(spread > 0)]):
        raise ValueError(
            f"all unsteered scores of {', '.join(still)} are the same, so that effects have no measure: give more "
            "validation pairs with --n-validation, or name a layer with --layer"
        )
    effect = effects(frames, ["layer"]).groupby(["behavior", "layer"])["effect"].mean()
    return int(effect.div(spread, level="behavior").groupby("layer").mean().idxmax())


def chosen_layer(context: "Context") -> int:
    """Where single-layer experiments steer: at the layer that the settings name, else where validation pairs say."""
    config = context.config
    if config.layer is not None:
        return config.layer
    return int(context.once("layer", "", lambda: best_layer(context.folder.frames(EXPERIMENT.name, units(config)))))


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves_by_metric

    chosen, n_layers = best_layer(frames), next(iter(frames.values())).attrs["n_layers"]
    n_pairs = {unit["behavior"]: frame["question"].nunique() for unit, frame in frames.items()}
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="Each layer's vector at -1 and +1 on validation pairs: vectors are made from others, and all other "
        "experiments report others. Here the chosen layer's effect is flattered by having been chosen.",
        found=[
            f"Largest effect over all behaviors, in standard deviations of the unsteered scores: layer {chosen} "
            f"({chosen / max(1, n_layers - 1):.0%} of the depth). Single-layer experiments of this run steer there. "
            f"Validation pairs: {', '.join(f'{name} {n}' for name, n in n_pairs.items())}."
        ],
        figures=curves_by_metric(
            layer_effects(frames),
            effect=True,
            x="layer",
            by="behavior",
            title="Effect of +1 against -1 on validation pairs, 95 % interval",
            label="layer (0-based block)",
            mark=chosen,
        ),
    )


def cost(unit: Unit, context: "Context") -> Cost:
    there = context.folder.vectors_file(unit["behavior"]).exists()
    n_layers = context.n_layers if there else depth_of(context.config.model, fetch=False) or 32
    n_swept = -(-n_layers // context.config.layer_step)
    return scoring_cost(_validation(unit, context), 2 * n_swept + 1, depth=0.5)


EXPERIMENT = Experiment(
    name="layer_choice",
    title="The layer, chosen on validation pairs",
    source="Validation",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=lambda config: ("vectors",),
    skip=skip,
)
