"""Whether a model's gradients are its derivatives: asked of packed weights, before anything is learned through them.

A product with packed weights is an operation of its own, and not every device's has a backward: bitsandbytes' for 4
bits has none on many CPUs after its first run, of which torch only warns. Of a block's derivative the skip connections
alone would be left then. A linear layer is its own derivative, so one of every class, shape and device is asked both
ways.
"""

import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.placement import dtype_name, dtype_of
from caa_lens.models.structure import without_users_hooks

APART = 0.2  # of the derivative's size; 8 bits round by some hundredths, a lost backward is 1
N_DIRECTIONS = 8

_right: WeakSet[Any] = WeakSet()


def check_gradients(model: Any) -> None:
    """Compare gradients with differences, of a model with packed weights, once; of others nothing is asked.

    Raises:
        ValueError: a gradient is not the derivative.
    """
    if adapter_of(model).quantised(model) is None or model in _right:
        return
    with torch.inference_mode(False), without_users_hooks(model):
        for name, linear in _packed(model):
            apart = _apart(linear, dtype_of(model))
            if not apart <= APART:
                raise ValueError(
                    f"nothing can be learned through {model.cfg.model_name} ({dtype_name(model)}): the gradient of "
                    f"{name} ({type(linear).__name__}) is not its derivative, by {apart:.2g} of its size. bitsandbytes "
                    "may have no backward for 4 bits on a CPU: use quantised='8bit', plain weights, or a card"
                )
    _right.add(model)


def _packed(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """One linear layer of whole numbers of every class, shape and device, by name."""
    seen = set()
    for name, module in adapter_of(model).modules(model):
        kept = [*module._parameters.values(), *module._buffers.values()]
        whole = [tensor for tensor in kept if tensor is not None and not tensor.is_floating_point()]
        if not whole or not hasattr(module, "in_features"):
            continue
        kind = (type(module), module.in_features, module.out_features, whole[0].device)
        if kind not in seen:
            seen.add(kind)
            yield name.replace("._original_component", ""), module


def _apart(linear: Any, dtype: torch.dtype) -> float:
    """The relative difference of a layer's derivative along random directions, by gradient and by difference."""
    generator = torch.Generator().manual_seed(0)
    device = next(iter(linear.parameters()), torch.empty(0)).device
    device = torch.device("cpu") if device.type == "meta" else device  # accelerate moves what goes in

    def drawn(width: int) -> torch.Tensor:
        return torch.randn(1, 3, width, generator=generator).to(device, dtype)

    given, weights = drawn(linear.in_features), drawn(linear.out_features).float()

    def sum_of(x: torch.Tensor) -> torch.Tensor:
        return (linear(x).float().to(device) * weights).sum()

    directions = [drawn(linear.in_features) for _ in range(N_DIRECTIONS)]
    with torch.no_grad():  # at first, as a model is used before something is learned through it
        found = [float(sum_of(given + one) - sum_of(given - one)) / 2 for one in directions]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*an autograd kernel was not registered", UserWarning)
        x = given.clone().requires_grad_()
        total = sum_of(x)
        gradient = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        return 1.0
    one = torch.tensor([float((gradient.float() * direction.float()).sum()) for direction in directions]).double()
    other = torch.tensor(found).double()
    return float(((one - other).norm() / other.norm().clamp_min(1e-30)).nan_to_num(nan=torch.inf))
