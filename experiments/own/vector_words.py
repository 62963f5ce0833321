"""Which tokens do the vectors say?

    python -m experiments vector_words --model demo

Asked: the tokens that each layer's vector promotes and suppresses most: through the final norm as if the vector were
the stream (`normed`), and as the change it makes to real residuals (`in_context`). The paper reads the model's own
layers through the logit lens; the tables of its vectors' words are the authors' repository's. Expected of a small
model: words of the behavior at late layers, word pieces below.
"""

from typing import TYPE_CHECKING

from experiments.running.costs import Cost, reading_cost
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

K = 8
N_PAIRS = 10  # whose residuals `in_context` reads
SHOWN_LAYERS = 6


def units(config: "RunConfig") -> list[Unit]:
    return [Unit.of(behavior=b, reading=reading) for b in config.behaviors for reading in ("normed", "in_context")]


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    from caa_lens.interpretation.lens import logit_lens

    test = context.sets(unit["behavior"]).test
    return logit_lens(
        context.model,
        context.vectors(unit["behavior"]),
        k=K,
        layers=[*context.swept_layers[:-1], context.n_layers - 1],
        reading=unit["reading"],
        pairs=test.sample(min(N_PAIRS, len(test)), seed=context.config.seed),
    ).frame


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section

    tables = []
    for unit, frame in frames.items():
        layers = sorted(set(frame["layer"]))
        shown = layers[:: -max(1, len(layers) // SHOWN_LAYERS)]
        top = frame[frame["layer"].isin(shown)]
        joined = top.groupby(["layer", "side"])["token"].agg("  ".join).unstack("side").reset_index()
        joined.columns.name = None
        tables.append((f"{unit['behavior']}, {unit['reading'].replace('_', ' ')}", joined))
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"The {K} tokens that a layer's vector promotes and suppresses most: read as if it were the stream "
        "(normed), and as the change it makes to real residuals (in context).",
        tables=tables,
    )


def cost(unit: Unit, context: "Context") -> Cost:
    test = context.sets(unit["behavior"]).test
    if unit["reading"] == "normed":
        return Cost()
    return reading_cost(test.sample(min(N_PAIRS, len(test)), seed=context.config.seed))


EXPERIMENT = Experiment(
    name="vector_words",
    title="What the vectors say",
    source="Logit lens",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=lambda config: ("vectors",),
)
