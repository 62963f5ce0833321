"""Which method steers most at the same side effects?

    python -m experiments compare_methods --model demo --behaviors sentiment,formality --n-test 24
    python -m experiments compare_methods --model meta-llama/Llama-2-7b-chat-hf

Asked: CAA, the methods beside it and three controls on the same pairs, by the rules of `caa_lens.compare`: effect
against divergence on neutral prompts, choices on a part of the pairs, one look at the test part. Beside the run's
behaviors there is one that a text is checked for without a judge: answers in upper case. The paper compares CAA with
system prompts and finetuning alone. Where all pairs are used (`--size paper`), methods act at their original positions
too, all settings are finer, and the steered text of every strength is looked at.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from experiments.paper.table_3_system_prompts import OF_BUNDLED
from experiments.running.costs import Cost, generation_cost, reading_cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

UPPER_CASE = "upper case"
METHODS = ("CAA", "ActAdd", "Linear-AcT", "instruction", "BiPO", "SADI", "InferAligner")
ORIGINALS = ("ActAdd, original", "Linear-AcT, original", "instruction, original", "BiPO, original", "SADI, original")
UPPER_CASE_WORDS = ("Write your whole answer in capital letters.", "Write your answer in lower case letters.")
# Capitals are another token at every place, which costs more than the budgets of a tone; so both are asked for.
UPPER_CASE_BUDGETS, UPPER_CASE_AT = (0.05, 0.1, 0.3, 1.0, 3.0), 1.0
SMALL: dict[str, Any] = {
    "depths": (0.5, 0.7),
    "validation": 0.2,
    "n_choosing": 6,
    "n_tokens": 16,
    "steered_text": "chosen",
    "training": {"epochs": 2, "batch_size": 2},
    "methods": METHODS,
}
WHOLE: dict[str, Any] = {
    "depths": (0.3, 0.4, 0.5, 0.6, 0.7),
    "validation": 0.2,
    "n_choosing": 10,
    "n_tokens": 32,
    "steered_text": "all",
    "training": {"epochs": 10},
    "methods": (*METHODS, *ORIGINALS),
}


def settings(config: "RunConfig") -> dict[str, Any]:
    """The whole comparison where all pairs are used, else what a laptop does."""
    return WHOLE if config.n_generate is None else SMALL


def units(config: "RunConfig") -> list[Unit]:
    known = [b for b in config.behaviors if config.data == "paper" or b in OF_BUNDLED]
    return [Unit.of(behavior=behavior) for behavior in (*known, UPPER_CASE)]


def words(config: "RunConfig", behavior: str) -> tuple[str, str]:
    """The instruction for more of a behavior and for less of it."""
    if behavior == UPPER_CASE:
        return UPPER_CASE_WORDS
    if config.data == "paper":
        from caa_lens.paper.numbers import SYSTEM_PROMPTS

        return SYSTEM_PROMPTS[behavior]["positive"], SYSTEM_PROMPTS[behavior]["negative"]
    return OF_BUNDLED[behavior]


def sets(config: "RunConfig", behavior: str) -> "tuple[ContrastSet, ContrastSet]":
    """Pairs to fit and choose on, and to test on; of upper case the shortest formal answers, in capitals and as are."""
    from caa_lens.contrast.sets import ContrastSet
    from experiments.running.behavior_sets import behavior_sets

    if behavior != UPPER_CASE:
        found = behavior_sets(config, behavior)
        return found.generate, found.test
    formal = sorted(ContrastSet.load("formality"), key=lambda pair: len(pair.positive))
    n = len(formal) if config.n_generate is None else config.n_generate + config.n_test
    rows = [(pair.question, pair.positive.upper(), pair.positive) for pair in formal[:n]]
    return ContrastSet.from_pairs(rows, name=UPPER_CASE).split(test=config.n_test, seed=config.seed)


def share_of_capitals(text: str) -> float:
    """Capitals among the letters of a text; 0 of a text without letters."""
    letters = [one for one in text if one.isalpha()]
    return sum(map(str.isupper, letters)) / len(letters) if letters else 0.0


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    from caa_lens.measures.elsewhere.neutral import CHOOSING, REPORTING
    from caa_lens.methods.comparing import compare

    config, how = context.config, settings(context.config)
    train, test = sets(config, unit["behavior"])
    depth = context.model.cfg.n_layers - 1
    own: dict[str, Any] = {}
    if unit["behavior"] == UPPER_CASE:
        own = {"budgets": UPPER_CASE_BUDGETS, "choose_at": UPPER_CASE_AT, "check": share_of_capitals}
    found = compare(
        context.model,
        train,
        test,
        how["methods"],
        words=words(config, unit["behavior"]),
        layers=sorted({round(share * depth) for share in how["depths"]}),
        validation=how["validation"],
        neutral=(CHOOSING[: how["n_choosing"]], REPORTING),
        n_tokens=how["n_tokens"],
        steered_text=how["steered_text"],
        bipo_options={**how["training"], "progress": False},
        progress=False,
        seed=config.seed,
        **own,
    )
    frame = found.frame
    frame.attrs |= {
        "choices": [asdict(one) for one in found.choices],
        "costs": [asdict(one) for one in found.costs],
        "metric": found.metric,
        "budgets": list(found.budgets),
        "n_neutral": found.n_neutral,
        "settings": dict(found.settings),
    }
    return frame


def comparison_of(frame: "pd.DataFrame") -> Any:
    """The comparison that a unit's frame is of."""
    from caa_lens.methods.compared import Choice, Comparison
    from caa_lens.methods.costs import Cost as MethodCost

    about = frame.attrs
    return Comparison(
        frame=frame,
        choices=tuple(Choice(**{**one, "tried": tuple(map(tuple, one["tried"]))}) for one in about["choices"]),
        costs=tuple(MethodCost(**one) for one in about["costs"]),
        metric=about["metric"],
        budgets=tuple(about["budgets"]),
        n_neutral=about["n_neutral"],
        settings=about["settings"],
    )


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.comparisons import comparison_tables, differences
    from caa_lens.report.page import Section

    found: list[str] = []
    figures, tables = [], []
    for unit, frame in frames.items():
        result = comparison_of(frame)
        found += [f"{unit['behavior']}: {sentence}" for sentence in differences(result)]
        figures.append(result.plot())
        tables += [(f"{unit['behavior']}: {caption}", table) for caption, table in comparison_tables(result)]
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="Effect on held-out questions against the mean divergence by token on neutral prompts that no method was "
        "fitted or chosen on. Intervals are 95 %, over questions. Where a method ends before a budget, its end stands.",
        found=found,
        figures=figures,
        tables=tables,
    )


def cost(unit: Unit, context: "Context") -> Cost:
    """Of choosing, reporting and steered text; eight strengths and the random direction beside the methods."""
    from caa_lens.measures.elsewhere.neutral import REPORTING

    config, how = context.config, settings(context.config)
    train, test = sets(config, unit["behavior"])
    n_methods, n_strengths = len(how["methods"]) + 1, 8
    n_choose = round(how["validation"] * len(train))
    choosing = scoring_cost(train[:n_choose], n_methods * n_strengths * len(how["depths"]), depth=0.5)
    n_texts = n_methods * (2 if how["steered_text"] == "chosen" else n_strengths)
    text = generation_cost(REPORTING, how["n_tokens"])
    total = choosing + scoring_cost(test, n_methods * n_strengths, depth=0.5)
    for one in (reading_cost(train),) * (2 * n_methods + 4 * how["training"]["epochs"] * len(how["depths"])):
        total += one
    return total + Cost(
        forwards=3 * n_texts * text.forwards, tokens=3 * n_texts * text.tokens, steps=n_texts * text.steps
    )


EXPERIMENT = Experiment(
    name="compare_methods",
    title="Methods at the same side effects",
    source="Methods",
    units=units,
    run=run,
    section=section,
    cost=cost,
    apart=True,  # as long as all others together
)
