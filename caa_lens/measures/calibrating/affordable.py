"""How many neutral prompts and tokens a calibration can afford, counted beforehand.

Each token of a neutral answer that a divergence is measured at costs an unembedding over the whole vocabulary and the
blocks above the steered one, for every candidate. A sweep of A/B pairs has two steered tokens a question, so ten
answers of 32 tokens at every candidate would cost several sweeps. How many are taken is worked out from numbers of
tokens and the sizes of blocks and vocabulary, so that all of it together stays at a share of the sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine import shared_prefix
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, encode_answer, encode_letters

# Against a token of a sweep's many rows, measured on a CPU: the softmax over the vocabulary is more than its product,
# and a token that is generated waits for all weights.
UNEMBEDDING, KL_ROWS, GENERATED = 1.5, 1.3, 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How many neutral prompts and tokens of each answer: at every candidate, at leading layers, and to report."""

    few: tuple[int, int]
    full: tuple[int, int]
    report: tuple[int, int]
    n_leading: int


# From the fullest to the least; the first that the price allows is taken.
LADDER = (
    Lengths(few=(4, 8), full=(10, 32), report=(24, 32), n_leading=4),
    Lengths(few=(3, 8), full=(10, 24), report=(24, 24), n_leading=3),
    Lengths(few=(2, 8), full=(8, 16), report=(16, 16), n_leading=3),
    Lengths(few=(2, 6), full=(6, 16), report=(12, 16), n_leading=2),
    Lengths(few=(1, 6), full=(4, 16), report=(8, 16), n_leading=2),
    Lengths(few=(1, 4), full=(3, 12), report=(6, 12), n_leading=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the work is counted from: tokens of the pairs and neutral prompts, blocks, and one unembedding in blocks."""

    prefix: int
    suffix: int
    test: float
    neutral: float
    n_blocks: int
    unembedding: float
    shared: bool

    def sweep(self, layers: Sequence[int], n_multipliers: int) -> float:
        """The work of a sweep, in tokens through one block."""
        if not self.shared:
            return float((self.prefix + self.suffix) * self.n_blocks * len(layers) * (n_multipliers + 1))
        above = sum(self.n_blocks - 1 - layer for layer in layers)
        return float(self.prefix * self.n_blocks + self.suffix * (self.n_blocks + n_multipliers * above))

    def calibration(self, lengths: Lengths, layers: Sequence[int], n_multipliers: int) -> float:
        """What a calibration does beside its sweep."""
        n_candidates = n_multipliers * len(layers)
        each = sum(self.n_blocks - 1 - layer for layer in layers) / len(layers)
        few, full, report = (
            self._kl(n, k, which)
            for n, k, which in (
                (n_candidates, each, lengths.few),
                (10 * lengths.n_leading, each, lengths.full),
                (3, each, lengths.report),
            )
        )
        asked = lengths.full[0] * lengths.full[1] + 3 * lengths.report[0] * lengths.report[1]
        generated = GENERATED * asked * (self.n_blocks + self.unembedding)
        read = 3 * lengths.report[0] * lengths.report[1] * (self.n_blocks + self.unembedding)
        test = self.test * (self.prefix * self.n_blocks + self.suffix * (self.n_blocks + 2 * each))
        return few + full + report + generated + read + test

    def _kl(self, n_conditions: int, above: float, which: tuple[int, int]) -> float:
        n_prompts, n_tokens = which
        # Each prompt, and its answer without steering.
        begun = n_prompts * ((self.neutral + n_tokens) * self.n_blocks + UNEMBEDDING * n_tokens * self.unembedding)
        blocks = (n_tokens + 1) * above if self.shared else (self.neutral + n_tokens) * self.n_blocks
        return begun + KL_ROWS * n_conditions * n_prompts * (blocks + UNEMBEDDING * n_tokens * self.unembedding)


def sizes_of(
    model: Any,
    pairs: ContrastSet,
    neutral: Sequence[Prompt],
    prompt_format: PromptFormat,
    system: str | None,
    test: float,
) -> Sizes:
    """Counted of a model and its pairs.

    Args:
        test: the share of the pairs that are scored once more.
    """
    prefix = suffix = 0
    for pair in pairs:
        if pairs.kind == "ab":
            letters = (pair.positive[1], pair.negative[1])
            opened, _ = encode_letters(
                prompt_format, model.tokenizer, pair.question, letters, system=system, warn=False
            )
            branches = [opened]
        else:
            branches = [
                encode_answer(prompt_format, model.tokenizer, pair.question, answer, system=system, warn=False)
                for answer in (pair.positive, pair.negative)
            ]
        prefix += branches[0].steer_start
        suffix += sum(len(one) - one.steer_start for one in branches)
    cfg = model.cfg
    a_block = sum(p.numel() for p in model.blocks.parameters()) / cfg.n_layers
    return Sizes(
        prefix=prefix,
        suffix=suffix,
        test=test,
        neutral=float(np.mean([len(one) for one in neutral])),
        n_blocks=cfg.n_layers,
        unembedding=cfg.d_model * cfg.d_vocab / a_block,
        shared=shared_prefix.unsupported(model) is None,
    )


def lengths_for(sizes: Sizes, layers: Sequence[int], n_multipliers: int, price: float) -> Lengths:
    """The fullest lengths whose work is at most `price` times the sweep's; the least where even those are more."""
    most = price * sizes.sweep(layers, n_multipliers)
    return next((one for one in LADDER if sizes.calibration(one, layers, n_multipliers) <= most), LADDER[-1])
