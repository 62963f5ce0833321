"""Llama 2 at full size with random weights on one device: what a researcher's GPU does, and how near its limits.

    python benchmarks/full_size.py --shape 7b --dtype bfloat16
    python benchmarks/full_size.py --shape 13b --dtype bfloat16 --keep build/gpu/table.json
    python benchmarks/full_size.py --shape tiny --device cpu --pairs 4 --tokens 4      # as the tests run it

Weights are random: speed and memory depend on shapes only. Prompts are random tokens. Each figure stands beside the
limit that was measured on the same device: its largest matrix product for extraction and sweeps, a large copy for
generation at batch 1, which reads every weight for every token. With `--keep` each row is written as soon as it is
there, and a second run measures what is missing; what fails (a model that does not fit) is a row that says so.
`make gpu` runs all of it.
"""

import argparse
import gc
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu.decode import StaticSteps
from gpu.limits import copy_limit, matrix_limit
from gpu.table import Kept, Row, markdown
from timing import machine, seconds
from torch import Tensor

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.engine.activations import read_pairs
from caa_lens.engine.staircase import Staircase
from caa_lens.models.loading.llama_config import hooked_config
from caa_lens.models.loading.load import load_model, n_parameters
from caa_lens.models.loading.weights import _parameter_map, build_model, expected_shapes
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
LETTERS = (29909, 29933)
BATCH_SIZE = 8
# What is aimed at, on an H100 at 7B; other cards and shapes are held to the same shares.
SWEEP, EXTRACTION, READING, HOOK, LOAD = 100, 0.40, 0.70, 1.0, 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model with what is asked of it."""

    model: Any
    pairs: list[tuple[Prompt, Prompt]]
    vectors: cl.SteeringVectors
    options: argparse.Namespace
    limits: dict[str, float]

    @property
    def device(self) -> torch.device:
        return self.model.W_E.device

    @property
    def of_a_token(self) -> int:
        """Floating-point operations of the blocks' matrices for one token."""
        cfg = self.model.cfg
        kv = (cfg.n_key_value_heads or cfg.n_heads) / cfg.n_heads
        return int(2 * cfg.n_layers * ((2 + 2 * kv) * cfg.d_model**2 + 3 * cfg.d_model * cfg.d_mlp))

    def share_of_matrix(self, operations: float, time: float) -> float:
        return operations / time / self.limits[f"matrix {self.options.dtype}"]


# ---- what is asked --------------------------------------------------------------------------------------------------


def prompt_of(generator: torch.Generator, n_tokens: int, letter: int) -> Prompt:
    """A random question that ends like `... ] ( A`: steering starts three tokens before the end."""
    body = torch.randint(3, 32000, (n_tokens - 1,), generator=generator).tolist()
    return Prompt(
        text="",
        tokens=(*body, letter),
        steer_start=n_tokens - 3,
        answer_start=n_tokens - 2,
        read=(n_tokens - 1, n_tokens),
    )


def pairs_of(n_pairs: int, n_tokens: int) -> list[tuple[Prompt, Prompt]]:
    pairs = []
    for seed in range(n_pairs):
        sides = [prompt_of(torch.Generator().manual_seed(seed), n_tokens, letter) for letter in LETTERS]
        pairs.append((sides[0], sides[1]))
    return pairs


def peak_of(run: Callable[[], object]) -> tuple[float, str]:
    """Seconds, and the peak above what was there before; without a name of it on a CPU, which does not tell."""
    if not torch.cuda.is_available():
        return seconds(run), ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time = seconds(run)
    return time, f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB"


def at_least(aim: float, value: float, words: str) -> dict[str, Any]:
    return {"aim": words, "met": value >= aim}


# ---- the model ------------------------------------------------------------------------------------------------------


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **SHAPES[options.shape]}


def built(options: argparse.Namespace) -> Any:
    """Random weights, made on the device."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    cfg = hooked_config(config_of(options), dtype=dtype, device=str(device))
    torch.manual_seed(0)
    cfg.model_name = f"shape-of-llama-2-{options.shape}"
    shapes = expected_shapes(cfg)
    return build_model(cfg, lambda name: torch.randn(shapes[name], device=device, dtype=dtype) * 0.02)


def as_hugging_face(model: Any, options: argparse.Namespace) -> Any:
    """transformers' own module over the very same memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    back = {"_transposed": lambda w: w.T, "_as_is": lambda w: w}
    back |= {
        "_heads_in": lambda w: w.transpose(1, 2).flatten(0, 1),
        "_heads_out": lambda w: w.permute(2, 0, 1).flatten(1),
    }
    told = config_of(options)
    del told["model_type"]
    with torch.device("meta"):
        hf = LlamaForCausalLM(LlamaConfig(**told, rms_norm_eps=model.cfg.eps, attn_implementation="sdpa"))
    weights = {
        name: back[view.__name__](model.get_parameter(ours).data) for name, _, ours, view in _parameter_map(model.cfg)
    }
    hf.load_state_dict(weights, strict=True, assign=True)
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=hf.config).to(options.device)
    hf.generation_config.eos_token_id = None
    return hf.to(getattr(torch, options.dtype)).eval()


# ---- rows -----------------------------------------------------------------------------------------------------------


def loading(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Random weights in files, loaded by `load_model`; the files are gone afterwards."""
    from safetensors.torch import save_file

    config = config_of(options)
    dtype = getattr(torch, options.dtype)
    held = n_parameters(config) * dtype.itemsize
    work = "load_model from safetensors, files in the page cache"
    scratch = Path(options.scratch or tempfile.gettempdir())
    free = shutil.disk_usage(scratch).free
    if free < 1.1 * held:
        need = f"expected {1.1 * held / 1e9:.0f}: name another folder by --scratch"
        said = f"got {free / 1e9:.0f} GB free in {scratch}, {need}"
        yield "load", Row(work=work, figure=said, failed=True)
        return
    if torch.device(options.device).type != "cuda":
        yield "load", Row(work=work, figure="not on this device: benchmarks/load_memory.py measures it on a CPU")
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shapes = list(expected_shapes(hooked_config(config, dtype=dtype, device="cpu")).items())
        n_files = max(1, held // 4_000_000_000)
        index = {}
        for part in range(n_files):
            file = f"model-{part + 1:05}-of-{n_files:05}.safetensors"
            some = {
                n: (0.02 * torch.randn(shape, device=options.device, dtype=dtype)).cpu()
                for n, shape in shapes[part::n_files]
            }
            save_file(some, Path(folder) / file, metadata={"format": "pt"})
            index |= dict.fromkeys(some, file)
        (Path(folder) / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        empty()
        torch.cuda.reset_peak_memory_stats()
        kept = []
        time = seconds(lambda: kept.append(load_model(folder, dtype=dtype, device=options.device)))
        peak = torch.cuda.max_memory_allocated() / held
        kept.clear()
    yield (
        "load",
        Row(
            work=work,
            figure=f"peak on the card {peak:.3f} of the weights",
            **at_least(-LOAD, -peak, f"at most {LOAD}"),
            against=f"{time:.1f} s, {held / time / 1e9:.1f} GB/s",
            memory=f"{(peak - 1) * held / 2**30:.2f} GiB",
        ),
    )


def extraction(bench: Bench) -> Iterator[tuple[str, Row]]:
    options, model, pairs = bench.options, bench.model, bench.pairs

    def extract(some: list) -> Tensor:
        return sum((sides[:, 0] - sides[:, 1]).sum(0) for sides, _ in read_pairs(model, some, batch_size=BATCH_SIZE))

    extract(pairs[:BATCH_SIZE])  # warm up
    time, peak = peak_of(lambda: extract(pairs))
    # The tokens that had to be run: the shared prompt and two letters.
    share = bench.share_of_matrix(len(pairs) * (options.prompt + 1) * bench.of_a_token, time)

    def two_forwards(some: list) -> None:
        for both in some:
            for p in both:
                model.run_with_cache(
                    torch.tensor([p.tokens], device=bench.device), names_filter=lambda name: name.endswith("resid_post")
                )

    few = pairs[: max(2, len(pairs) // 8)]
    slow, _ = peak_of(lambda: two_forwards(few))
    yield (
        "extraction",
        Row(
            work="extraction, all layers",
            figure=f"{len(pairs) / time:.1f} pairs/s",
            **at_least(EXTRACTION, share, f"{EXTRACTION:.0%} of the matrix limit"),
            share=f"{share:.0%} of matrix",
            against=f"{slow / len(few) / (time / len(pairs)):.1f} times two forwards a pair, resid_post kept",
            memory=peak,
        ),
    )


def sweep(bench: Bench) -> Iterator[tuple[str, Row]]:
    options, model, vectors = bench.options, bench.model, bench.vectors
    conditions = [(Intervention(vector=v, multiplier=m).edit(0),) for v in vectors for m in MULTIPLIERS]
    questions = [p for p, _ in bench.pairs[: max(2, options.pairs // 4)]]
    n_suffix = options.prompt - questions[0].steer_start
    budget = shared_prefix.token_budget(model, options.prompt, n_suffix)
    at_once = max(1, min(shared_prefix.prefix_budget(model, options.prompt), budget // (n_suffix * len(conditions))))

    def staircase() -> Tensor:
        stairs, found = Staircase(conditions, bench.device), []
        for first in range(0, len(questions), at_once):
            some = questions[first : first + at_once]
            prefix = shared_prefix.prefill(model, [p.tokens[: p.steer_start] for p in some])
            resid = shared_prefix.run_suffixes(model, prefix, [[p.tokens[p.steer_start :]] for p in some], stairs)
            logits = model.ln_final(resid[:, :, -1]) @ model.W_U[:, list(LETTERS)]
            found.append(logits[:, stairs.condition_groups()])
        return torch.cat(found)

    staircase()  # warm up
    time, peak = peak_of(staircase)
    rate = len(conditions) * len(questions) / time
    passes = 1 + n_suffix * (len(MULTIPLIERS) - 1) * (model.cfg.n_layers - 1) / (2 * options.prompt)
    share = bench.share_of_matrix(len(questions) * options.prompt * bench.of_a_token * passes, time)

    def naive() -> None:
        for layer in (1, model.cfg.n_layers - 1):
            hook = vectors[layer].hook(start=questions[0].steer_start)
            model.run_with_hooks(torch.tensor([questions[0].tokens], device=bench.device), fwd_hooks=[hook])

    seconds(naive)
    slow, _ = peak_of(naive)
    yield (
        "sweep",
        Row(
            work=f"sweep, {len(conditions)} conditions, {len(questions)} questions, {at_once} at once",
            figure=f"{rate:.0f} conditions/s, {rate * slow / 2:.0f} times naive",
            **at_least(SWEEP, rate * slow / 2, f"{SWEEP} times naive"),
            share=f"{share:.0%} of matrix",
            against=f"naive, one full forward a condition: {2 / slow:.1f} conditions/s",
            memory=peak,
        ),
    )


def hugging_face(hf: Any, prompts: list[Prompt], vector: Tensor, layer: int, n: int) -> Tensor:
    """Exactly `n` greedy tokens of transformers' own generate, with the vector added by a forward hook."""
    start = prompts[0].steer_start

    def steer(module: Any, inputs: Any, output: Any) -> Any:
        resid = output[0] if isinstance(output, tuple) else output
        steered = resid.clone()
        steered[:, 0 if resid.shape[1] == 1 else start :] += vector
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    tokens = torch.tensor([p.tokens for p in prompts], device=vector.device)
    handle = hf.model.layers[layer].register_forward_hook(steer)
    fixed = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    try:
        return hf.generate(tokens, attention_mask=torch.ones_like(tokens), **fixed)[:, tokens.shape[1] :]
    finally:
        handle.remove()


def generation(bench: Bench, n_rows: int, hf: Any) -> Iterator[tuple[str, Row]]:
    """Tokens a second once the prompt has run: the time of many tokens less that of one."""
    options, model, n = bench.options, bench.model, bench.options.tokens
    prompts, layer = [bench.pairs[i % len(bench.pairs)][0] for i in range(n_rows)], model.cfg.n_layers // 2
    steering = [(bench.vectors[layer], 1.0)]
    direction = bench.vectors[layer].direction.to(bench.device, model.cfg.dtype)
    given: dict[str, Tensor] = {}

    def ours(vectors: list, n: int) -> Tensor:
        return torch.stack(list(generate_tokens(model, prompts, vectors=vectors, max_new_tokens=n)), dim=1)

    static = StaticSteps(model, prompts, steering, n)
    step = torch.compile(static.step) if options.compile else static.step
    captured = static.captured(step) if bench.device.type == "cuda" else None
    ways: dict[str, Callable[[int], Tensor]] = {
        "steered": lambda n: ours(steering, n),
        "unsteered": lambda n: ours([], n),
        "hook": lambda n: hugging_face(hf, prompts, direction, layer, n),
        "static": lambda n: static.run(n, captured or step),
    }
    rate: dict[str, float] = {}
    peaks: dict[str, str] = {}
    for name, run in ways.items():
        run(2)
        first = seconds(lambda run=run: run(1))
        whole, peaks[name] = peak_of(lambda run=run, name=name: given.__setitem__(name, run(n)))
        rate[name] = n_rows * (n - 1) / max(whole - first, 1e-9)

    cfg, size = model.cfg, model.W_E.element_size()
    weights = sum(p.numel() for p in model.parameters()) - model.W_E.numel()  # the embedding is looked up, not read
    seen = n_rows * (options.prompt + n / 2) * shared_prefix.kv_numbers(cfg, 1)
    limit = n_rows * bench.limits["copy"] / ((weights + seen) * size)
    share = {name: f"{rate[name] / limit:.0%} of copy" for name in rate}

    def same(name: str) -> str:
        equal = given[name] == given["steered"]
        if bool(equal.all()):
            return "the same tokens"
        return f"only the first {int(equal.all(0).int().cumprod(0).sum())} of {n} tokens are the same"

    aimed = n_rows == 1
    yield (
        f"generation {n_rows}",
        Row(
            work=f"generation, batch {n_rows}, steered",
            figure=f"{rate['steered']:.1f} tokens/s",
            **(at_least(READING, rate["steered"] / limit, f"{READING:.0%} of the memory limit") if aimed else {}),
            share=share["steered"],
            against=f"{rate['steered'] / rate['unsteered']:.2f} of unsteered",
            memory=peaks["steered"],
        ),
    )
    yield (
        f"hook {n_rows}",
        Row(
            work=f"generation, batch {n_rows}, transformers' generate with a forward hook",
            figure=f"{rate['hook']:.1f} tokens/s",
            **at_least(HOOK, rate["steered"] / rate["hook"], f"ours at least {HOOK:.2f} of it"),
            share=share["hook"],
            against=f"ours is {rate['steered'] / rate['hook']:.2f} of it; {same('hook')}",
            memory=peaks["hook"],
        ),
    )
    how = ("compiled, " if options.compile else "") + ("as a CUDA graph" if captured else "without a graph")
    yield (
        f"static {n_rows}",
        Row(
            work=f"generation, batch {n_rows}, steps of fixed shape {how}",
            figure=f"{rate['static']:.1f} tokens/s",
            **(at_least(READING, rate["static"] / limit, f"{READING:.0%} of the memory limit") if aimed else {}),
            share=share["static"],
            against=f"{rate['static'] / rate['steered']:.2f} of the library's loop; {same('static')}",
            memory=peaks["static"],
        ),
    )


# ---- one row at a time ----------------------------------------------------------------------------------------------


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Rows:
    """Measures what is not kept yet, and keeps each row as it comes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.kept = Kept(Path(options.keep), machine())
        self.options, self.name = options, f"{options.shape} {options.dtype}"
        if self.kept.begun_anew:
            warnings.warn(self.kept.begun_anew, stacklevel=2)

    def missing(self, *keys: str) -> bool:
        return self.options.again or not all(self.kept.has(f"{self.name} {key}") for key in keys)

    def take(self, measure: Callable[[], Iterator[tuple[str, Row]]], *keys: str) -> None:
        """What cannot be measured is a row that says why; the next ones are measured all the same."""
        if not self.missing(*keys):
            return
        try:
            for key, row in measure():
                self.put(key, row)
        except torch.OutOfMemoryError as error:
            empty()
            free, total = torch.cuda.mem_get_info()
            said = f"out of memory: got {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {str(error).split('. ')[1]}"
            self.put(keys[0], Row(work=keys[0], figure=f"{said}: a larger card, or a smaller --shape", failed=True))
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            self.put(keys[0], Row(work=keys[0], figure=f"failed: {said}", failed=True))

    def put(self, key: str, row: Row) -> None:
        self.kept.put(f"{self.name} {key}", replace(row, work=f"{self.name}: {row.work}"))
        print("  ".join(cell for cell in (f"{self.name}: {row.work}", *row.cells()[1:]) if cell), flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--load", action="store_true", help="also load such a model from files")
    parser.add_argument("--scratch", help="a folder with room for those files")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step of fixed shape; takes minutes")
    parser.add_argument("--keep", help="the file that rows are kept in; a second run measures what is missing")
    parser.add_argument("--again", action="store_true", help="measure what is kept, too")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"got --device {options.device}, but torch {torch.__version__} sees no card: --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        options.keep = options.keep or str(Path(folder) / "table.json")
        rows = Rows(options)
        on_card = device.type == "cuda"
        if options.again or f"matrix {options.dtype}" not in rows.kept.limits:
            rows.kept.put_limit(f"matrix {options.dtype}", matrix_limit(device, dtype, 8192 if on_card else 512))
        if options.again or "copy" not in rows.kept.limits:
            rows.kept.put_limit("copy", copy_limit(device, 2**32 if on_card else 2**26))
        if options.load:
            rows.take(lambda: loading(options), "load")
            empty()
        measure(rows, options)
        print("\n" + markdown(Path(options.keep)))


def measure(rows: Rows, options: argparse.Namespace) -> None:
    keys = [(f"generation {n}", f"hook {n}", f"static {n}") for n in options.batches]
    if not rows.missing("extraction", "sweep", *(key for three in keys for key in three)):
        return
    made: list[Any] = []

    def make() -> Iterator[tuple[str, Row]]:
        time, _ = peak_of(lambda: made.append(built(options)))
        held = sum(p.numel() * p.element_size() for p in made[0].parameters()) / 2**30
        yield (
            "build",
            Row(work="random weights made on the device", figure=f"{time:.1f} s", against=f"{held:.1f} GiB held"),
        )

    rows.kept.rows.pop(f"{rows.name} build", None)
    rows.take(make, "build")
    if not made:
        return
    model = made[0]
    vectors = torch.randn(model.cfg.n_layers, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    bench = Bench(
        model=model,
        pairs=pairs_of(options.pairs, options.prompt),
        vectors=cl.SteeringVectors(directions=vectors, layers=tuple(range(len(vectors)))).to(model.W_E.device),
        options=options,
        limits=rows.kept.limits,
    )
    rows.take(lambda: extraction(bench), "extraction")
    rows.take(lambda: sweep(bench), "sweep")
    if rows.missing(*(key for three in keys for key in three)):
        hf = as_hugging_face(model, options)
        for n, three in zip(options.batches, keys, strict=True):
            rows.take(lambda n=n: generation(bench, n, hf), *three)


if __name__ == "__main__":
    main()
