"""Does one layer's vector work at other layers?

    python -m experiments vector_transfer --model demo

Asked: the chosen layer's normalised vector, as long as it is, added at every other layer at -1 and +1. The paper
(Figure 8, refusal, layer 13 of 7B) finds that it works at other layers, at some earlier ones even better, and drops
steeply around 17. Expected of a small model: the same. The matrix of all layers by all is `python
experiments/own/transfer_across_layers.py`.
"""

from typing import TYPE_CHECKING

from experiments.paper.figure_3_layer_sweep import cost as sweep_cost
from experiments.paper.layer_choice import chosen_layer, needs_layer, units
from experiments.running.comparison import paper_tables
from experiments.running.experiment import Experiment
from experiments.running.scores import best_layers, layer_effects, means, scored, steered
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    source = chosen_layer(context)
    vector = context.vectors(unit["behavior"])[source]
    targets = sorted({*context.swept_layers, source})
    cells = [
        ({"source": source, "layer": layer, "multiplier": m}, steered(vector.at_layer(layer), m))
        for layer in targets
        for m in (-1.0, 1.0)
    ]
    return scored(context.model, context.sets(unit["behavior"]).test, cells)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves_by_metric

    source = int(together(frames)["source"].iloc[0])
    effect = layer_effects(frames)
    of_own = effect[effect["layer"] == source].set_index("behavior")
    found = []
    for best in best_layers(frames).itertuples():
        own = of_own.loc[best.behavior]
        worth = f"{best.effect:+.3f} [{best.low:.3f}, {best.high:.3f}] on questions that did not choose it"
        found.append(
            f"{best.behavior}: effect {own['mean']:+.3f} [{own['low']:.3f}, {own['high']:.3f}] at its own layer "
            f"{source}, largest at layer {best.layer}{f', {worth}' if best.effect == best.effect else ''}."
        )
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"The layer-{source} vector added at other layers, at -1 and +1. Paper: it works at other layers, at some "
        "earlier ones even better, and drops steeply around layer 17 (7B).",
        found=found,
        figures=curves_by_metric(
            effect,
            effect=True,
            x="layer",
            by="behavior",
            title=f"Effect of layer {source}'s vector, +1 against -1, 95 % interval",
            label="added at layer (0-based block)",
            mark=source,
        ),
        tables=paper_tables(means(frames, ["layer", "multiplier"]), "layer_transfer", config),
    )


EXPERIMENT = Experiment(
    name="vector_transfer",
    title="One layer's vector at other layers",
    source="Figure 8",
    units=units,
    run=run,
    section=section,
    cost=sweep_cost,
    needs=needs_layer,
)
