"""Does steering add to finetuning?

    python -m experiments finetuning --model demo
    python -m experiments finetuning --model meta-llama/Llama-2-7b-chat-hf --finetune lora --out runs/7b-lora

Asked: the model is taught, for one epoch over the pairs that vectors are made from, to answer with the positive
letter or with the negative one (cross-entropy on the letter alone, plain SGD at 1e-4, one question a step). How many
held-out questions does it answer as taught? And what does the original model's vector add at -1, 0 and 1? The paper
(Tables 4, 10 and 13; 7B chat) finds that 64 to 100 % are answered as taught, but for sycophancy's positive letters (44
%), and that steering still adds to it both ways for three of the seven behaviors. Expected of a small model: little of
either. It learns to give one letter whatever the question, and larger rates make it swing between A and B without
learning which is right.

The taught models also answer the open-ended prompts, at the same multipliers; `finetuned_text` has what became of it.

`--finetune lora` trains rank-8 adapters on the attention's projections with Adam (through `peft`), and merges them into
the weights before anything is measured. Full finetuning needs room for weights and gradients: 54 GB for 7B in float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.comparison import beside_the_paper, grid, has_paper_numbers, paper_tables
from experiments.experiment import Cost, Experiment, Frames, Unit, together
from experiments.identity import prompts_hash
from experiments.layer_sweep import needs_layer
from experiments.measures import means, scored, steered
from experiments.open_ended import BATCH, answers
from experiments.plan import BYTES, generation_cost, reading_cost, scoring_cost

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast import ContrastSet
    from caa_lens.report import Section
    from experiments.context import Context
    from experiments.run_folder import RunFolder
    from experiments.settings import RunConfig

SIDES = ("positive", "negative")
MULTIPLIERS = (-1.0, 0.0, 1.0)
RATE = 1e-4  # the paper's
LORA_RANK, LORA_RATE = 8, 2e-4

Lesson = tuple[list[int], int]  # the tokens up to the letter, and the letter's id


def units(config: "RunConfig") -> list[Unit]:
    from experiments.behavior_sets import behavior_sets

    by_letter = [b for b in config.behaviors if behavior_sets(config, b).generate.kind == "ab"]
    return [Unit.of(behavior=behavior, finetune=side) for behavior in by_letter for side in SIDES]


def skip(config: "RunConfig") -> str | None:
    return None if units(config) else "none of the behaviors is answered by letter"


def own(config: "RunConfig") -> dict[str, str]:
    return {"finetune": config.finetune, **prompts_hash(config)}


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    import pandas as pd

    sets = context.sets(unit["behavior"])
    model = taught(context, unit)
    vector = context.vectors(unit["behavior"])[context.layer]
    cells = [({"layer": context.layer, "multiplier": m}, steered(vector, m)) for m in MULTIPLIERS]
    frame = scored(model, sets.test, cells)
    if sets.open_ended:  # now, as the model is gone when the unit is done
        texts = pd.concat([answers(model, unit["behavior"], m, context) for m in MULTIPLIERS], ignore_index=True)
        context.folder.write_frame(answers_file(context.folder, unit), texts)
    return frame


def answers_file(folder: "RunFolder", unit: Unit) -> Path:
    """Where a taught model's open-ended answers lie, written before its unit is done."""
    return folder.artefacts(EXPERIMENT.name) / f"answers-{unit.name}.parquet"


def taught(context: "Context", unit: Unit) -> Any:
    """A copy of the run's model after an epoch on the letters of the unit's behavior and side."""
    import numpy as np

    config, pairs, side = context.config, context.sets(unit["behavior"]).generate, unit["finetune"]
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    context.release()  # one model in memory at a time
    if config.finetune == "lora":
        lessons = letters_of(context.model, pairs, side)
        folder, device = weights_folder(config.model), context.model.W_E.device
        context.release()
        with context.folder.scratch(EXPERIMENT.name, unit) as scratch:
            teach_lora(folder, [lessons[i] for i in order], scratch, device=device, seed=config.seed)
            return context.load(str(scratch))
    model = context.load(config.model)
    lessons = letters_of(model, pairs, side)
    teach(model, [lessons[i] for i in order], rate=RATE)
    return model


def letters_of(model: Any, pairs: "ContrastSet", side: str) -> list[Lesson]:
    """For every pair the prompt up to the opening bracket, and one side's letter."""
    from caa_lens.prompts import encode_letters, resolve_format

    lessons = []
    for pair in pairs:
        letters = (pair.positive[1], pair.negative[1])
        prompt, ids = encode_letters(resolve_format(model, None), model.tokenizer, pair.question, letters)
        lessons.append((list(prompt.tokens), ids[SIDES.index(side)]))
    return lessons


def teach(model: Any, lessons: Sequence[Lesson], *, rate: float) -> list[float]:
    """One epoch of SGD on -log p(letter), one lesson a step, in place; returns the losses."""
    import torch

    parameters = [parameter.requires_grad_(True) for parameter in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    losses = []
    with torch.enable_grad():
        for tokens, letter in lessons:
            logits = model(torch.tensor([tokens], device=parameters[0].device))
            losses.append(_step(logits, letter, optimizer))
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return losses


def teach_lora(folder: Path, lessons: Sequence[Lesson], out: Path, *, device: Any, seed: int) -> list[float]:
    """One epoch of Adam on rank-8 adapters; the merged model is written to `out` with its tokenizer."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'caa-lens[finetune]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)  # of the adapters' first values
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=projections, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LORA_RATE)
    losses = []
    with torch.enable_grad():
        for tokens, letter in lessons:
            logits = adapted(input_ids=torch.tensor([tokens], device=device)).logits
            losses.append(_step(logits, letter, optimizer))
    adapted.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return losses


def _step(logits: Any, letter: int, optimizer: Any) -> float:
    loss = -logits[0, -1].float().log_softmax(-1)[letter]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def weights_folder(model: str) -> Path:
    """Where `transformers` finds the model that `load_model` loads by this name.

    Raises:
        ValueError: for a GGUF file.
    """
    from caa_lens.loading.demo_model import demo_model_path
    from caa_lens.loading.hub import CONFIG_FILES, WEIGHT_FILES, download

    if model == "demo":
        return demo_model_path()
    if Path(model).is_dir():
        return Path(model)
    if Path(model).suffix == ".gguf":
        raise ValueError(f"adapters are trained on a folder with safetensors, got {model}: use --finetune full")
    return download(model, CONFIG_FILES + WEIGHT_FILES, None)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report import Section

    layer = int(together(frames)["layer"].iloc[0])
    cells = means(frames, ["layer", "finetune", "multiplier"])
    tables = [("Mean p(matching) and 95 % interval", grid(cells, ["behavior", "finetune"], "multiplier"))]
    if config.finetune == "full":
        tables += paper_tables(cells, "finetune_ab", config)
    shares = accuracy(together(frames))
    right = "Share of held-out questions answered as taught, unsteered, 95 % Wilson interval"
    if has_paper_numbers("finetune_accuracy", config) and config.finetune == "full":
        tables.append((f"{right}, beside the paper's", beside_the_paper(shares, "finetune_accuracy", config)))
    else:
        tables.append((right, shares.round(4)))
    how = "rank-8 adapters" if config.finetune == "lora" else f"all weights, SGD at {RATE:g}"
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"One epoch on the answer letter ({how}), then the original model's layer-{layer} vector at -1, 0 and +1. "
        "Paper: steering adds to finetuning both ways for three of seven behaviors.",
        found=[_found(str(name), rows) for name, rows in cells.groupby("behavior", sort=False)],
        tables=tables,
    )


def accuracy(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The share of questions whose taught letter is the likelier one, unsteered: `behavior, finetune, n, mean, ...`.

    The interval is Wilson's: a bootstrap of nothing but right answers would have no width.
    """
    import pandas as pd

    lines = []
    for (behavior, side), part in rows[rows["multiplier"] == 0].groupby(["behavior", "finetune"], sort=False):
        right = part["score"] > 0.5 if side == "positive" else part["score"] < 0.5
        share, n, z = float(right.mean()), len(part), 1.959964
        middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        lines.append((behavior, side, n, share, max(0.0, low), min(1.0, high)))
    return pd.DataFrame(lines, columns=["behavior", "finetune", "n", "mean", "low", "high"])


def _found(behavior: str, rows: "pd.DataFrame") -> str:
    table = rows.pivot(index="finetune", columns="multiplier", values="mean")
    parts = [
        f"taught the {side} letters {table.loc[side, 0.0]:.3f}, steered {table.loc[side, -1.0]:.3f} at -1 and "
        f"{table.loc[side, 1.0]:.3f} at +1"
        for side in SIDES
        if side in table.index
    ]
    return f"{behavior}: p(matching) {'; '.join(parts)}."


def weights(config: "RunConfig") -> float:
    """Weights and as many gradients; or, to train adapters, weights in float32."""
    return 4 / BYTES[config.dtype] if config.finetune == "lora" else 2.0


def cost(unit: Unit, context: "Context") -> Cost:
    sets = context.sets(unit["behavior"])
    lessons = reading_cost(sets.generate)  # a step is a forward and, twice as dear, a backward
    trained = Cost(forwards=len(sets.generate), tokens=3 * lessons.tokens)
    told = Cost()
    for first in range(0, len(sets.open_ended), BATCH):
        for _ in MULTIPLIERS:
            told += generation_cost(sets.open_ended[first : first + BATCH], context.config.max_new_tokens)
    return trained + scoring_cost(sets.test, len(MULTIPLIERS), depth=0.7) + told


EXPERIMENT = Experiment(
    name="finetuning",
    title="On top of finetuning",
    source="Tables 4, 10, 13",
    units=units,
    run=run,
    section=section,
    cost=cost,
    weights=weights,
    needs=needs_layer,
    skip=skip,
    own=own,
)
