"""Steering vectors of every behavior, at every layer: what all other experiments use.

    python -m experiments vectors --model demo

Paper: section 3. The mean over contrast pairs of `resid_post` at the answer letter (of full completions: averaged over
their tokens), positive minus negative. Kept in the run folder as extracted; all evaluations use them rescaled, layer by
layer, to the mean norm over the run's behaviors. Expected of any model: norms that grow with depth.
"""

from typing import TYPE_CHECKING

from caa_lens.models.loading.fingerprint import file_digest
from experiments.running.costs import Cost, reading_cost
from experiments.running.experiment import Experiment
from experiments.running.run_folder import FILE_HASH
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig


def units(config: "RunConfig") -> list[Unit]:
    return [Unit.of(behavior=behavior) for behavior in config.behaviors]


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    return extract_into_run(context, unit["behavior"], context.model)


def extract_into_run(context: "Context", behavior: str, model: object, which: str = "") -> "pd.DataFrame":
    """Extract one behavior's vectors, keep them in the run folder, and tell their norms by layer."""
    import pandas as pd

    from caa_lens.vectors.extraction import extract

    pairs = context.sets(behavior).generate
    vectors = extract(model, pairs, progress=False)
    file = vectors.save(context.folder.vectors_file(behavior, which))
    frame = pd.DataFrame({"layer": vectors.layers, "norm": vectors.norms.to_numpy(), "n_pairs": len(pairs)})
    frame.attrs["dataset_hash"] = vectors.provenance.dataset_hash
    frame.attrs["prompt_format"] = vectors.provenance.prompt_format
    frame.attrs[FILE_HASH] = file_digest(file)
    return frame


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves

    norms = together(frames)
    pairs = norms.groupby("behavior", sort=False)["n_pairs"].first().reset_index()
    formats = {unit["behavior"]: frame.attrs.get("prompt_format", "unknown") for unit, frame in frames.items()}
    pairs["prompt format"] = pairs["behavior"].map(formats)
    figure = curves(
        norms, x="layer", y="norm", by="behavior", title="Norm of the vectors", labels=("layer (0-based block)", "norm")
    )
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="The mean difference of the residual stream between matching and non-matching answers. Evaluations use "
        "the vectors rescaled to the mean norm over behaviors at each layer.",
        figures=[figure],
        tables=[("Pairs that each vector is extracted from, and in which prompt format", pairs)],
    )


def cost(unit: Unit, context: "Context") -> Cost:
    return reading_cost(context.sets(unit["behavior"]).generate)


EXPERIMENT = Experiment(
    name="vectors",
    title="Steering vectors",
    source="Section 3",
    units=units,
    run=run,
    section=section,
    cost=cost,
)
