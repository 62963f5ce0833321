"""What does steered text look like?

    python -m experiments open_ended --model demo

Asked: greedy answers to open-ended prompts at multipliers -2 to 2, and measures that need no judge (sentiment,
repetition, perplexity under the unsteered model); `judged` has a judge's scores. The paper (Figure 5) finds scores that
rise with the multiplier, flat for refusal, and text that large multipliers degrade. Expected of a small model:
sentiment and formality follow the multiplier; at -2 and +2 text starts to repeat itself and is unlikely unsteered.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.paper.layer_choice import chosen_layer, needs_layer
from experiments.running.behavior_sets import behavior_sets
from experiments.running.costs import Cost, generation_cost
from experiments.running.experiment import Experiment
from experiments.running.identity import prompts_hash
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.prompts.prompt_formats import PromptFormat
    from caa_lens.report.page import Section
    from caa_lens.steering.generated_text import GeneratedText
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

MULTIPLIERS = (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
BATCH = 10  # prompts at a time
MEASURES = ("sentiment", "repetition", "distinct_2", "n_tokens", "mean_logp")
SHOWN_PROMPTS = 2


def units(config: "RunConfig") -> list[Unit]:
    asked = [behavior for behavior in config.behaviors if behavior_sets(config, behavior).open_ended]
    return [Unit.of(behavior=behavior, multiplier=m) for behavior in asked for m in MULTIPLIERS]


def skip(config: "RunConfig") -> str | None:
    return None if units(config) else "none of the behaviors has open-ended prompts"


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    from caa_lens.measures.open_ended.text_measures import measure_texts

    frame = answers(context.model, unit["behavior"], unit["multiplier"], context)
    return measure_texts(context.model, frame, progress=False)


def answers(
    model: Any, behavior: str, multiplier: float, context: "Context", *, prompt_format: "PromptFormat | None" = None
) -> "pd.DataFrame":
    """A model's steered answers to a behavior's prompts: `prompt, question, answer, cut, layer, multiplier`.

    Args:
        prompt_format: the model's own by default; of a copy of a model, give the original's.
    """
    import pandas as pd

    from caa_lens.steering.generation import generate

    layer = chosen_layer(context)
    vector, prompts = context.vectors(behavior)[layer], context.sets(behavior).open_ended
    texts: list[GeneratedText] = []
    for first in range(0, len(prompts), BATCH):
        texts += generate(
            model,
            prompts[first : first + BATCH],
            vectors=[(vector, multiplier)] if multiplier else [],
            max_new_tokens=context.config.max_new_tokens,
            prompt_format=prompt_format,
        )
    frame = pd.DataFrame({"prompt": range(len(prompts)), "question": prompts, "answer": list(map(str, texts))})
    frame["cut"] = [text.cut for text in texts]
    return frame.assign(layer=layer, multiplier=multiplier)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.figures import curves

    rows = together(frames)
    layer = int(rows["layer"].iloc[0])
    measured = rows.groupby(["behavior", "multiplier"], sort=False)[list(MEASURES)].mean().reset_index()
    labels = {"sentiment": "sentiment, -1 to 1", "repetition": "share of repeated 4-grams"}
    labels |= {"mean_logp": "mean log-probability, unsteered (nats per token)"}
    found = []
    for behavior, part in measured.groupby("behavior", sort=False):
        at = part.set_index("multiplier").loc[[-2.0, 0.0, 2.0]]
        low, unsteered, high = (f"{value:+.2f}" for value in at["sentiment"])
        found.append(
            f"{behavior}: sentiment {low} at -2, {unsteered} unsteered, {high} at +2; mean log-probability "
            f"{_counted(at['mean_logp'], '.2f')}; repeated 4-grams {_counted(at['repetition'], '.0%')}."
        )
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"Greedy answers with the layer-{layer} vector. Sentiment is of the text; log-probability is of the "
        "answer under the unsteered model. Paper: the behavior rises with the multiplier, large ones degrade text.",
        found=found,
        figures=[
            curves(
                measured,
                x="multiplier",
                y=measure,
                by="behavior",
                title=f"{measure.replace('_', ' ').replace('logp', 'log-probability')} of answers by multiplier",
                labels=("multiplier", label),
            )
            for measure, label in labels.items()
        ],
        texts=side_by_side(rows),
        tables=[("Mean over prompts", measured.round(4))],
    )


def _counted(values: "pd.Series", form: str) -> str:
    """Numbers in a sentence; NaN of answers that are too short to be measured."""
    return ", ".join("nothing to count" if value != value else f"{value:{form}}" for value in values)


def side_by_side(rows: "pd.DataFrame") -> list[tuple[str, list[tuple[str, str]]]]:
    """The first prompts' answers of each behavior, by multiplier."""
    groups = []
    for (behavior, prompt), part in rows.groupby(["behavior", "prompt"], sort=False):
        if prompt >= SHOWN_PROMPTS:
            continue
        part = part.sort_values("multiplier")
        answers = [
            (f"{row.multiplier:+g}" if row.multiplier else "unsteered", shown_answer(row))
            for row in part.itertuples(index=False)
        ]
        groups.append((f"{behavior}: {part['question'].iloc[0]}", answers))
    order = list(dict.fromkeys(rows["behavior"]))
    return sorted(groups, key=lambda group: order.index(group[0].split(":")[0]))


def shown_answer(row: Any) -> str:
    """An answer with an ellipsis where it was cut; frames of older runs do not say."""
    from caa_lens.steering.generated_text import shown

    return shown(row.answer, getattr(row, "cut", False))


def cost(unit: Unit, context: "Context") -> Cost:
    prompts, n_new = context.sets(unit["behavior"]).open_ended, context.config.max_new_tokens
    batches = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
    generated = sum((generation_cost(batch, n_new) for batch in batches), Cost())
    return generated + reading_again(prompts, n_new)


def reading_again(prompts: Sequence[str], n_new: int) -> Cost:
    """Prompts and answers in one pass, for the log-probabilities."""
    return Cost(forwards=len(prompts), tokens=generation_cost(prompts, n_new).tokens)


EXPERIMENT = Experiment(
    name="open_ended",
    title="Steered text",
    source="Figure 5",
    units=units,
    run=run,
    section=section,
    cost=cost,
    needs=needs_layer,
    skip=skip,
    own=prompts_hash,
)
