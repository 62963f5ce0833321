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

Models are taught, scored and generated from in float32, whatever the run's type: half precision would round nearly all
steps of this size away, while they are taken or afterwards (a step of 1e-4 along a small gradient is less than half the
distance between two numbers of float16). Of a model in float32 all weights of the checkpoint move, and nothing else: a
HookedTransformer's biases, which a Llama has not, stay zero. A gradient is used and dropped as soon as it is there, so
that full finetuning takes the memory of the weights in float32 (27 GB for 7B) and of one lesson's activations.

`--finetune lora` trains rank-8 adapters on the attention's projections with Adam (through `peft`), and merges them into
the weights before anything is measured. The merged copy lies in a scratch folder for a moment; its tokenizer and its
prompt format are the original model's, never what the folder would say.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.paper.figure_5_open_ended import BATCH, answers
from experiments.paper.layer_choice import chosen_layer, needs_layer
from experiments.running.comparison import beside_the_paper, grid, has_paper_numbers, paper_tables
from experiments.running.costs import Cost, generation_cost, reading_cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.identity import prompts_hash
from experiments.running.scores import means, scored, steered
from experiments.running.settings import BYTES
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.prompts.prompt_formats import PromptFormat
    from caa_lens.report.page import Section
    from experiments.running.context import Context
    from experiments.running.run_folder import RunFolder
    from experiments.running.settings import RunConfig

SIDES = ("positive", "negative")
MULTIPLIERS = (-1.0, 0.0, 1.0)
RATE = 1e-4  # the paper's
LORA_RANK, LORA_RATE = 8, 2e-4
TAUGHT_DTYPE = "float32"
LESSON_ROOM = 1.1  # activations that a lesson keeps for its backward pass: some 0.1 GB a layer of 7B for 200 tokens

Lesson = tuple[list[int], int]  # the tokens up to the letter, and the letter's id


def units(config: "RunConfig") -> list[Unit]:
    from experiments.running.behavior_sets import behavior_sets

    by_letter = [b for b in config.behaviors if behavior_sets(config, b).generate.kind == "ab"]
    return [Unit.of(behavior=behavior, finetune=side) for behavior in by_letter for side in SIDES]


def skip(config: "RunConfig") -> str | None:
    return None if units(config) else "none of the behaviors is answered by letter"


def own(config: "RunConfig") -> dict[str, str]:
    return {"finetune": config.finetune, **prompts_hash(config)}


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    import pandas as pd

    sets = context.sets(unit["behavior"])
    model, prompt_format = taught(context, unit)
    layer = chosen_layer(context)
    vector = context.vectors(unit["behavior"])[layer]
    cells = [({"layer": layer, "multiplier": m}, steered(vector, m)) for m in MULTIPLIERS]
    frame = scored(model, sets.test, cells, prompt_format=prompt_format)
    if sets.open_ended:  # now, as the model is gone when the unit is done
        asked = [answers(model, unit["behavior"], m, context, prompt_format=prompt_format) for m in MULTIPLIERS]
        texts = pd.concat(asked, ignore_index=True)
        context.folder.write_frame(answers_file(context.folder, unit), texts)
    return frame


def answers_file(folder: "RunFolder", unit: Unit) -> Path:
    """Where a taught model's open-ended answers lie, written before its unit is done."""
    return folder.artefacts(EXPERIMENT.name) / f"answers-{unit.name}.parquet"


def taught(context: "Context", unit: Unit) -> tuple[Any, "PromptFormat"]:
    """A copy of the run's model, in float32, after an epoch on the letters of the unit's behavior and side.

    With it the prompt format that it was taught in, which is the original model's, and which it has to be asked in.
    """
    import numpy as np

    from caa_lens.models.placement import device_of_tokens
    from caa_lens.prompts.prompt_formats import resolve_format

    config, pairs, side = context.config, context.sets(unit["behavior"]).generate, unit["finetune"]
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    context.release()  # one model in memory at a time
    if config.finetune == "lora":
        original = context.model
        prompt_format, tokenizer = resolve_format(original, None), original.tokenizer
        name, device = original.cfg.model_name, device_of_tokens(original)
        lessons = letters_of(tokenizer, pairs, side, prompt_format)
        del original
        context.release()
        with context.folder.scratch(EXPERIMENT.name, unit) as scratch:
            teach_lora(
                weights_folder(config.model), [lessons[i] for i in order], scratch, device=device, seed=config.seed
            )
            model = load_copy(context, scratch, name, tokenizer)
    else:
        model = context.load(config.model, dtype=TAUGHT_DTYPE)
        prompt_format = resolve_format(model, None)
        lessons = letters_of(model.tokenizer, pairs, side, prompt_format)
        teach(model, [lessons[i] for i in order], rate=RATE)
    return model, prompt_format


def load_copy(context: "Context", folder: Path, name: str, tokenizer: Any) -> Any:
    """A model from a folder of weights, with the name and the very tokenizer of another."""
    from caa_lens.models.loading.tokenizers import attach_tokenizer

    model = context.load(str(folder), dtype=TAUGHT_DTYPE)
    model.cfg.model_name = name
    attach_tokenizer(model, tokenizer, name)
    return model


def letters_of(tokenizer: Any, pairs: "ContrastSet", side: str, prompt_format: "PromptFormat") -> list[Lesson]:
    """For every pair the prompt up to the opening bracket, and one side's letter."""
    from caa_lens.prompts.prompt_formats import encode_letters

    lessons = []
    for pair in pairs:
        letters = (pair.positive[1], pair.negative[1])
        prompt, ids = encode_letters(prompt_format, tokenizer, pair.question, letters)
        lessons.append((list(prompt.tokens), ids[SIDES.index(side)]))
    return lessons


def teach(model: Any, lessons: Sequence[Lesson], *, rate: float) -> list[float]:
    """One epoch of SGD on -log p(letter), one lesson a step, in place; returns the losses.

    Every weight of the checkpoint takes its step, in the backward pass, as soon as its gradient is there; plain SGD has
    no memory, so that this is the same as all steps after it.

    Raises:
        ValueError: the model is in half precision, or quantised.
    """
    import torch

    from caa_lens.models.loading.weights import checkpoint_parameters
    from caa_lens.models.placement import device_of_tokens, dtype_name, dtype_of

    if dtype_of(model) != torch.float32:
        got = dtype_name(model)
        raise ValueError(
            f"got a model in {got}, expected float32: nearly all steps would be rounded away; load it with "
            "dtype='float32', and convert it after it was taught, if need be"
        )

    if quantised := [name for name, one in model.named_parameters() if not one.is_floating_point()]:
        raise ValueError(
            f"got a quantised model ({quantised[0]} and {len(quantised) - 1} more hold whole numbers), which has no "
            "gradient, expected one in float32: load it without quantisation"
        )

    def step(parameter: Any) -> None:
        with torch.no_grad():
            parameter.data.add_(parameter.grad, alpha=-rate)
        parameter.grad = None

    trained = list(checkpoint_parameters(model).values())
    for parameter in model.parameters():  # biases too, which the checkpoint has not
        parameter.requires_grad_(False)
    hooks = [parameter.requires_grad_(True).register_post_accumulate_grad_hook(step) for parameter in trained]
    try:
        with torch.enable_grad():
            losses = [
                _lesson(model(torch.tensor([t], device=device_of_tokens(model))), letter) for t, letter in lessons
            ]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(False)
    return losses


def teach_lora(folder: Path, lessons: Sequence[Lesson], out: Path, *, device: Any, seed: int) -> list[float]:
    """One epoch of Adam on rank-8 adapters; the merged weights and their config are written to `out`.

    Adapted are attention's projections where they have Llama's names, else all linear maps.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'caa-lens[finetune]'") from None
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)  # of the adapters' first values
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    has = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    where: Any = projections if has.issuperset(projections) else "all-linear"
    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=where, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LORA_RATE)
    losses = []
    with torch.enable_grad():
        for tokens, letter in lessons:
            optimizer.zero_grad()
            losses.append(_lesson(adapted(input_ids=torch.tensor([tokens], device=device)).logits, letter))
            optimizer.step()
    adapted.merge_and_unload().save_pretrained(out)
    return losses


def _lesson(logits: Any, letter: int) -> float:
    """The loss of one lesson, and the backward pass from it."""
    loss = -logits[0, -1].float().log_softmax(-1)[letter]
    loss.backward()
    return loss.item()


def weights_folder(model: str) -> Path:
    """Where `transformers` finds the model that `load_model` loads by this name.

    Raises:
        ValueError: for a GGUF file.
    """
    from caa_lens.models.loading.demo_model import demo_model_path
    from caa_lens.models.loading.hub import CONFIG_FILES, WEIGHT_FILES, download

    if model == "demo":
        return demo_model_path()
    if Path(model).is_dir():
        return Path(model)
    if Path(model).suffix == ".gguf":
        raise ValueError(f"adapters are trained on a folder with safetensors, got {model}: use --finetune full")
    return download(model, CONFIG_FILES + WEIGHT_FILES, None)


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section

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
    formats = sorted({str(frame.attrs.get("prompt_format", "unknown")) for frame in frames.values()})
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text=f"One epoch on the answer letter ({how}), then the original model's layer-{layer} vector at -1, 0 and +1. "
        f"Taught and asked in {TAUGHT_DTYPE}, in the prompt format {', '.join(formats)}. "
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
    """Weights in float32, and what a lesson's backward pass needs."""
    return LESSON_ROOM * BYTES[TAUGHT_DTYPE] / BYTES[config.dtype]


def cost(unit: Unit, context: "Context") -> Cost:
    sets = context.sets(unit["behavior"])
    lessons = reading_cost(sets.generate)  # a step is a forward and, twice as dear, a backward
    trained = Cost(forwards=len(sets.generate), tokens=3 * lessons.tokens)
    told = Cost()
    for first in range(0, len(sets.open_ended), BATCH):
        for _ in MULTIPLIERS:
            told += generation_cost(sets.open_ended[first : first + BATCH], context.config.max_new_tokens)
    told = replace(told, steps=told.steps * BYTES[TAUGHT_DTYPE] / BYTES[context.config.dtype])  # of wider weights
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
