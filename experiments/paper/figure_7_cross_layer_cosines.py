"""Are the vectors of neighbouring layers alike?

    python -m experiments cross_layer_cosines --model demo

Asked: the cosine of every layer's vector with every layer's, as extracted. The paper (Figure 7) finds nearby layers
alike, and similarity that decays more slowly in the second half. Expected of any model: the first; the second is to be
seen.
"""

from typing import TYPE_CHECKING

from experiments.paper.layer_choice import units
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

DISTANCES = (1, 3, 6)


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    from dataclasses import asdict

    from caa_lens.interpretation.vector_cosines import cosines

    found = cosines(context.raw_vectors(unit["behavior"]))
    frame = found.frame.copy()
    frame.attrs["vectors"] = asdict(found.provenance["vectors"])
    return frame


def decay(cosines: "pd.DataFrame") -> "pd.DataFrame":
    """Mean cosine at some distances, where both layers lie in the first or in the second half of the depth."""
    import pandas as pd

    middle = (cosines["layer"].max() + 1) / 2
    rows = []
    for half, inside in (("first", cosines["other_layer"] < middle), ("second", cosines["layer"] >= middle)):
        apart = cosines["other_layer"] - cosines["layer"]
        means = {
            f"{d} apart": cosines.loc[inside & (apart == d), "cosine"].mean()
            for d in DISTANCES
            if (inside & (apart == d)).any()
        }
        rows.append({"half": half, **means})
    return pd.DataFrame(rows)


def section(frames: Frames, config: "RunConfig") -> "Section":
    import pandas as pd

    from caa_lens.plots.geometry import cosine_heatmap
    from caa_lens.provenance import Provenance, label
    from caa_lens.report.page import Section

    tables = {unit["behavior"]: decay(frame) for unit, frame in frames.items()}
    found = []
    for behavior, table in tables.items():
        first, second = table.iloc[:, -1]
        how = "decays" if second > first else "does not decay"
        found.append(
            f"{behavior}: similarity {how} more slowly in the second half (mean cosine of layers {table.columns[-1]}: "
            f"{first:.2f} in the first half, {second:.2f} in the second)."
        )
    joined = pd.concat([table.assign(behavior=name) for name, table in tables.items()], ignore_index=True)
    joined.insert(0, "behavior", joined.pop("behavior"))
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="Cosine of unnormalised vectors, layer by layer. Paper: nearby layers are alike, and similarity decays "
        "more slowly in the second half.",
        found=found,
        figures=[cosine_heatmap(frame, of=label(Provenance(**frame.attrs["vectors"]))) for frame in frames.values()],
        tables=[("Mean cosine by distance", joined)],
    )


EXPERIMENT = Experiment(
    name="cross_layer_cosines",
    title="Vectors of different layers",
    source="Figure 7",
    units=units,
    run=run,
    section=section,
    needs=lambda config: ("vectors",),
)
