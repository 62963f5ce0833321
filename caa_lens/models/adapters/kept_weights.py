"""Weights that are not plain tensors where their module is: packed into fewer bits, or kept elsewhere until they run.

bitsandbytes packs a matrix into whole numbers of one byte, two numbers a byte in 4 bits, of another shape. accelerate
leaves what does not fit on a device in the CPU's memory or on the disk; outside of its module's own forward such a
weight is on the device "meta", which has shapes and no numbers. Whoever reads a weight here gets its numbers, or
nothing, or an error: never what stands in their place.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_PACKED = {"Linear8bitLt": "int8", "Linear4bit": "4bit"}  # of bitsandbytes, in a model that somebody packed by hand


def inside(part: Any) -> Any:
    """The module of Hugging Face that a bridge's part is around; itself, if it is around none."""
    return getattr(part, "original_component", part)


def weight_of(part: Any) -> Tensor | None:
    """The weight of a part, or of what it wraps."""
    weight = getattr(inside(part), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def hooks_of_accelerate(module: Any) -> Iterator[Any]:
    """Those that accelerate put around a module's forward, several in one taken apart."""
    hook = getattr(module, "_hf_hook", None)
    inner = getattr(hook, "hooks", None)
    yield from ([] if hook is None else [hook] if inner is None else inner)


def is_offloaded(module: Any) -> bool:
    """Whether any part lies in the CPU's memory or on the disk until it runs."""
    return any(getattr(hook, "offload", False) for one in module.modules() for hook in hooks_of_accelerate(one))


def fetched(part: Any, name: str) -> Tensor | None:
    """A tensor of a part where the part runs; from the CPU's memory or the disk if it lies there until then.

    Raises:
        ValueError: it is nowhere: on the device "meta", and nothing says where its numbers are.
    """
    module = inside(part)
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or not tensor.is_meta:
        return tensor if isinstance(tensor, Tensor) else None
    if (kept := _kept(module, name)) is not None:
        return kept
    raise ValueError(
        f"the {name} of a {type(module).__name__} is on the device 'meta', where there are no numbers, and accelerate "
        "does not say where they are: load the model with caa_lens.load_model(...)"
    )


def _kept(module: Any, name: str) -> Tensor | None:
    """A tensor that accelerate keeps for a module's forward, where that runs."""
    for hook in hooks_of_accelerate(module):
        if getattr(hook, "offload", False):
            with suppress(KeyError):
                return hook.weights_map[name].to(torch.device(hook.execution_device))
    return None


def matrix_of(linear: Any) -> Tensor | None:
    """The weight of a linear part in numbers that can be multiplied with, `[out in]`; None where it has none.

    What bitsandbytes packed is unpacked into the type that it computes in; it is a copy then. Of other packed weights
    nothing is known here, nor of 4 bits on the CPU, which its first run puts into another order.
    """
    module = inside(linear)
    weight: Any = getattr(module, "weight", None)
    kind, on_cpu = type(weight).__name__, isinstance(weight, Tensor) and weight.device.type == "cpu"
    if kind in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        is_4bit, state = kind == "Params4bit", getattr(module, "state", None)
        unpacked_by = (
            weight.quant_state if is_4bit else weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
        )
        if weight.is_meta or unpacked_by is None or (is_4bit and on_cpu):
            return None
        return dequantize_bnb_weight(weight, state).detach()
    weight = fetched(module, "weight")
    return weight if weight is not None and weight.is_floating_point() and weight.ndim == 2 else None


def give_bias(linear: Any, dtype: torch.dtype) -> None:
    """A bias of zeros to an unembedding of packed weights, before TransformerLens gives it one of whole numbers."""
    weight = weight_of(linear)
    if weight is not None and not weight.is_floating_point() and getattr(linear, "bias", weight) is None:
        zeros = torch.zeros(linear.out_features, dtype=dtype, device=weight.device)
        linear.bias = torch.nn.Parameter(zeros, requires_grad=False)


def forget_unkept_bias(linear: Any) -> None:
    """Take away a bias that nobody keeps: TransformerLens 3.9 gives one of zeros to an unembedding without.

    Where the weights lie elsewhere until they are used, the zeros are put on the device "meta", and accelerate looks
    for them in vain among the weights that it keeps.
    """
    module = inside(linear)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bias.is_meta and _kept(module, "bias") is None:
        module.bias = None


def packed_as(module: Any) -> str | None:
    """How a model of transformers is packed: "int8", "nf4" or "fp4" of bitsandbytes, another method's name and bits."""
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if getattr(module, "hf_quantizer", None) is None and not getattr(module, "is_quantized", False):
        return next((_PACKED[kind] for one in module.modules() if (kind := type(one).__name__) in _PACKED), None)
    said = config if isinstance(config, Mapping) else {} if config is None else vars(config)
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method") or "quantised"))
    if method == "bitsandbytes":
        in_8 = said.get("load_in_8bit", said.get("_load_in_8bit", False))
        return "int8" if in_8 else str(said.get("bnb_4bit_quant_type", "4bit"))
    bits = said.get("bits")
    return f"{method} {bits}bit" if bits else method


def unembedding_of(model: Any) -> tuple[Tensor, Tensor] | None:
    """W_U and b_U of a bridge in numbers that can be multiplied with; None where its unembedding has no such matrix."""
    weight = weight_of(model.unembed)
    if weight is None:
        return None
    plain = weight.is_floating_point() and not weight.is_meta
    if plain or getattr(model, "compatibility_mode", False):  # TransformerLens keeps processed weights of its own
        return model.W_U, model.b_U
    matrix, bias = matrix_of(model.unembed), fetched(model.unembed, "bias")
    if matrix is None:
        return None
    return matrix.T, matrix.new_zeros(len(matrix)) if bias is None else bias.to(matrix.device)
