"""Small questions about the parts of a bridge and of the Hugging Face module inside of it."""

from typing import Any

import torch

from caa_lens.models.adapters.adapter import FinalNorm
from caa_lens.models.adapters.kept_weights import fetched, hooks_of_accelerate, inside, weight_of


def is_hook_point(module: Any) -> bool:
    """Whether it is one of TransformerLens' hook points, by its class."""
    return any(base.__name__ == "HookPoint" for base in type(module).__mro__)


def width_into(projection: Any) -> int | None:
    """How many numbers a linear part reads, where it tells."""
    width = getattr(inside(projection), "in_features", None)
    if width is None and type(inside(projection)).__name__ == "Conv1D":  # of GPT-2, stored the other way round
        width = inside(projection).weight.shape[0]
    return None if width is None else int(width)


def device_of(module: Any, part: Any) -> torch.device:
    """Where a part of a module runs: where its weight lies, or where it is fetched to, if it is kept elsewhere."""
    weight = weight_of(part)
    if weight is not None and not weight.is_meta:
        return weight.device
    for hook in hooks_of_accelerate(inside(part)):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next((one.device for one in module.parameters() if not one.is_meta), torch.device("cpu"))


def reads_both_ways(config: Any) -> bool:
    """Whether it is of an encoder's family, such as BERT's, and not set up as a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind, is_decoder = getattr(config, "model_type", None), getattr(config, "is_decoder", False)
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder


def dropouts(config: Any) -> list[str]:
    """Names of the dropout rates above 0."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    values = vars(text).items() if text is not None else ()
    return sorted(name for name, value in values if "drop" in name and isinstance(value, float) and value > 0)


def norms_of(norm: Any, eps: float) -> list[FinalNorm | None]:
    """What a final norm may be, most likely first."""
    if norm is None:
        return [None]
    inner = inside(norm)
    weight, bias = fetched(inner, "weight"), fetched(inner, "bias")
    eps = float(getattr(inner, "eps", getattr(inner, "variance_epsilon", eps)))
    # Some store the weight less one, and what a norm's class is called does not say what it computes.
    kinds = ("LN", "RMS") if "LayerNorm" in type(inner).__name__ else ("RMS", "LN")
    return [
        FinalNorm(kind=kind, weight=weight, bias=bias, eps=eps, offset=offset)
        for kind in kinds
        for offset in (0.0, 1.0)
    ]
