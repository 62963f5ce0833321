"""At which layer does a vector move the answers most?

    python -m experiments layer_sweep --model demo

Asked: every layer's vector at -1 and +1. The paper (Figure 3) finds a peak at layer 13 and its neighbours (7B), at 14
and 15 (13B), and little elsewhere. Expected of a small model scored by full completions: a broad effect over the later
half, since every token of a completion is steered and a late layer acts on words directly.

The best layer, which the single-layer experiments use where the paper does not name one, has the largest effect of +1
against -1, divided by the standard deviation of the unsteered scores so that probabilities and margins can be averaged
over behaviors. It is chosen on the same questions as all else, as in the paper.
"""

from typing import TYPE_CHECKING

from experiments.running.beforehand import n_layers as depth_of
from experiments.running.costs import Cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.scores import effects, means, scored, steered
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

UNSTEERED = -1  # the layer of the unsteered row


def units(config: "RunConfig") -> list[Unit]:
    return [Unit.of(behavior=behavior) for behavior in config.behaviors]


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    vectors = context.vectors(unit["behavior"])
    cells = [
        ({"layer": layer, "multiplier": m}, steered(vectors[layer], m))
        for layer in context.swept_layers
        for m in (-1.0, 1.0)
    ]
    unsteered = ({"layer": UNSTEERED, "multiplier": 0.0}, ())
    frame = scored(context.model, context.sets(unit["behavior"]).test, [unsteered, *cells])
    frame.attrs["n_layers"] = context.n_layers
    return frame


def needs_layer(config: "RunConfig") -> tuple[str, ...]:
    """What experiments need that steer at the chosen layer."""
    return ("vectors",) if config.layer is not None else ("vectors", "layer_sweep")


def best_layer(frames: Frames) -> int:
    """The layer with the largest effect, in standard deviations of the unsteered scores, averaged over behaviors."""
    rows = together(frames)
    spread = rows[rows["layer"] == UNSTEERED].groupby("behavior")["score"].std()
    effect = effects(frames, ["layer"]).groupby(["behavior", "layer"])["effect"].mean()
    return int(effect.div(spread, level="behavior").groupby("layer").mean().idxmax())


def chosen_layer(context: "Context") -> int:
    """Where single-layer experiments steer: at the layer that the settings name, else where this sweep is best."""
    config = context.config
    if config.layer is not None:
        return config.layer
    return int(context.once("layer", "", lambda: best_layer(context.folder.frames(EXPERIMENT.name, units(config)))))


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


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves_by_metric

    effect = layer_effects(frames)
    chosen = best_layer(frames)
    best = effect.loc[effect.groupby("behavior", sort=False)["mean"].idxmax()]
    table = best[["behavior", "metric", "layer", "mean", "low", "high"]].rename(
        columns={"layer": "best layer", "mean": "effect", "low": "95 % low", "high": "95 % high"}
    )
    n_layers = next(iter(frames.values())).attrs["n_layers"]
    steers_at = chosen if config.layer is None else config.layer
    levels = means(frames, ["layer", "multiplier"])
    steered_levels = levels[levels["layer"] != UNSTEERED].drop(columns=["low", "high"])
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="Each layer's vector at -1 and +1. Paper: a narrow peak at layer 13 (7B) or 14 and 15 (13B), about "
        "two fifths of the depth, and little elsewhere.",
        found=[
            f"Largest effect over all behaviors, in standard deviations of the unsteered scores: layer {chosen} "
            f"({chosen / max(1, n_layers - 1):.0%} of the depth). Single-layer experiments of this run steer at layer "
            f"{steers_at}.",
            *_shown(best),
        ],
        figures=[
            *curves_by_metric(
                effect,
                effect=True,
                x="layer",
                by="behavior",
                title="Effect of +1 against -1, 95 % interval",
                label="layer (0-based block)",
                mark=steers_at,
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
        tables=[("The layer of each behavior's largest effect (+1 minus -1)", table)],
    )


def _shown(best: "pd.DataFrame") -> list[str]:
    lines = []
    for row in best.itertuples():
        verdict = "excludes" if row.low > 0 or row.high < 0 else "includes"
        lines.append(
            f"{row.behavior}: largest at layer {row.layer}, {row.mean:+.3f} (95 % interval {row.low:.3f} to "
            f"{row.high:.3f}, which {verdict} 0)."
        )
    return lines


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
