"""Llama 2 at full size with random weights, built on the device: what a researcher's GPU will do.

    python benchmarks/full_size.py --shape 7b --dtype bfloat16
    python benchmarks/full_size.py --shape 13b --dtype float16
    python benchmarks/full_size.py --shape tiny --pairs 4 --tokens 4      # on a CPU, as the tests run it

Measures extraction (pairs a second, and its share of the matrix-product limit measured on the same device), sweep
conditions a second against one full forward a condition, steered tokens a second against unsteered, peak memory of
each, and the time to build. Weights are random: speed and memory depend on shapes only. Prompts are random tokens.
"""

import argparse

import torch
from timing import print_table, seconds

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.engine.activations import read_pairs
from caa_lens.engine.staircase import Staircase
from caa_lens.models.loading.llama_config import hooked_config
from caa_lens.models.loading.weights import build_model, expected_shapes
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
MULTIPLIERS = (-2.0, -1.0, 1.0, 2.0)


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
        sides = [prompt_of(torch.Generator().manual_seed(seed), n_tokens, letter) for letter in (29909, 29933)]
        pairs.append((sides[0], sides[1]))
    return pairs


def peak_of(run) -> tuple[float, float]:
    """Seconds, and GiB above what was there before (0 on a CPU)."""
    if not torch.cuda.is_available():
        return seconds(run), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time = seconds(run)
    return time, (torch.cuda.max_memory_allocated() - before) / 2**30


def matmul_limit(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a large square matrix product."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    seconds(lambda: a @ b)
    return 2 * size**3 * 10 / seconds(lambda: [a @ b for _ in range(10)], 3)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    config = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **SHAPES[options.shape]}

    cfg = hooked_config(config, dtype=dtype, device=str(device))
    shapes = expected_shapes(cfg)
    made = []

    def random_weight(name):
        return torch.randn(shapes[name], device=device, dtype=dtype) * 0.02

    build, _ = peak_of(lambda: made.append(build_model(cfg, random_weight)))
    model = made[0]
    n_weights = sum(p.numel() for p in model.parameters())
    rows = [
        ["build on the device", f"{build:.1f} s", "", f"{n_weights * model.W_E.element_size() / 2**30:.1f} GiB held"]
    ]

    pairs = pairs_of(options.pairs, options.prompt)
    batch_size = 8

    def extract(some):
        return sum((sides[:, 0] - sides[:, 1]).sum(0) for sides, _ in read_pairs(model, some, batch_size=batch_size))

    extract(pairs[:batch_size])  # warm up
    time, peak = peak_of(lambda: extract(pairs))
    # Multiply-adds of the blocks' matrices for the tokens that had to be run: the shared prompt and two letters.
    a_token = 2 * cfg.n_layers * (4 * cfg.d_model**2 + 3 * cfg.d_model * cfg.d_mlp)
    limit = matmul_limit(device, dtype, 8192 if device.type == "cuda" else 512)
    share = options.pairs * (options.prompt + 1) * a_token / time / limit
    rows.append(
        [
            "extraction, all layers",
            f"{options.pairs / time:.1f} pairs/s",
            f"{share:.0%} of the matrix limit",
            f"{peak:.2f} GiB",
        ]
    )

    def two_forwards(some):
        for both in some:
            for p in both:
                model.run_with_cache(
                    torch.tensor([p.tokens], device=device), names_filter=lambda name: name.endswith("resid_post")
                )

    few = pairs[: max(2, options.pairs // 8)]
    slow, _ = peak_of(lambda: two_forwards(few))
    rows.append(
        [
            "two forwards a pair, resid_post kept",
            f"{len(few) / slow:.1f} pairs/s",
            f"ours is {slow / len(few) / (time / options.pairs):.1f} times faster",
            "",
        ]
    )

    vectors = cl.SteeringVectors(directions=torch.randn(cfg.n_layers, cfg.d_model), layers=tuple(range(cfg.n_layers)))
    vectors = vectors.to(device)
    conditions = [(Intervention(vector=v, multiplier=m).edit(0),) for v in vectors for m in MULTIPLIERS] + [()]
    questions = [p for p, _ in pairs[: max(2, options.pairs // 4)]]

    def staircase():
        for p in questions:
            prefix = shared_prefix.prefill(model, [p.tokens[: p.steer_start]])
            stairs = Staircase(conditions, device)
            resid = shared_prefix.run_suffixes(model, prefix, [[p.tokens[p.steer_start :]]], stairs)
            model.ln_final(resid[:, :, -1]) @ model.W_U[:, [29909, 29933]]

    seconds(staircase)  # warm up
    time, peak = peak_of(staircase)
    per_second = len(conditions) * len(questions) / time
    rows.append([f"sweep, {len(conditions)} conditions", f"{per_second:.0f} conditions/s", "", f"{peak:.2f} GiB"])

    def naive():
        for layer in (1, cfg.n_layers - 1):
            hook = vectors[layer].hook(start=questions[0].steer_start)
            model.run_with_hooks(torch.tensor([questions[0].tokens], device=device), fwd_hooks=[hook])

    seconds(naive)
    slow, peak = peak_of(naive)
    rows.append(
        [
            "one full forward a condition",
            f"{2 / slow:.1f} conditions/s",
            f"the sweep is {per_second * slow / 2:.0f} times faster",
            f"{peak:.2f} GiB",
        ]
    )

    for n_rows in options.batches:
        prompts = [p for p, _ in pairs[:1]] * n_rows

        def run(given, prompts=prompts):
            return list(generate_tokens(model, prompts, vectors=given, max_new_tokens=options.tokens))

        run([])
        steering = [(vectors[cfg.n_layers // 2], 1.0)]
        unsteered, _ = peak_of(lambda run=run: run([]))
        steered, peak = peak_of(lambda run=run, steering=steering: run(steering))
        rows.append(
            [
                f"generation, batch {n_rows}, steered",
                f"{n_rows * options.tokens / steered:.1f} tokens/s",
                f"{unsteered / steered:.2f} of unsteered",
                f"{peak:.2f} GiB",
            ]
        )
    print_table(
        f"Llama 2 {options.shape} shape, {options.dtype}, prompts of {options.prompt} tokens",
        ["work", "rate", "against", "peak memory above the weights"],
        rows,
    )


if __name__ == "__main__":
    main()
