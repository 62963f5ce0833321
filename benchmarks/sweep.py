"""A whole layer x multiplier sweep against one full forward a condition.

    python benchmarks/sweep.py                      # A/B letters, 20 questions, 30 layers x 5 multipliers
    python benchmarks/sweep.py --completions        # pairs of full completions, same grid
    python benchmarks/sweep.py --transfer           # also a 30 x 30 matrix: every layer's vector at every layer
    python benchmarks/sweep.py --questions 4        # quicker

The naive ways run a few of the conditions on every question, and their time is scaled to the whole grid: every
condition costs them the same. All ratios are taken in one process.
"""

import argparse

import torch
from timing import as_transformer_lens_loads_it, print_table, seconds

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.prompt_formats import default_format, encode_answer, encode_letters
from caa_lens.steering.interventions import Intervention

MULTIPLIERS = [-2.0, -1.0, 0.0, 1.0, 2.0]
SAMPLED = [(3, 1.0), (20, -2.0)]  # the conditions that the naive ways run


def naive(model, prompts, condition):
    """Full forwards with a plain hook, logits of the whole vocabulary at every position, as in tutorials."""
    layer, multiplier = condition
    out = []
    for prompt, vector in prompts:

        def steer(resid, hook, prompt=prompt, vector=vector):
            resid = resid.clone()
            resid[:, prompt.steer_start :] += multiplier * vector[layer].direction
            return resid

        logits = model.run_with_hooks(
            torch.tensor([prompt.tokens]), fwd_hooks=[(f"blocks.{layer}.hook_resid_post", steer)]
        )
        out.append(logits[0])
    return out


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--completions", action="store_true")
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = cl.load_model("demo", device="cpu", dtype="float32")
    theirs = as_transformer_lens_loads_it(model)
    pairs = cl.ContrastSet.load("sentiment" if options.completions else "sycophancy").sample(options.questions, seed=0)
    vectors = cl.SteeringVectors(
        directions=10 * torch.nn.functional.normalize(torch.randn(30, 576, generator=torch.Generator().manual_seed(0))),
        layers=tuple(range(30)),
    )
    fmt = default_format(model)
    if options.completions:
        sides = [[encode_answer(fmt, model.tokenizer, p.question, a) for a in (p.positive, p.negative)] for p in pairs]
        prompts = [(prompt, vectors) for both in sides for prompt in both]
    else:
        encoded = [encode_letters(fmt, model.tokenizer, p.question, (p.positive[1], p.negative[1])) for p in pairs]
        prompts = [(prompt, vectors) for prompt, _ in encoded]
    grid = [(layer, m) for layer in range(30) for m in MULTIPLIERS]
    conditions = [(Intervention(vector=vectors[layer], multiplier=m),) for layer, m in grid]

    result = score_answers(model, pairs, conditions[:5], progress=False)  # warm up
    engine = seconds(
        lambda: globals().__setitem__("RESULT", score_answers(model, pairs, conditions, progress=False)), 2
    )
    result = globals()["RESULT"]
    plain = seconds(lambda: [model(torch.tensor([p.tokens])) for p, _ in prompts], 2)
    prefill = seconds(
        lambda: [
            shared_prefix.prefill(model, [p.tokens[: p.steer_start]]) for p, _ in prompts[:: 1 + options.completions]
        ],
        2,
    )
    times, worst = {}, 0.0
    for name, some in (("laid out", model), ("as TransformerLens loads it", theirs)):
        times[name] = 0.0
        for condition in SAMPLED:
            kept = []
            times[name] += seconds(lambda some=some, c=condition, kept=kept: kept.extend(naive(some, prompts, c)))
            column = grid.index(condition)
            for i in range(len(pairs)):
                if options.completions:
                    values = []
                    for logits, (prompt, _) in zip(kept[2 * i : 2 * i + 2], prompts[2 * i : 2 * i + 2], strict=True):
                        logp = logits.log_softmax(-1)
                        targets = prompt.tokens[prompt.answer_start :]
                        values.append(
                            sum(logp[prompt.answer_start + k - 1, t] for k, t in enumerate(targets)) / len(targets)
                        )
                    expected = values[0] - values[1]
                else:
                    ids = encoded[i][1]
                    p = kept[i][-1].softmax(-1)
                    expected = p[ids[0]] / (p[ids[0]] + p[ids[1]])
                worst = max(worst, abs(float(expected - result.values[i, column])))
        times[name] *= len(grid) / len(SAMPLED)
    effect = float((result.values - result.values[:, 2:3]).abs().max())
    lengths = [len(p) for p, _ in prompts]
    tail = [len(p) - p.steer_start for p, _ in prompts]
    print_table(
        f"{len(grid)} conditions x {len(pairs)} questions, {'completions' if options.completions else 'A/B letters'}, "
        f"prompts of {min(lengths)} to {max(lengths)} tokens, {min(tail)} to {max(tail)} of them steered",
        [
            "way",
            "seconds",
            "times faster than naive (TransformerLens' layout)",
            "than naive (laid out)",
            "plain passes",
        ],
        [
            [name, t, times["as TransformerLens loads it"] / t, times["laid out"] / t, t / plain]
            for name, t in [
                (
                    "one full forward a condition, as TransformerLens loads it (scaled)",
                    times["as TransformerLens loads it"],
                ),
                ("one full forward a condition, laid out (scaled)", times["laid out"]),
                ("score() of this library", engine),
                ("one plain forward pass over the same texts", plain),
                ("the prefill alone", prefill),
            ]
        ],
    )
    if options.transfer:
        matrix = [(Intervention(vector=v.at_layer(target)),) for v in vectors for target in range(30)]
        time = seconds(lambda: score_answers(model, pairs, matrix, progress=False))
        print(
            f"\n{len(matrix)} conditions of a 30 x 30 layer-transfer matrix: {time:.3g} s, {time / engine:.2f} sweeps"
        )
    print(f"\nlargest difference from naive: {worst:.1e}; largest steering effect in this run: {effect:.2f}")


if __name__ == "__main__":
    main()
