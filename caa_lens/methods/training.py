"""What learned methods share: batches in a seeded order, a schedule, an early stop, and a look at what diverges."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caa_lens.models.gradients import check_gradients

WORST = 10.0  # times CAA's norm, beyond which a vector has left the stream's own sizes


@dataclass(slots=True)
class Best:
    """The parameters with the lowest loss so far, and when to stop looking for lower ones.

    Attributes:
        patience: after how many epochs without a lower loss to stop; None never.
        losses: of all epochs.
    """

    patience: int | None
    losses: list[float] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    epoch: int = -1

    def take(self, loss: float, parameters: Sequence[Tensor]) -> bool:
        """Keep the parameters if their loss is the lowest; whether to stop."""
        self.losses.append(loss)
        if self.epoch < 0 or loss < self.losses[self.epoch]:
            self.epoch = len(self.losses) - 1
            self.kept = [one.detach().clone() for one in parameters]
        return self.patience is not None and len(self.losses) - 1 - self.epoch >= self.patience


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model's weights without gradients, and afterwards as they were; all else has them, also under `no_grad`.

    Raises:
        ValueError: the model's weights are packed, and its gradients are not its derivatives.
    """
    check_gradients(model)
    asked = [one for one in model.parameters() if one.requires_grad]
    try:
        for one in asked:
            one.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for one in asked:
            one.requires_grad_(True)


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Every index once, in a drawn order, in batches."""
    order = torch.randperm(n, generator=generator).tolist()
    for first in range(0, n, batch_size):
        yield order[first : first + batch_size]


def warm_up_then_cosine(n_steps: int, warm_up: int) -> Callable[[int], float]:
    """The learning rate's factor at a step: from 0 up in a line, then down a half cosine to 0."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up)))

    return factor


def check_training(loss: Tensor, *, step: int, norm: float | None = None, most: float | None = None) -> None:
    """Raises `ValueError` where training diverges: a loss that is not finite, or a norm beyond `most`."""
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"training diverged: the loss is {float(loss)} at step {step}. Use a smaller learning_rate, or load the "
            "model in float32 or bfloat16"
        )
    if norm is not None and most is not None and not norm <= most:
        raise ValueError(
            f"training diverged: the vector's norm is {norm:.3g} at step {step}, more than {WORST:g} times that of the "
            f"mean difference ({most / WORST:.3g}). Use a smaller learning_rate, or fewer epochs"
        )
