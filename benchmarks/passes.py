"""What a sweep costs in plain forward passes, counted at the shapes of Llama 2.

    python benchmarks/passes.py                       # letters: two tokens of each question are steered
    python benchmarks/passes.py --suffix 20 --prompt 60 80 100

Counted are the operations of matrix products and attention, as the library's own engine does them, on a device that
computes nothing (`tests/fake_gpu.py`): no card is needed and nothing is measured. A plain pass is `model(tokens)` over
the same question, without logits.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.engine.staircase import Staircase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.fake_gpu import fake_gpu, llama

SHAPES = {
    "7b": {"n_layers": 32, "d_model": 4096, "d_mlp": 11008, "n_heads": 32},
    "13b": {"n_layers": 40, "d_model": 5120, "d_mlp": 13824, "n_heads": 40},
}


def flops(run) -> int:
    with fake_gpu(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def passes(model, n_prompt: int, n_suffix: int, n_multipliers: int) -> float:
    """Plain passes that a sweep over all layers costs a question of `n_prompt` tokens, the last `n_suffix` steered."""
    n_layers = model.cfg.n_layers
    vectors = cl.SteeringVectors(directions=torch.ones(n_layers, model.cfg.d_model), layers=tuple(range(n_layers)))
    multipliers = [m - n_multipliers // 2 for m in range(n_multipliers)]  # one of them is 0
    conditions = [(cl.Intervention(vector=v, multiplier=m).edit(0),) for v in vectors for m in multipliers]
    tokens = [1] * n_prompt

    def sweep():
        stairs = Staircase(conditions, "cuda")
        prefix = shared_prefix.prefill(model, [tokens[:-n_suffix]])
        shared_prefix.run_suffixes(model, prefix, [[tokens[-n_suffix:]]], stairs)

    plain = flops(lambda: model(torch.tensor([tokens], device="cuda"), stop_at_layer=n_layers))
    return flops(sweep) / plain


def formula(n_layers: int, n_prompt: int, n_suffix: int, n_multipliers: int) -> float:
    """Tokens times blocks: the prompt once, and on average half of the steered conditions at every block."""
    return 1 + n_suffix * (n_multipliers - 1) * (n_layers - 1) / (2 * n_prompt)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b", "13b"])
    parser.add_argument("--prompt", type=int, nargs="+", default=[67, 80, 92, 150])
    parser.add_argument("--suffix", type=int, default=2, help="steered tokens of a question")
    parser.add_argument("--multipliers", type=int, default=5, help="of which one is 0")
    options = parser.parse_args()
    print("| shape | conditions | tokens of a question | steered | plain passes | 1 + S m (L - 1) / 2N |")
    print("|---|---|---|---|---|---|")
    for name in options.shapes:
        with fake_gpu():
            model = llama(**SHAPES[name])
        n_layers = model.cfg.n_layers
        for n_prompt in options.prompt:
            counted = passes(model, n_prompt, options.suffix, options.multipliers)
            expected = formula(n_layers, n_prompt, options.suffix, options.multipliers)
            grid = f"{n_layers} x {options.multipliers}"
            print(f"| {name} | {grid} | {n_prompt} | {options.suffix} | {counted:.2f} | {expected:.2f} |")


if __name__ == "__main__":
    main()
