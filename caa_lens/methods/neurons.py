"""What a neuron of an MLP is: its activation, before the product with the other half where there is one.

    without a gate    act(pre)     which is what lies at mlp.hook_post
    with a gate       act(pre)     of the gate; at mlp.hook_post lies act(pre) * linear

Which function a gate's act is, numbers tell: the one that makes of pre and linear what the model has behind them.
A product is linear in the activation, so scaling mlp.hook_post is scaling the neuron in both.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from caa_lens.methods.data import check_finite_streams
from caa_lens.methods.reading import read_last_at_sites
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.prompts.prompt_formats import Prompt

PRE, LINEAR, POST = "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": partial(F.gelu, approximate="tanh"),
    "gelu by sigmoid": lambda pre: pre * torch.sigmoid(1.702 * pre),
    "relu": F.relu,
    "relu squared": lambda pre: F.relu(pre).square(),
    "sigmoid": torch.sigmoid,
    "none": lambda pre: pre,
}
CLOSE = 0.02  # of the size of what is behind them: more than rounding in bfloat16, less than another function's


def read_neurons(
    model: Any, prompts: Sequence[Prompt], layers: Sequence[int], **reading: Any
) -> Float[Tensor, "prompt layer d_mlp"]:
    """Each neuron's activation at each prompt's last token, in float32 on the CPU.

    Args:
        reading: `batch_size`, `what` and `progress`, as `reading.read_last_at_sites` takes them.

    Raises:
        ValueError: for a block without neurons of its own, or a gate whose function is none of `ACTIVATIONS`.
    """
    gated = [layer for layer in layers if _has(model, layer, LINEAR)]
    if not gated:
        return read_last_at_sites(model, prompts, layers, [POST], **reading)[POST]
    if len(gated) < len(layers):
        some = sorted(set(layers) - set(gated))
        raise ValueError(f"the MLPs of layers {gated} have gates, and those of layers {some} have none: choose either")
    found = read_last_at_sites(model, prompts, layers, [PRE, LINEAR, POST], **reading)
    check_finite_streams(model, *found.values())
    return ACTIVATIONS[activation_of(model, found[PRE], found[LINEAR], found[POST])](found[PRE])


def activation_of(model: Any, pre: Tensor, linear: Tensor, post: Tensor) -> str:
    """The name of the function with `act(pre) * linear = post`, the nearest of those that are near.

    Raises:
        ValueError: if none is.
    """
    size = float(post.norm())
    errors = {name: float((act(pre) * linear - post).norm()) / size for name, act in ACTIVATIONS.items()}
    nearest = min(errors, key=lambda name: errors[name])
    if not errors[nearest] < CLOSE:
        raise ValueError(
            f"the gates of {model.cfg.model_name!r} have another activation than {', '.join(ACTIVATIONS)} (the nearest "
            f"is {nearest}, which is off by {errors[nearest]:.0%}), so what its neurons are is not known: take "
            "site='hidden' or 'heads'"
        )
    return nearest


def _has(model: Any, layer: int, site: str) -> bool:
    try:
        adapter_of(model).site(model, layer, site)
    except ValueError:
        return False
    return True
