"""What the readings of a lens that run the model cost, in sweeps.

    python benchmarks/lens.py                  # 4 questions, all layers, with the usual controls
    python benchmarks/lens.py --questions 8

A sweep of two multipliers over the same prompts, as pairs of completions, is 1. All ratios are taken in one process.
"""

import argparse

import torch
from timing import cpu_seconds, print_table

import caa_lens as cl
from caa_lens.interpretation.lens_controls import CONTROLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = cl.load_model("demo", device="cpu", dtype="float32")
    pairs = cl.ContrastSet.load("sentiment").sample(options.questions, seed=0)
    drawn = torch.randn(30, 576, generator=torch.Generator().manual_seed(0))
    vectors = cl.SteeringVectors(directions=10 * torch.nn.functional.normalize(drawn), layers=tuple(range(30)))

    def lens(reading: str, controls: int, place: str = "answer"):
        return lambda: cl.logit_lens(
            model, vectors, reading=reading, pairs=pairs, controls=controls, place=place, progress=False
        )

    ways = {
        "sweep of two multipliers": lambda: cl.sweep(model, pairs, vectors, multipliers=[-1, 1], progress=False),
        "causal, no controls": lens("causal", 0),
        f"causal, {CONTROLS} controls": lens("causal", CONTROLS),
        f"causal, {CONTROLS} controls, instruction's end only": lens("causal", CONTROLS, "instruction"),
        f"effect, {CONTROLS} controls": lens("effect", CONTROLS),
    }
    lens("causal", 0, "instruction")()  # what is compared once a model
    took = {name: cpu_seconds(run) for name, run in ways.items()}
    unit = took["sweep of two multipliers"]
    rows: list[list[object]] = [[name, f"{t:.1f}", f"{t / unit:.2f}"] for name, t in took.items()]
    print_table(f"{options.questions} questions, all 30 layers", ["", "CPU seconds", "sweeps"], rows)


if __name__ == "__main__":
    main()
