"""How often each call waits for the card, and how often it copies something up, at the shape of Llama 2 7B.

    python benchmarks/waits.py                  # minutes: all calls
    python benchmarks/waits.py sweep transfer   # some of them
    python benchmarks/waits.py sweep --places   # and where in the library

Counted on a device that computes nothing (`tests/helpers/fake_gpu.py`), so no card is needed and nothing is measured. A
wait keeps the program from preparing the card's next work while it does the last.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.interpretation import attribution
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.models.loading.tokenizers import folder_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.fake_gpu import fake_gpu, llama

LETTERS = cl.ContrastSet.load("sycophancy").sample(24, seed=0)
COMPLETIONS = cl.ContrastSet.load("sentiment").sample(8, seed=0)
FREE = 40 * 10**9  # bytes, from which the engine works out how much runs at once
# What is read of a card decides only these: no vector is infinite, and no text ends early.
READS = {"check_rows": False, "generate_tokens": False, "_warn_of_zero": False, "_sees": False}


def calls(model, vectors):
    """What is counted: a description and the call, by name."""
    at_13 = [(vectors[13], 2.0)]
    questions = ["How was your day?", "Is the sky blue, or is it something else?"]
    return {
        "extract": ("`extract`, 24 pairs, 3 batches", lambda: cl.extract(model, LETTERS, progress=False)),
        "sweep": (
            "`sweep`, 32 layers x 5 multipliers, 24 questions",
            lambda: cl.sweep(model, LETTERS, vectors, multipliers=[-2, -1, 0, 1, 2], progress=False),
        ),
        "transfer": (
            "`transfer`, 32 x 32 layers, 6 questions",
            lambda: cl.transfer_layers(model, LETTERS.sample(6, seed=1), vectors, progress=False),
        ),
        "similarity": (
            "`token_similarity`, 32 layers",
            lambda: cl.token_similarity(model, questions[0], vectors, answer="Fine, thank you."),
        ),
        "letters": (
            "`pair_activations`, 24 pairs of letters, 3 batches",
            lambda: cl.engine.pair_activations(model, LETTERS, progress=False),
        ),
        "completions": (
            "`pair_activations`, 8 pairs of completions, 1 + 2 batches",
            lambda: cl.engine.pair_activations(model, COMPLETIONS, progress=False),
        ),
        "generate": (
            "`generate`, 2 texts of 16 tokens",
            lambda: cl.generate(model, questions, vectors=at_13, max_new_tokens=16),
        ),
        "sampled": (
            "`generate`, the same, sampled",
            lambda: cl.generate(model, questions, vectors=at_13, max_new_tokens=16, temperature=0.7),
        ),
        "lens": ("`logit_lens`, 32 layers", lambda: cl.logit_lens(model, vectors)),
        "ranks": (
            "`word_ranks`, 32 layers, 3 words",
            lambda: cl.word_ranks(model, vectors, ["happy", "sad", "yes"]),
        ),
        "stream": (
            "`residual_lens`, 32 layers, 2 runs",
            lambda: cl.residual_lens(model, questions[0], vectors=at_13),
        ),
        "attribute": (
            "`attribute`, 24 questions, 3 batches",
            lambda: cl.interpretation.attribute_logits(model, LETTERS, vectors[13], progress=False),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--places", action="store_true")
    options = parser.parse_args()
    tokenizer = folder_tokenizer(demo_model_path())
    vectors = cl.SteeringVectors(directions=torch.randn(options.layers, 4096), layers=tuple(range(options.layers)))
    with fake_gpu(**READS):
        model = llama(n_layers=options.layers, tokenizer=tokenizer)
        # What is found out once a model is not counted.
        cl.engine.pair_activations(model, COMPLETIONS.sample(1, seed=0), progress=False)
        cl.logit_lens(model, vectors)
    print("| call | waits | uploads |\n|---|---|---|")
    for name, (description, call) in calls(model, vectors).items():
        if options.names and name not in options.names:
            continue
        with (
            patch.object(shared_prefix, "free_memory", lambda device: FREE),
            patch.object(attribution, "_check_sum", lambda *_: None),  # numbers that are read are not those that add up
            fake_gpu(**READS) as gpu,
        ):
            call()
        print(f"| {description} | {gpu.waits} | {gpu.uploads} |", flush=True)
        if options.places:
            for (what, place), n in gpu.places.most_common():
                print(f"    {n} {what}s at {place}")


if __name__ == "__main__":
    main()
