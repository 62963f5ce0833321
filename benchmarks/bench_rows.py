"""The rows of `bench.py`, all on the demo model in float32.

The naive way of a sweep, a transfer and a lens is one full forward of the model a condition and prompt with one torch
hook, with the logits of every position, as tutorials have it, on the library's layout of the weights. It runs two of
the conditions, and its time is scaled to all of them: every condition costs it the same.
"""

import contextlib
import functools
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import Row, Skip
from bridge import letter_score, mean_logp, naive
from generation import LAYER, MULTIPLIER, greedy, hugging_face, ours
from timing import cpu_seconds

import caa_lens as cl
from caa_lens.engine.shared_prefix import unsupported
from caa_lens.engine.streams import reading
from caa_lens.measures.answers import score_answers
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.loading.causal_models import has_hooked_transformer
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt, default_format, encode_answer, encode_letters
from caa_lens.steering.interventions import Intervention

MULTIPLIERS = [-2.0, -1.0, 0.0, 1.0, 2.0]
SAMPLED = [(3, 1.0), (20, -2.0)]  # (layer, multiplier) that the naive way of a grid runs

Turn = Callable[[], tuple[float, float]]


@functools.cache
def model() -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = cl.load_model("demo", device="cpu", dtype="float32")
    if (reason := unsupported(loaded)) is not None:
        raise RuntimeError(f"the engine does not run the demo model, so that nothing can be compared: {reason}")
    return loaded


@functools.cache
def vectors() -> Any:
    cfg = model().cfg
    drawn = torch.randn(cfg.n_layers, cfg.d_model, generator=torch.Generator().manual_seed(0))
    directions = 10 * torch.nn.functional.normalize(drawn)
    return cl.SteeringVectors(directions=directions, layers=tuple(range(cfg.n_layers)))


def in_turns(theirs: Callable[[], object], mine: Callable[[], object], scale: float = 1.0) -> Turn:
    return lambda: (scale * cpu_seconds(theirs), cpu_seconds(mine))


def near(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    worst = float((found - expected).abs().max())
    if not worst <= tolerance:
        raise ValueError(f"{what} differs from the naive way by {worst:.2g}, expected at most {tolerance:.0e}")


def encoded(pairs: Any) -> tuple[list[Prompt], list[tuple[int, int]]]:
    """One prompt a pair with its letters' ids, or both completions of each and no letters."""
    form, tokenizer = default_format(model()), model().tokenizer
    if pairs.kind == "ab":
        both = [encode_letters(form, tokenizer, p.question, (p.positive[1], p.negative[1])) for p in pairs]
        return [prompt for prompt, _ in both], [(ids[0], ids[1]) for _, ids in both]
    return [encode_answer(form, tokenizer, p.question, a) for p in pairs for a in (p.positive, p.negative)], []


@torch.inference_mode()
def grid(pairs: Any, cells: Sequence[tuple[int, int, float]]) -> Turn:
    """Cells are (layer that the vector is of, layer where it is added, multiplier)."""
    prompts, letters = encoded(pairs)
    conditions = [(Intervention(vector=vectors()[of].at_layer(at), multiplier=m),) for of, at, m in cells]
    sampled = [(layer, layer, m) for layer, m in SAMPLED]
    kept: dict[str, Any] = {}

    @torch.inference_mode()
    def theirs() -> None:
        kept["naive"] = [naive(model(), prompts, vectors(), (at, m)) for _, at, m in sampled]

    def mine() -> None:
        kept["ours"] = score_answers(model(), pairs, conditions, progress=False).values

    score_answers(model(), pairs, conditions[:3], progress=False)  # warm up
    mine()
    theirs()
    for cell, logits in zip(sampled, kept["naive"], strict=True):
        expected = [
            letter_score(logits[i], letters[i])
            if letters
            else mean_logp(logits[2 * i], prompts[2 * i]) - mean_logp(logits[2 * i + 1], prompts[2 * i + 1])
            for i in range(len(pairs))
        ]
        near("a score", kept["ours"][:, cells.index(cell)], torch.tensor(expected), 1e-4)
    return in_turns(theirs, mine, len(cells) / len(sampled))


def sweep(name: str, n_questions: int) -> Callable[[bool], Turn]:
    def prepare(quick: bool) -> Turn:
        n_layers = model().cfg.n_layers
        cells = [(layer, layer, m) for layer in range(n_layers) for m in MULTIPLIERS]
        if quick:  # the naive way's cells, and few others
            cells = [cell for cell in cells if cell[1] in (3, 20)]
        return grid(cl.ContrastSet.load(name).sample(1 if quick else n_questions, seed=0), cells)

    return prepare


def transfer(quick: bool) -> Turn:
    layers = (3, 20) if quick else range(model().cfg.n_layers)
    cells = [(of, at, m) for m in (1.0, -2.0) for of in layers for at in layers]
    cells = [cell for cell in cells if cell[2] == 1.0 or cell[:2] == (20, 20)]  # one multiplier, and a sampled cell
    return grid(cl.ContrastSet.load("sycophancy").sample(1, seed=0), cells)


@torch.inference_mode()
def extraction(quick: bool) -> Turn:
    pairs = cl.ContrastSet.load("sycophancy").sample(2 if quick else 8, seed=0)
    few = pairs.sample(2, seed=0)
    form, n_layers = default_format(model()), model().cfg.n_layers
    prompts = [[encode_answer(form, model().tokenizer, p.question, a) for a in (p.positive, p.negative)] for p in few]
    total = torch.zeros(n_layers, model().cfg.d_model)

    @torch.inference_mode()
    def theirs() -> None:
        total.zero_()
        for both in prompts:
            for sign, prompt in zip((1, -1), both, strict=True):

                def keep(layer: int, resid: torch.Tensor, sign=sign, at=prompt.read[0]) -> None:
                    total[layer] += sign * resid[0, at] / len(few)

                with reading(model(), range(n_layers), keep):
                    adapter_of(model()).run(model(), torch.tensor([prompt.tokens]))

    theirs()
    near("a direction", cl.extract(model(), few, progress=False).directions, total, 1e-2)
    return in_turns(theirs, lambda: cl.extract(model(), pairs, progress=False), len(pairs) / len(few))


def causal_lens(quick: bool) -> Turn:
    """Differences of two forwards at each layer, whose step is a choice; ours is the derivative."""
    pairs = cl.ContrastSet.load("sentiment").sample(1, seed=0)
    form = default_format(model())
    prompts = [encode_answer(form, model().tokenizer, pair.question, pair.positive) for pair in pairs]
    layers = (3, 20) if quick else range(model().cfg.n_layers)
    some, size = vectors().at(list(layers)), 0.01
    kept: dict[Any, Any] = {}

    @torch.inference_mode()
    def theirs() -> None:
        for layer in (3, 20):
            up, down = (naive(model(), prompts, vectors(), (layer, sign * size)) for sign in (1, -1))
            changes = [
                (a - b)[one.answer_start - 1 : -1].mean(0) / (2 * size)
                for a, b, one in zip(up, down, prompts, strict=True)
            ]
            kept[layer] = torch.stack(changes).mean(0)

    def mine() -> None:
        kept["ours"] = cl.logit_lens(model(), some, reading="causal", prompts=prompts, controls=0, progress=False)

    theirs()
    mine()
    for layer in (3, 20):
        frame = kept["ours"].frame
        frame = frame[frame["layer"] == layer].set_index("token_id")["score"]
        centred = kept[layer] - kept[layer].mean()
        near("a causal score", torch.tensor(frame.to_numpy()).float(), centred[torch.tensor(frame.index)], 0.05)
    return in_turns(theirs, mine, len(layers) / 2)


@functools.cache
def hugging_face_model() -> Any:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    loaded.generation_config.eos_token_id = None
    return loaded


def generation(batch_size: int) -> Callable[[bool], Turn]:
    def prepare(quick: bool) -> Turn:
        n = 4 if quick else 24
        prompts = [default_format(model()).encode(model().tokenizer, "Describe a walk in the park.")] * batch_size
        # Large, so that the text is another one from its first words on.
        batch, vector = left_pad(prompts, n_ctx=model().cfg.n_ctx), 20 * vectors()[LAYER]
        hf = hugging_face_model()
        kept: dict[str, torch.Tensor] = {}

        @torch.inference_mode()
        def theirs() -> None:
            kept["theirs"] = hugging_face(hf, batch, vector.direction, n)

        def mine() -> None:
            kept["ours"] = ours(model(), prompts, [(vector, MULTIPLIER)], n)

        mine()
        theirs()
        if not torch.equal(kept["ours"], kept["theirs"]):
            raise ValueError("the tokens are not those of Hugging Face's generate")
        if torch.equal(kept["ours"], greedy(hf, batch, n)):
            raise ValueError("the tokens are those of the unsteered model, so that nothing was compared")
        return in_turns(theirs, mine)

    return prepare


def loading_time(quick: bool) -> Turn:
    """Of load_model against TransformerLens' `from_pretrained` with the same files in the page cache."""
    if not has_hooked_transformer():
        raise Skip("TransformerLens 4 has no HookedTransformer to load it as")
    from load_memory import from_pretrained

    config = json.loads((demo_model_path() / "config.json").read_text())

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from_pretrained(demo_model_path(), "float32", config)

    def mine() -> None:
        cl.load_model("demo", device="cpu", dtype="float32")

    mine()
    return in_turns(theirs, mine)


def loading_memory(quick: bool) -> Turn:
    """Peaks of fresh processes, which load a random Llama of 0.4 billion parameters in float16."""
    import load_memory

    if not has_hooked_transformer():
        raise Skip("TransformerLens 4 has no HookedTransformer to load it as")
    if not Path("/proc/self/clear_refs").exists():
        raise Skip("the peak is read from /proc, which this system has not")
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name) / "float16-1"
    load_memory.write_llama(folder, "float16", 1)

    def peak(loader: str) -> float:
        command = [sys.executable, "-W", "ignore", load_memory.__file__, loader, str(folder), "float16"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"loading with {loader} failed: {done.stderr[-400:]}")
        return json.loads(done.stdout.splitlines()[-1])["peak"]

    def turn(scratch: Any = scratch) -> tuple[float, float]:  # keeps the folder as long as itself
        return peak("HookedTransformer.from_pretrained"), peak("load_model, hooked")

    return turn


FORWARD = "one full forward a condition and prompt, laid out"
GENERATE = "Hugging Face generate with a forward hook"
ROWS = {
    "sweep, letters": Row(against=FORWARD, prepare=sweep("sycophancy", 4)),
    "sweep, completions": Row(against=FORWARD, prepare=sweep("sentiment", 1)),
    "extraction": Row(against="two full forwards a pair, without logits, laid out", prepare=extraction),
    "layer transfer": Row(against=FORWARD, prepare=transfer),
    "causal lens": Row(against="two full forwards a layer and prompt, laid out", prepare=causal_lens),
    "generation, batch 1": Row(against=GENERATE, prepare=generation(1)),
    "generation, batch 8": Row(against=GENERATE, prepare=generation(8)),
    "generation, batch 32": Row(against=GENERATE, prepare=generation(32), turns=3),
    "loading, time": Row(against="TransformerLens from_pretrained", prepare=loading_time),
    "loading, memory": Row(
        against="TransformerLens from_pretrained", prepare=loading_memory, turns=1, unit="weights at the peak"
    ),
}
