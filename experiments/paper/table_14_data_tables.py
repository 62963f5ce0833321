"""What the run's data are: sizes, letters, system prompts.

    python -m experiments data_tables --model demo

The paper gives its sets' sizes and its system prompts (Table 14) in the appendix; nothing is expected, but that ours
agree. No model is used.
"""

from typing import TYPE_CHECKING

from experiments.paper.table_3_system_prompts import SIDES, system_prompt
from experiments.paper.table_3_system_prompts import units as with_system_prompts
from experiments.running.behavior_sets import behavior_sets
from experiments.running.comparison import beside_the_paper, has_paper_numbers
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig


def units(config: "RunConfig") -> list[Unit]:
    return [Unit.of(table="sizes"), Unit.of(table="prompts")]


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    import pandas as pd

    config = context.config
    if unit["table"] == "sizes":
        rows = []
        for behavior in config.behaviors:
            sets = behavior_sets(config, behavior)
            for split, pairs in (("generate", sets.generate), ("test", sets.test)):
                letters = ", ".join(f"{letter} {n}" for letter, n in sorted(pairs.letter_counts.items()))
                row = {"behavior": behavior, "split": split, "pairs": len(pairs), "kind": pairs.kind}
                rows.append(row | {"positive letters": letters, "hash": pairs.content_hash[:12]})
        return pd.DataFrame(rows)
    rows = []
    for behavior in dict.fromkeys(u["behavior"] for u in with_system_prompts(config)):
        rows += [(behavior, side, system_prompt(config, behavior, side) or "") for side in SIDES[:2]]
    return pd.DataFrame(rows, columns=["behavior", "side", "system prompt"])


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section

    sizes, prompts = frames.values()
    tables = [("Contrast sets of this run", sizes), ("System prompts", prompts)]
    if has_paper_numbers("dataset_sizes", config):
        ours = sizes[["behavior", "split"]].assign(mean=sizes["pairs"].astype(float))
        beside = beside_the_paper(ours.assign(low=ours["mean"], high=ours["mean"]), "dataset_sizes", config)
        tables.insert(
            1, ("Sizes beside the paper's", beside.drop(columns=["95 % low", "95 % high", "paper within interval"]))
        )
    return Section(title=EXPERIMENT.title, source=EXPERIMENT.source, tables=tables)


EXPERIMENT = Experiment(
    name="data_tables",
    title="Data and prompts",
    source="Appendix, Table 14",
    units=units,
    run=run,
    section=section,
)
