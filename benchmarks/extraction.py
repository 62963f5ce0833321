"""Steering vectors at all layers from A/B pairs: ours, what a user would write, and the `steering-vectors` package.

    python benchmarks/extraction.py                 # 200 pairs for ours, 20 for the slow ways, scaled
    python benchmarks/extraction.py --pairs 40

`steering-vectors` is optional: `pip install --no-deps steering-vectors`. All ratios are taken in one process.
"""

import argparse
import importlib.util

import torch
from timing import as_transformer_lens_loads_it, print_table, seconds

import caa_lens as cl
from caa_lens.prompts.prompt_formats import default_format, encode_answer

SLOW_PAIRS = 20


def twin(model, prompts, names_filter, stop_at_layer=None):
    """Two forwards a pair, one prompt at a time, and the mean difference at the letter."""
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_model)
    for both in prompts:
        for sign, prompt in zip((1, -1), both, strict=True):
            _, cache = model.run_with_cache(
                torch.tensor([prompt.tokens]), names_filter=names_filter, stop_at_layer=stop_at_layer
            )
            total += sign * torch.stack(
                [cache[f"blocks.{layer}.hook_resid_post"][0, prompt.read[0]] for layer in range(model.cfg.n_layers)]
            )
    return total / len(prompts)


def peer(pairs, fmt, tokenizer):
    """The `steering-vectors` package on the Hugging Face model, in batches of 8."""
    import steering_vectors
    from transformers import AutoModelForCausalLM

    from caa_lens.models.loading.demo_model import demo_model_path

    hf = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    samples = []
    for pair in pairs:
        texts = [encode_answer(fmt, tokenizer, pair.question, a).text[:-1] for a in (pair.positive, pair.negative)]
        samples.append((texts[0], texts[1]))
    tokenizer.padding_side = "left"
    out = []
    time = seconds(
        lambda: out.append(
            steering_vectors.train_steering_vector(hf, tokenizer, samples, read_token_index=-1, batch_size=8)
        )
    )
    tokenizer.padding_side = "right"
    layers = out[0].layer_activations
    return time, torch.stack([layers[layer].float() for layer in sorted(layers)])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = cl.load_model("demo", device="cpu", dtype="float32")
    theirs = as_transformer_lens_loads_it(model)
    both = [*cl.ContrastSet.load("sycophancy"), *cl.ContrastSet.load("refusal")]
    pairs = cl.ContrastSet.from_pairs(both, name="both").sample(options.pairs, seed=0)
    few = pairs.sample(min(SLOW_PAIRS, len(pairs)), seed=0)
    fmt = default_format(model)
    prompts = [tuple(encode_answer(fmt, model.tokenizer, p.question, a) for a in (p.positive, p.negative)) for p in few]
    scale = len(pairs) / len(few)

    kept = {}

    def keep(name, run):
        kept[name] = run()

    only_resid = lambda name: name.endswith("hook_resid_post")  # noqa: E731
    cl.extract(model, few, progress=False)  # warm up
    ours = seconds(lambda: cl.extract(model, pairs, progress=False), 2)
    keep("ours", lambda: cl.extract(model, few, progress=False).directions)
    rows = [("extract() of this library", ours)]
    for label, some in (("laid out", model), ("TransformerLens' layout", theirs)):
        for what, names_filter in (("only resid_post kept", only_resid), ("everything cached", None)):
            name = f"two forwards a pair, {what}, {label} (scaled)"
            rows.append(
                (name, scale * seconds(lambda n=name, s=some, f=names_filter: keep(n, lambda: twin(s, prompts, f))))
            )
    if importlib.util.find_spec("steering_vectors"):
        time, directions = peer(few, fmt, model.tokenizer)
        rows.append(("steering-vectors on the Hugging Face model, batches of 8 (scaled)", scale * time))
        kept[rows[-1][0]] = directions
    table = []
    for name, time in rows:
        same = kept.get(name)
        if same is None:
            table.append([name, time, time / ours, len(pairs) / time, "", ""])
            continue
        cosine = float(torch.cosine_similarity(same, kept["ours"], dim=-1).min())
        norm = float((same.norm(dim=-1) / kept["ours"].norm(dim=-1) - 1).abs().max())
        table.append([name, time, time / ours, len(pairs) / time, f"{cosine:.7f}", f"{norm:.1e}"])
    print_table(
        f"extraction from {len(pairs)} A/B pairs at 30 layers",
        ["way", "seconds", "times ours", "pairs per second", "smallest cosine with ours", "largest norm difference"],
        table,
    )


if __name__ == "__main__":
    main()
