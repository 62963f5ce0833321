"""At which layer does a vector move the answers most?

    python -m experiments layer_sweep --model demo

Asked: every layer's vector at -1 and +1. The paper (Figure 3) finds a peak at layer 13 and its neighbours (7B), at 14
and 15 (13B), and little elsewhere. Expected of a small model scored by full completions: a broad effect over the later
half, since every token of a completion is steered and a late layer acts on words directly.

Each behavior's best layer is told with the effect that choosing it has on questions that did not choose it. Where
single-layer experiments steer, `layer_choice` says.
"""

from typing import TYPE_CHECKING

from experiments.paper.layer_choice import units
from experiments.running.beforehand import n_layers as depth_of
from experiments.running.costs import Cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.scores import UNSTEERED, best_layer_told, best_layers, layer_effects, means, swept
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    return swept(context, unit["behavior"], context.sets(unit["behavior"]).test)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves_by_metric

    effect, best = layer_effects(frames), best_layers(frames)
    levels = means(frames, ["layer", "multiplier"])
    steered_levels = levels[levels["layer"] != UNSTEERED].drop(columns=["low", "high"])
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="Each layer's vector at -1 and +1. Paper: a narrow peak at layer 13 (7B) or 14 and 15 (13B), about "
        "two fifths of the depth, and little elsewhere.",
        found=[best_layer_told(row) for row in best.itertuples()],
        figures=[
            *curves_by_metric(
                effect,
                effect=True,
                x="layer",
                by="behavior",
                title="Effect of +1 against -1, 95 % interval",
                label="layer (0-based block)",
                mark=config.layer,
            ),
            *curves_by_metric(
                steered_levels,
                x="layer",
                by="behavior",
                signed="multiplier",
                title="Score at -1 and +1",
                label="layer (0-based block)",
            ),
        ],
        tables=[
            ("The layer of each behavior's largest effect (+1 minus -1), and the effect of choosing it, by folds", best)
        ],
    )


def cost(unit: Unit, context: "Context") -> Cost:
    there = context.folder.vectors_file(unit["behavior"]).exists()
    n_layers = context.n_layers if there else depth_of(context.config.model, fetch=False) or 32
    n_swept = -(-n_layers // context.config.layer_step)
    return scoring_cost(context.sets(unit["behavior"]).test, 2 * n_swept + 1, depth=0.5)


EXPERIMENT = Experiment(
    name="layer_sweep",
    title="Effect by layer",
    source="Figure 3",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=lambda config: ("vectors",),
)
