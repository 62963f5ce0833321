"""Rows of the table beside the card's memory limit: steered generation, three ways."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import seconds
from torch import Tensor

from caa_lens.engine import shared_prefix
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens

from .bench import Bench, at_least, peak_of
from .decode import StaticSteps
from .table import Row

# What is aimed at, on an H100 at 7B and batch 1: of the memory limit, and of transformers' own generation.
READING, HOOK = 0.70, 1.0


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
