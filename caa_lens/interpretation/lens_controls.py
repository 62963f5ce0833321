"""The control of a lens: what random directions of the same norm say, given the same treatment.

Whatever is pushed through a network says something, and tokens that look like a meaning can be what the network
answers to any push. So a reading stands beside n random directions u_j with the vector's norm, in the same place.

Of a direction's scores over the vocabulary, read on two halves A and B of the prompts (every other one), ::

    agreement = mean over the vocabulary of z_A^2 z_B^2,      z = (scores - mean) / standard deviation

a kurtosis that both halves share: 1 if the halves have nothing to do with each other, 3 for scores of a bell shape that
are the same on both, and more only if some tokens stand far out of all others, and are the same ones on other prompts.
It does not depend on the scores' size. With one prompt both halves are that prompt, and it is the plain kurtosis. Its
p-value is that of a permutation test, ::

    p = ( 1 + number of controls with at least the vector's agreement ) / ( n + 1 )

For a vector that is itself a random direction all n + 1 orders are equally likely, so p is uniform on 1 / (n + 1), ...,
1, whatever the network. With fewer than 19 controls it cannot be as small as 0.05, and the table says so. One layer in
twenty falls below 0.05 by chance: a lone readable layer among many says little.
It is a test of the top tokens as such; the rank of words that were chosen beforehand (`word_ranks`) is a sharper one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models.placement import device_behind
from caa_lens.models.unembedding import is_linear_behind_the_norm, unembed_linear

CONTROLS = 19
CERTAIN = 0.05
READABLE, NOTHING, TOO_FEW, UNCONTROLLED = "readable", "nothing to read here", "too few controls to say", "no controls"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Controlled:
    """One layer's vector and its controls, after all prompts.

    Attributes:
        scores: the vector's.
        agreement: of the vector, and then of every control.
        ranks: of the asked tokens under every control, each also under its negative where the reading is odd.
    """

    scores: Float[Tensor, " d_vocab"]
    agreement: Float[Tensor, " direction"]
    ranks: Int[Tensor, "control token"]


def random_directions(n: int, d_model: int, seed: int) -> Float[Tensor, "direction d_model"]:
    """Drawn uniformly from the sphere of radius 1; on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed((seed + 1) % 2**63)  # not those of the background
    drawn = torch.randn(n, d_model, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def with_random_directions(
    steps: Float[Tensor, "layer d_model"], n: int, seed: int
) -> Float[Tensor, "layer direction d_model"]:
    """Each layer's step, and then n random directions of its norm, the same at every layer but for their length."""
    units = random_directions(n, steps.shape[-1], seed).to(steps.device)
    return torch.cat([steps[:, None], steps.norm(dim=-1)[:, None, None] * units], dim=1)


def controlled(
    halves: Float[Tensor, "direction half d_vocab"],
    scores: Float[Tensor, "direction d_vocab"],
    tokens: Sequence[int],
    *,
    odd: bool,
) -> Controlled:
    """What a layer's scores on both halves, and on all prompts, say; direction 0 is the vector's.

    Args:
        odd: whether the negative of a direction has the negative of its scores.
    """
    wanted = torch.tensor(tokens, dtype=torch.long, device=scores.device)
    of_controls = torch.cat([scores[1:], -scores[1:]]) if odd else scores[1:]
    ranks = torch.stack([ranks_of(each, wanted) for each in of_controls]) if len(of_controls) else None
    return Controlled(
        scores=scores[0],
        agreement=agreement(halves),
        ranks=torch.empty(0, len(wanted), dtype=torch.long) if ranks is None else ranks.cpu(),
    )


def controlled_sums(
    model: Any,
    sums: Float[Tensor, "direction half width"],
    counts: tuple[int, int],
    tokens: Sequence[int],
    *,
    odd: bool,
    normaliser: float | None = None,
) -> Controlled:
    """The same of sums over prompts: of the normalised stream, which is unembedded here, or of logits.

    Args:
        counts: how much is summed up in either half; nothing in the second one, if there is one prompt.
        normaliser: what is taken from the vector's scores; their mean by default.
    """
    if is_linear_behind_the_norm(model):
        sums = unembed_linear(model, sums.to(device_behind(model)))
    scores = sums.sum(1) / sum(counts)
    halves = sums / torch.tensor(counts, device=sums.device).clamp_min(1)[:, None]
    if not counts[1]:
        halves = halves[:, [0, 0]]
    centred = scores - scores.mean(-1, keepdim=True)
    if normaliser is not None:
        centred = torch.cat([scores[:1] - normaliser, centred[1:]])
    return controlled(halves, centred, tokens, odd=odd)


def ranks_of(scores: Float[Tensor, " d_vocab"], tokens: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """1 + the number of tokens with a higher score."""
    return torch.stack([1 + (scores > scores[token]).sum() for token in tokens]) if len(tokens) else tokens


def agreement(halves: Float[Tensor, "direction half d_vocab"]) -> Float[Tensor, " direction"]:
    """See the module's formula; on the CPU."""
    centred = halves - halves.mean(-1, keepdim=True)
    z = centred / centred.std(-1, keepdim=True).clamp_min(1e-30)
    return (z[:, 0] ** 2 * z[:, 1] ** 2).mean(-1).cpu()


def p_value(values: Float[Tensor, " direction"]) -> float:
    """Of the first among all: how many of the others are at least as large."""
    return (1 + int((values[1:] >= values[0]).sum())) / len(values)


def verdict(p: float, n_controls: int) -> str:
    """Whether there is something to read, in words."""
    if not n_controls:
        return UNCONTROLLED
    if n_controls + 1 < round(1 / CERTAIN):
        return TOO_FEW
    return READABLE if p <= CERTAIN + 1e-9 else NOTHING


def layer_table(layers: Sequence[int], found: Sequence[Controlled]) -> pd.DataFrame:
    """One row a layer: `layer, agreement, control_low, control_high, p_value, verdict`.

    `control_low` and `control_high` are the controls' 5th and 95th percentile of the agreement.
    """
    rows = []
    for layer, one in zip(layers, found, strict=True):
        controls = one.agreement[1:]
        low, high = percentile_range(controls.tolist())
        p = p_value(one.agreement) if len(controls) else float("nan")
        rows.append((layer, float(one.agreement[0]), low, high, p, verdict(p, len(controls))))
    return pd.DataFrame(rows, columns=["layer", "agreement", "control_low", "control_high", "p_value", "verdict"])


def percentile_range(values: Sequence[float | int]) -> tuple[float, float]:
    """The 5th and the 95th percentile; NaN of nothing."""
    if not len(values):
        return float("nan"), float("nan")
    ends = torch.quantile(torch.tensor(values, dtype=torch.double), torch.tensor([0.05, 0.95], dtype=torch.double))
    return float(ends[0]), float(ends[1])
