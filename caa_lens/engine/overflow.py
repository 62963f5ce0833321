"""What does not fit into a model's numbers: steps that are too large, before a run, and scores of NaN, after it.

float16 ends at 65504. A step m v beyond the end of the model's dtype is infinite, and every number behind it NaN; a
step that fits may still meet a residual with which it does not.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.engine.edits import Edit
from caa_lens.models.placement import dtype_name, dtype_of

REMEDY = "use smaller multipliers, or load the model in bfloat16 or float32"


class NotFiniteWarning(UserWarning):
    """Some scores are NaN or infinite, because numbers on the way did not fit into the model's dtype."""


def check_steps(model: Any, edits: Sequence[Edit]) -> None:
    """Raises `ValueError` for a step that the model's dtype, or float32, in which it is formed, cannot hold."""
    if not edits:
        return
    # All vectors at once: a vector on a GPU is waited for once, not once an edit.
    components = [_largest(one) for one in edits]
    largest = torch.stack([one.to(components[0].device) for one in components]).tolist()
    holds, formed_in = torch.finfo(dtype_of(model)).max, torch.finfo(torch.float32).max
    for one, component in zip(edits, largest, strict=True):
        m = float(torch.as_tensor(one.multiplier).detach().double().abs().max())
        # "set" forms m ||v|| first, and "ablate" m times a component of the stream.
        norm = 0.0
        if one.operator == "set" and one.direction is not None:
            norm = component * math.sqrt(len(one.direction))
        step = m if one.operator == "ablate" else m * component
        if max(m, m * norm) > formed_in or step > holds:
            dtype = dtype_name(model) if step > holds else "float32"
            limit = holds if step > holds else formed_in
            raise ValueError(
                f"multiplier {m:g} at layer {one.layer} makes a step with a component of "
                f"{max(step, m * norm):.3g}, more than {dtype} holds ({limit:.3g}): use a smaller multiplier"
                + (", or load the model in bfloat16 or float32" if dtype == "float16" else "")
            )


def _largest(edit: Edit) -> Float[Tensor, ""]:
    """The largest component of what an edit adds at strength 1, as far as that does not depend on the stream."""
    parameters = edit.all_parameters
    added = parameters.get("direction", parameters.get("shift"))
    return torch.ones(()) if added is None else added.detach().abs().max().float()


def check_scores(model: Any, logp: Float[Tensor, "pair condition side"], conditions: Sequence) -> None:
    """Warns of conditions with scores that are not finite.

    Raises:
        ValueError: if no score is finite.
    """
    broken = ~torch.isfinite(logp).all(-1)  # [pair condition]
    of_condition = broken.sum(0).tolist()
    if not any(of_condition):
        return
    dtype = dtype_name(model)
    if bool(broken.all()):
        raise ValueError(
            f"every score of {model.cfg.model_name} is NaN in {dtype}, of {len(logp)} pairs under {len(conditions)} "
            f"conditions: {REMEDY}"
        )
    named = [in_words(one) for one, n in zip(conditions, of_condition, strict=True) if n]
    more = f" and {len(named) - 6} more" if len(named) > 6 else ""
    warnings.warn(
        f"{sum(of_condition)} of {broken.numel()} scores of {model.cfg.model_name} are NaN in {dtype}, under "
        f"{'; '.join(named[:6])}{more}: {REMEDY}",
        NotFiniteWarning,
        stacklevel=4,
    )


def check_finite(model: Any, values: Tensor, what: str) -> None:
    """Raises `ValueError` if any of the values that a run gave is not finite; `what`: "the logits of prompt 2"."""
    if not bool(torch.isfinite(values).all()):
        dtype = dtype_name(model)
        raise ValueError(f"{what} of {model.cfg.model_name} are not finite in {dtype}: {REMEDY}")


def in_words(condition: Sequence[Edit]) -> str:
    """A condition as a warning names it: "layer 3 x 40", or "no steering"."""
    steps = [f"layer {one.layer} x {float(one.multiplier):g}" for one in condition]
    return " with ".join(steps) or "no steering"
