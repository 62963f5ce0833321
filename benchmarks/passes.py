"""What a sweep and an extraction cost in plain forward passes, counted at the shapes of Llama 2.

    python benchmarks/passes.py                       # letters: two tokens of each question are steered
    python benchmarks/passes.py --suffix 20 --prompt 60 80 100
    python benchmarks/passes.py --shapes 70B --prompt 80

Counted are the operations of matrix products and attention, as the library's own engine does them, by torch's counter,
on a device that computes nothing (`tests/helpers/fake_gpu.py`): no card is needed and nothing is measured. A plain pass
is `model(tokens)` over the same question, without logits. Beside the count stand its formula, and its floor: what is
left if nothing at all is computed twice, or without being read.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.engine.activations import read_pairs
from caa_lens.engine.staircase import Staircase
from caa_lens.prompts.prompt_formats import Prompt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.fake_gpu import SHAPES, fake_gpu, llama


class _NoModules:
    """In the place of torch's `ModuleTracker`, whose hooks at every module would send the engine the plain way."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flops(run: Callable[[], object]) -> int:
    """Operations of matrix products and attention, a multiplication and an addition being two."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.scaled_dot_product_attention: sdpa_flop})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with fake_gpu(), counter:
        run()
    return counter.get_total_flops()


# ---- what is counted ------------------------------------------------------------------------------------------------


def sweep(model: Any, n_prompt: int, n_suffix: int, n_multipliers: int) -> int:
    """A sweep over all layers, of one question of `n_prompt` tokens, the last `n_suffix` steered."""
    n_layers = model.cfg.n_layers
    vectors = cl.SteeringVectors(directions=torch.ones(n_layers, model.cfg.d_model), layers=tuple(range(n_layers)))
    multipliers = [m - n_multipliers // 2 for m in range(n_multipliers)]  # one of them is 0
    conditions = [(cl.Intervention(vector=v, multiplier=m).edit(0),) for v in vectors for m in multipliers]
    tokens = [1] * n_prompt

    def run() -> None:
        stairs = Staircase(conditions, model.W_E.device)
        prefix = shared_prefix.prefill(model, [tokens[:-n_suffix]])
        shared_prefix.run_suffixes(model, prefix, [[tokens[-n_suffix:]]], stairs)

    return flops(run)


def extraction(model: Any, n_prompt: int) -> int:
    """An extraction of one pair, whose prompts of `n_prompt` tokens differ in the last."""
    positive, negative = (
        replace(Prompt.from_tokens([*[1] * (n_prompt - 1), letter]), read=(n_prompt - 1, n_prompt)) for letter in (2, 3)
    )
    with fake_gpu(_sees=False):
        shared_prefix.unsupported(model)  # which runs a short prompt, once a model
    return flops(lambda: list(read_pairs(model, [(positive, negative)])))


def plain(model: Any, n_prompt: int) -> int:
    """A plain forward pass, without logits."""
    tokens = [[1] * n_prompt]
    n_layers = model.cfg.n_layers
    return flops(lambda: model(torch.tensor(tokens, device=model.W_E.device), stop_at_layer=n_layers))


# ---- the same by arithmetic -----------------------------------------------------------------------------------------


class Work:
    """Operations of one token in one block, of a model's shape."""

    def __init__(self, cfg: Any) -> None:
        width, keys = cfg.n_heads * cfg.d_head, (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
        self.n_layers = cfg.n_layers
        self.read = 2 * cfg.d_model * (width + 2 * keys)  # queries, keys and values
        self.keys = 2 * cfg.d_model * 2 * keys
        self.rest = 2 * cfg.d_model * (width + 3 * cfg.d_mlp)  # attention's output, and the MLP
        self.seen = 4 * width  # for every token that it attends to

    def block(self, n_seen: int) -> int:
        """One token through one block, attending to `n_seen` tokens."""
        return self.read + self.rest + n_seen * self.seen

    def plain(self, n: int) -> int:
        return n * self.n_layers * self.block(n)

    def prefix(self, n: int) -> int:
        """A prompt that is only attended to: its last block makes keys and values (and queries, which nobody needs)."""
        return n * ((self.n_layers - 1) * self.block(n) + self.read)

    def sweep(self, n_prompt: int, n_suffix: int, n_multipliers: int) -> int:
        rows = sum(1 + (n_multipliers - 1) * layer for layer in range(self.n_layers))  # of all blocks
        return self.prefix(n_prompt - n_suffix) + n_suffix * rows * self.block(n_prompt)

    def extraction(self, n_prompt: int) -> int:
        return self.prefix(n_prompt - 1) + 2 * self.n_layers * self.block(n_prompt)

    def floor(self, n_prompt: int, n_suffix: int, n_multipliers: int) -> int:
        """A sweep in which every distinct stream is multiplied by each matrix once, and only where that is read.

        Less than `sweep` by: queries of the prompt's last block; the last block of the suffix' tokens but the one whose
        logits are read, of which keys and values remain; and the queries, keys and values right above a vector v, which
        are W (x + c v) but for the norm's one number: W x is there for the unsteered row, and W v is the same for every
        question, and so costs none of them anything.
        """
        steered, unread = n_multipliers - 1, n_suffix - 1
        spared = (n_prompt - n_suffix) * (self.read - self.keys)
        spared += unread * (1 + steered * (self.n_layers - 1)) * (self.block(n_prompt) - self.keys)
        spared += steered * (n_suffix * (self.n_layers - 2) * self.read + self.read + unread * self.keys)
        return self.sweep(n_prompt, n_suffix, n_multipliers) - spared


def formula(n_layers: int, n_prompt: int, n_suffix: int, n_multipliers: int) -> float:
    """Tokens times blocks: the prompt once, and on average half of the steered conditions at every block."""
    return 1 + n_suffix * (n_multipliers - 1) * (n_layers - 1) / (2 * n_prompt)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7B", "13B", "70B"])
    parser.add_argument("--prompt", type=int, nargs="+", default=[67, 80, 92, 150])
    parser.add_argument("--suffix", type=int, default=2, help="steered tokens of a question")
    parser.add_argument("--multipliers", type=int, default=5, help="of which one is 0")
    options = parser.parse_args()
    print("| shape | conditions | tokens of a question | steered | sweep | 1 + S m (L - 1) / 2N | floor | extraction |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.shapes:
        with fake_gpu():
            model = llama(**SHAPES[name])
        n_layers, grid = model.cfg.n_layers, f"{model.cfg.n_layers} x {options.multipliers}"
        for n in options.prompt:
            one, told = plain(model, n), (n, options.suffix, options.multipliers)
            shown = [
                f"{sweep(model, *told) / one:.2f}",
                f"{formula(n_layers, *told):.2f}",
                f"{Work(model.cfg).floor(*told) / one:.2f}",
                f"{extraction(model, n) / (2 * one):.3f}",
            ]
            print(f"| {name} | {grid} | {n} | {options.suffix} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
