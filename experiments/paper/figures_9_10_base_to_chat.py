"""Are the base model's vectors those of the chat model, and do they steer it?

    python -m experiments base_cosines base_transfer --model meta-llama/Llama-2-7b-chat-hf

Asked: vectors extracted from the base model, in its own prompt format; their cosine with the chat model's, layer by
layer; and the chat model's answers under them at -1 and +1. The paper finds a cosine that decays with depth but for a
peak at layers 7 to 15 (Figure 9), and that the base vectors steer the chat model, best at layers 10 to 15 (Figure 10).
The base model is known of Llama 2's chat models; for others, name it with --base-model, or these are skipped (as for
the demo model, which has none in the package).
"""

from typing import TYPE_CHECKING

from experiments.paper.figure_3_layer_sweep import cost as sweep_cost
from experiments.paper.layer_choice import units
from experiments.paper.section_3_vectors import cost as extraction_cost
from experiments.paper.section_3_vectors import extract_into_run
from experiments.paper.section_3_vectors import section as norms_section
from experiments.running.comparison import paper_tables
from experiments.running.experiment import Experiment
from experiments.running.scores import best_layer_told, best_layers, layer_effects, means, scored, steered
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

BASE = "base-"


def skip(config: "RunConfig") -> str | None:
    return None if config.base_model else "needs the base model: give it with --base-model"


def own(config: "RunConfig") -> dict[str, str | None]:
    """The base model's name and contents.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: it cannot be had.
    """
    from caa_lens.models.loading.fingerprint import model_fingerprint

    assert config.base_model is not None  # else skipped
    try:
        return {"base_model": config.base_model, "base_model/sha256": model_fingerprint(config.base_model)}
    except OSError as error:  # all three are
        remedy = "give another with --base-model, or do without: --base-model none"
        raise type(error)(f"the base model: {error}; {remedy}") from None


def run_vectors(unit: Unit, context: "Context") -> "pd.DataFrame":
    return extract_into_run(context, unit["behavior"], context.base_model, BASE)


def section_vectors(frames: Frames, config: "RunConfig") -> "Section":
    from dataclasses import replace

    return replace(norms_section(frames, config), title=VECTORS.title, source=VECTORS.source)


def run_cosines(unit: Unit, context: "Context") -> "pd.DataFrame":
    from dataclasses import asdict

    from caa_lens.interpretation.vector_cosines import cosines

    base, chat = context.raw_vectors(unit["behavior"], BASE), context.raw_vectors(unit["behavior"])
    found = cosines(base, chat, same_layer=True)
    frame = found.frame.copy()
    frame.attrs |= {"d_model": found.d_model, "vectors": [asdict(base.provenance), asdict(chat.provenance)]}
    return frame


def section_cosines(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.interpretation.vector_cosines import Cosines
    from caa_lens.provenance import Provenance
    from caa_lens.report.page import Section

    figures, found = [], []
    for unit, frame in frames.items():
        base, chat = (Provenance(**about) for about in frame.attrs["vectors"])
        about = {"vectors": base, "other": chat}
        figures.append(Cosines(frame=frame, d_model=frame.attrs["d_model"], provenance=about).plot())
        peak = frame.loc[frame["cosine"].idxmax()]
        found.append(
            f"{unit['behavior']}: largest at layer {peak['layer']:.0f} ({peak['cosine']:.2f}), "
            f"{frame['cosine'].iloc[-1]:.2f} at the last layer."
        )
    return Section(
        title=COSINES.title,
        source=COSINES.source,
        text="Cosine of the same layer's vectors of the base and of the chat model. Paper: it decays with depth, but "
        "for a peak at layers 7 to 15 (7B).",
        found=found,
        figures=figures,
    )


def run_transfer(unit: Unit, context: "Context") -> "pd.DataFrame":
    vectors = context.vectors(unit["behavior"], BASE)
    cells = [
        ({"layer": layer, "multiplier": m}, steered(vectors[layer], m))
        for layer in context.swept_layers
        for m in (-1.0, 1.0)
    ]
    return scored(context.model, context.sets(unit["behavior"]).test, cells)


def section_transfer(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves_by_metric

    effect = layer_effects(frames)
    return Section(
        title=TRANSFER.title,
        source=TRANSFER.source,
        text="The base model's vectors, normalised across behaviors, in the chat model. Paper: they steer it, best at "
        "layers 10 to 15 (7B).",
        found=[best_layer_told(row) for row in best_layers(frames).itertuples()],
        figures=curves_by_metric(
            effect,
            effect=True,
            x="layer",
            by="behavior",
            title="Effect of the base model's vectors, +1 against -1, 95 % interval",
            label="layer (0-based block)",
        ),
        tables=paper_tables(means(frames, ["layer", "multiplier"]), "base_to_chat_transfer", config),
    )


VECTORS = Experiment(
    name="base_vectors",
    title="Steering vectors of the base model",
    source="Section 7",
    units=units,
    run=run_vectors,
    section=section_vectors,
    cost=extraction_cost,
    skip=skip,
    own=own,
)
COSINES = Experiment(
    name="base_cosines",
    title="Base and chat vectors",
    source="Figure 9",
    units=units,
    run=run_cosines,
    section=section_cosines,
    needs=lambda config: ("vectors", "base_vectors"),
    skip=skip,
    own=own,
)


TRANSFER = Experiment(
    name="base_transfer",
    title="Base vectors in the chat model",
    source="Figure 10",
    units=units,
    run=run_transfer,
    section=section_transfer,
    cost=sweep_cost,
    needs=lambda config: ("vectors", "base_vectors"),
    skip=skip,
    own=own,
)
