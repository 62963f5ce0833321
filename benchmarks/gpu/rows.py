"""Rows of the table beside the card's matrix limit: loading, extraction and a sweep."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import seconds
from torch import Tensor

from caa_lens.engine import shared_prefix
from caa_lens.engine.activations import read_pairs
from caa_lens.engine.staircase import Staircase
from caa_lens.models.loading.llama_config import hooked_config
from caa_lens.models.loading.load import load_model, n_parameters
from caa_lens.models.loading.weights import expected_shapes
from caa_lens.steering.interventions import Intervention

from .bench import LETTERS, Bench, at_least, config_of, empty, peak_of
from .table import Row

MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
BATCH_SIZE = 8
# What is aimed at, on an H100 at 7B; other cards and shapes are held to the same shares.
SWEEP, EXTRACTION, LOAD = 100, 0.40, 1.05


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
    on_card = torch.device(options.device).type == "cuda"
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
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        time = seconds(lambda: load_model(folder, dtype=dtype, device=options.device))
        peak = torch.cuda.max_memory_allocated() / held if on_card else 0.0
    speed = f"{time:.1f} s, {held / time / 1e9:.2g} GB/s"
    if not on_card:
        yield "load", Row(work=work, figure=speed, against="benchmarks/load_memory.py measures the peak on a CPU")
        return
    yield (
        "load",
        Row(
            work=work,
            figure=f"peak on the card {peak:.3f} of the weights",
            **at_least(-LOAD, -peak, f"at most {LOAD}"),
            against=speed,
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
