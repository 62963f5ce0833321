"""From which layer on do matching and non-matching answers lie apart?

    python -m experiments contrast_pca --model demo

Asked: two principal components of both sides' activations at the answer letter, by layer, and a probe's accuracy on
held-out pairs. The paper (Figure 2, refusal, 7B) sees letters cluster at all layers, and the behavior separate
suddenly at layer 10, about a third of the depth. Only A/B sets are read: full completions part at every layer by their
words alone. Expected of a small model: the same order of events, later in the depth and less clean.
"""

from typing import TYPE_CHECKING

from experiments.running.behavior_sets import behavior_sets
from experiments.running.costs import Cost, reading_cost
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig


def units(config: "RunConfig") -> list[Unit]:
    lettered = [b for b in config.behaviors if behavior_sets(config, b).generate.kind == "ab"]
    return [Unit.of(behavior=behavior, what=what) for behavior in lettered for what in ("pca", "separability")]


def skip(config: "RunConfig") -> str | None:
    return None if units(config) else "none of the behaviors has A/B pairs, whose letters it reads"


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    from dataclasses import asdict

    from caa_lens.engine.pair_reading import pair_activations
    from caa_lens.interpretation.pair_geometry import pair_pca, pair_separability

    pairs = context.sets(unit["behavior"]).generate
    layers = context.swept_layers
    activations = context.once(
        "activations",
        unit["behavior"],
        lambda: pair_activations(context.model, pairs, layers=layers, progress=False),
    )
    if unit["what"] == "pca":
        n_panels = 8 if len(layers) >= 16 else 4  # whole rows of the figure
        frame = pair_pca(activations, layers=layers[:: -(-len(layers) // n_panels)]).frame
    else:
        found = pair_separability(activations, seed=context.config.seed, progress=False)
        frame = found.frame.copy()
        frame.attrs |= {"emergence": found.emergence, "chance": found.chance}
    frame.attrs["n_layers"] = context.n_layers
    frame.attrs["activations"] = asdict(activations.provenance)
    return frame


def section(frames: Frames, config: "RunConfig") -> "Section":
    import pandas as pd

    from caa_lens.interpretation.pair_geometry import PairPCA, PairSeparability
    from caa_lens.provenance import Provenance
    from caa_lens.report.page import Section

    figures, found, rows = [], [], []
    for unit, frame in frames.items():
        about = {"activations": Provenance(**frame.attrs["activations"])}
        if unit["what"] == "pca":
            figures.append(PairPCA(frame=frame, provenance=about).plot())
            continue
        emergence, chance = frame.attrs["emergence"], frame.attrs["chance"]
        figures.append(PairSeparability(frame=frame, emergence=emergence, chance=chance, provenance=about).plot())
        best = frame.loc[frame["accuracy"].idxmax()]
        deepest = max(1, frame.attrs["n_layers"] - 1)
        where = "at no layer" if emergence is None else f"at layer {emergence} ({emergence / deepest:.0%} of the depth)"
        found.append(
            f"{unit['behavior']}: the sides become separable {where}; held-out accuracy is largest at layer "
            f"{best['layer']:.0f}, {best['accuracy']:.2f}, which was chosen on these pairs; chance {chance:.2f}."
        )
        rows.append({"behavior": unit["behavior"], "emerges at": "" if emergence is None else emergence, **best})
    table = pd.DataFrame(rows).drop(columns=["explained", "silhouette"]).astype({"layer": int})
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="Activations at the answer letter; colour is the side, the marker's shape the letter. Paper: letters "
        "cluster everywhere, the behavior separates suddenly at about a third of the depth (layer 10 of 7B).",
        found=found,
        figures=figures,
        tables=[("A probe on held-out pairs, at the layer where it is best on these pairs", table)],
    )


def cost(unit: Unit, context: "Context") -> Cost:
    if unit["what"] == "separability":  # on the activations that were read for the other
        return Cost(tokens=0.5 * reading_cost(context.sets(unit["behavior"]).generate).tokens)
    return reading_cost(context.sets(unit["behavior"]).generate)


EXPERIMENT = Experiment(
    name="contrast_pca",
    title="Where the behavior separates",
    source="Figure 2",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=lambda config: ("vectors",),
    skip=skip,
)
