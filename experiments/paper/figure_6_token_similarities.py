"""Which tokens look like the vector?

    python -m experiments token_similarities --model demo

Asked: the cosine of every token's residual stream with the behavior's vector at the chosen layer, in unsteered text:
(1) the model's own answers to open-ended prompts; (2) held-out answers that match the behavior beside those that do
not. The paper (Figure 6) shows refusing words positive and complying words negative. Expected of a small model: the
same, in (2), for behaviors whose vector steers.
"""

from typing import TYPE_CHECKING

from experiments.paper.layer_choice import chosen_layer, needs_layer
from experiments.running.behavior_sets import behavior_sets
from experiments.running.costs import Cost, generation_cost, tokens_of
from experiments.running.experiment import Experiment
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.pair import ContrastPair
    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

N_PAIRS = 10
N_PROMPTS = 2


def units(config: "RunConfig") -> list[Unit]:
    return [
        Unit.of(behavior=behavior, texts=texts)
        for behavior in config.behaviors
        for texts in ("answers", "pairs")
        if texts == "pairs" or behavior_sets(config, behavior).open_ended
    ]


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    import pandas as pd

    from caa_lens.interpretation.similarity import token_similarity

    layer = chosen_layer(context)
    vector = context.vectors(unit["behavior"])[layer]
    frames = []
    for text, side, question, answer in _texts(unit, context):
        found = token_similarity(context.model, question, vector, answer=answer)
        part = found.frame.assign(piece=found.pieces, text=text, side=side)
        frames.append(part.assign(in_answer=part["position"] >= found.answer_start))
    return pd.concat(frames, ignore_index=True)


def _texts(unit: Unit, context: "Context") -> list[tuple[int, str, str, str]]:
    """(number, side, question, answer) of the texts to compare; read unsteered."""
    from caa_lens.steering.generation import generate

    sets = context.sets(unit["behavior"])
    if unit["texts"] == "pairs":
        return [
            (i, side, question(pair), pair.options.get(answer, answer))
            for i, pair in enumerate(sets.test.pairs[:N_PAIRS])
            for side, answer in (("matching", pair.positive), ("not matching", pair.negative))
        ]
    prompts = sets.open_ended[:N_PROMPTS]
    answers = generate(context.model, prompts, max_new_tokens=context.config.max_new_tokens)
    return [(i, "own", prompt, answer) for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]


def question(pair: "ContrastPair") -> str:
    """What is asked, without the options, which would show both answers."""
    return pair.question.split("\n\nChoices:")[0].split("\n (A)")[0]


def section(frames: Frames, config: "RunConfig") -> "Section":
    import numpy as np
    import pandas as pd

    from caa_lens.measures.intervals import bootstrap_interval
    from caa_lens.report.page import ColoredText, Section

    rows, found, tokens = [], [], []
    for unit, frame in frames.items():
        behavior, in_answer = unit["behavior"], frame[frame["in_answer"]]
        if unit["texts"] == "answers":
            bound = max(float(frame.loc[frame["position"] > 0, "cosine"].abs().max()), 1e-6)
            for text, part in frame.groupby("text"):
                part = part[part["position"] > 0]  # the first token is an attention sink in many models
                pieces = tuple(zip(part["piece"], part["cosine"].round(4).astype(float), strict=True))
                tokens.append(ColoredText(caption=f"{behavior}, prompt {text + 1}", tokens=pieces, bound=bound))
            continue
        each = in_answer.groupby(["text", "side"])["cosine"].mean().unstack("side")
        apart = (each["matching"] - each["not matching"]).to_numpy()
        (low,), (high,) = bootstrap_interval(apart[:, None], seed=config.seed)
        share = float(np.mean(apart > 0))
        rows.append(
            {
                "behavior": behavior,
                "matching": each["matching"].mean(),
                "not matching": each["not matching"].mean(),
                "difference": apart.mean(),
                "95 % low": low,
                "95 % high": high,
                "pairs where matching is larger": f"{share:.0%} of {len(apart)}",
            }
        )
        found.append(
            f"{behavior}: tokens of matching answers have a cosine {apart.mean():+.3f} [{low:.3f}, {high:.3f}] above "
            f"those of the other answer; larger in {share:.0%} of {len(apart)} pairs."
        )
    layer = int(next(iter(frames.values()))["layer"].iloc[0])
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"Cosine of each token's residual stream after layer {layer} with the vector, in unsteered text: blue "
        "along it, red against it. Paper: refusing words are positive, complying words negative.",
        found=found,
        tokens=tokens,
        tables=[("Mean cosine over the answer's tokens, in held-out answers", pd.DataFrame(rows))],
    )


def cost(unit: Unit, context: "Context") -> Cost:
    sets = context.sets(unit["behavior"])
    if unit["texts"] == "answers":
        prompts = sets.open_ended[:N_PROMPTS]
        return generation_cost(prompts, context.config.max_new_tokens) + Cost(
            forwards=len(prompts), tokens=tokens_of(prompts) + len(prompts) * context.config.max_new_tokens
        )
    pairs = sets.test.pairs[:N_PAIRS]
    return Cost(forwards=2 * len(pairs), tokens=2 * tokens_of(pair.question for pair in pairs))


EXPERIMENT = Experiment(
    name="token_similarities",
    title="Tokens like the vector",
    source="Figure 6",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=needs_layer,
)
