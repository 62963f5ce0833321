"""Tokens a second of steered and unsteered generation: ours, Hugging Face's with a forward hook, TransformerLens' own.

    python benchmarks/generation.py
    python benchmarks/generation.py --tokens 20 --batches 1 8

All ways greedy, the same prompts, no early stop; the tokens must be identical. All ratios are taken in one process.
`steering-vectors` is optional: `pip install --no-deps steering-vectors`.
"""

import argparse
import importlib.util

import torch
from timing import as_transformer_lens_loads_it, print_table, seconds

import caa_lens as cl
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import default_format
from caa_lens.steering.generation import generate_tokens

LAYER, MULTIPLIER = 14, 1.0


def ours(model, prompts, vectors, n):
    eos, model.tokenizer.eos_token = model.tokenizer.eos_token, None  # so that no way stops early
    try:
        return torch.stack(list(generate_tokens(model, prompts, vectors=vectors, max_new_tokens=n)), dim=1)
    finally:
        model.tokenizer.eos_token = eos


def greedy(hf, batch, n):
    """Exactly `n` new tokens of Hugging Face's own generate."""
    out = hf.generate(
        batch.tokens,
        attention_mask=batch.attention_mask.long(),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=2,
    )
    return out[:, batch.tokens.shape[1] :]


def hugging_face(hf, batch, vector, n):
    start = batch.steer_start[:, None, None]

    def steer(module, inputs, output):
        resid = output[0] if isinstance(output, tuple) else output
        if resid.shape[1] == 1:
            steered = resid + MULTIPLIER * vector
        else:
            position = torch.arange(resid.shape[1])[None, :, None]
            steered = torch.where(position >= start, resid + MULTIPLIER * vector, resid)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    handle = hf.model.layers[LAYER].register_forward_hook(steer)
    try:
        return greedy(hf, batch, n)
    finally:
        handle.remove()


def steering_vectors_package(hf, batch, vector, n):
    """The `steering-vectors` package; it can only steer every token of the prompt, so its tokens may differ."""
    from steering_vectors import SteeringVector

    peer = SteeringVector(layer_activations={LAYER: vector}, layer_type="decoder_block")
    with peer.apply(hf, multiplier=MULTIPLIER):
        return greedy(hf, batch, n)


def transformer_lens(model, prompts, vector, n):
    with cl.steer(model, MULTIPLIER * vector, prompt=prompts):
        out = model.generate(
            left_pad(prompts, n_ctx=model.cfg.n_ctx).tokens,
            max_new_tokens=n,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
    return out[:, -n:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import AutoModelForCausalLM

    model = cl.load_model("demo", device="cpu", dtype="float32")
    theirs = as_transformer_lens_loads_it(model)
    hf = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    hf.generation_config.eos_token_id = None
    fmt = default_format(model)
    vector = cl.SteeringVector.from_direction(
        10 * torch.nn.functional.normalize(torch.randn(576, generator=torch.Generator().manual_seed(0)), dim=0), LAYER
    )
    for batch_size in options.batches:
        # One length, so that TransformerLens' generate, which guesses masks from padding, can take part.
        prompts = [fmt.encode(model.tokenizer, "Describe a walk in the park.")] * batch_size
        batch = left_pad(prompts, n_ctx=model.cfg.n_ctx)
        n = options.tokens
        ways = {
            "generate() of this library, steered": lambda p=prompts: ours(model, p, [(vector, MULTIPLIER)], n),
            "generate() of this library, unsteered": lambda p=prompts: ours(model, p, [], n),
            "Hugging Face generate with a forward hook": lambda b=batch: hugging_face(hf, b, vector.direction, n),
            "TransformerLens generate with our hook, laid out": lambda p=prompts: transformer_lens(model, p, vector, n),
            "TransformerLens generate with our hook, its own layout": lambda p=prompts: transformer_lens(
                theirs, p, vector, n
            ),
        }
        if importlib.util.find_spec("steering_vectors"):
            ways["steering-vectors on the Hugging Face model"] = lambda b=batch: steering_vectors_package(
                hf, b, vector.direction, n
            )
        tokens, times = {}, dict.fromkeys(ways, float("inf"))
        for turn in range(options.repeats):  # turn by turn, so that a noisy minute hits all ways
            for name, run in ways.items():
                if turn and "TransformerLens" in name:
                    continue
                times[name] = min(times[name], seconds(lambda name=name, run=run: tokens.__setitem__(name, run())))
        steered = tokens["generate() of this library, steered"]
        base = times["generate() of this library, steered"]
        print_table(
            f"generation of {n} tokens, batch {batch_size}",
            ["way", "tokens per second", "ours / this", "same tokens"],
            [
                [
                    name,
                    batch_size * n / time,
                    time / base,
                    "-"
                    if "unsteered" in name or "steering-vectors" in name
                    else str(bool(torch.equal(tokens[name], steered))),
                ]
                for name, time in times.items()
            ],
        )


if __name__ == "__main__":
    main()
