"""Small questions about the parts of a bridge and of the Hugging Face module inside of it."""

from typing import Any

import torch
from torch import Tensor

from caa_lens.models.adapters.adapter import FinalNorm


def is_hook_point(module: Any) -> bool:
    """Whether it is one of TransformerLens' hook points, by its class."""
    return any(base.__name__ == "HookPoint" for base in type(module).__mro__)


def inside(part: Any) -> Any:
    """The module of Hugging Face that a bridge's part is around; itself, if it is around none."""
    return getattr(part, "original_component", part)


def weight_of(part: Any) -> Tensor | None:
    """The weight of a part, or of what it wraps."""
    weight = getattr(inside(part), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def width_into(projection: Any) -> int | None:
    """How many numbers a linear part reads, where it tells."""
    width = getattr(inside(projection), "in_features", None)
    if width is None and type(inside(projection)).__name__ == "Conv1D":  # of GPT-2, stored the other way round
        width = inside(projection).weight.shape[0]
    return None if width is None else int(width)


def device_of(model: Any, part: Any) -> torch.device:
    """Where a part runs: where its weight lies, or where it is fetched to, if it lies on disk or elsewhere."""
    weight = weight_of(part)
    if weight is not None and not weight.is_meta:
        return weight.device
    hook = getattr(inside(part), "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return next((one.device for one in model.original_model.parameters() if not one.is_meta), torch.device("cpu"))


def reads_both_ways(config: Any) -> bool:
    """Whether it is of an encoder's family, such as BERT's, and not set up as a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind, is_decoder = getattr(config, "model_type", None), getattr(config, "is_decoder", False)
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder


def is_offloaded(module: Any) -> bool:
    """Whether any part lies elsewhere until it runs."""
    return any(hasattr(one, "_hf_hook") for one in module.modules())


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
    weight, bias = getattr(inner, "weight", None), getattr(inner, "bias", None)
    eps = float(getattr(inner, "eps", getattr(inner, "variance_epsilon", eps)))
    # Some store the weight less one, and what a norm's class is called does not say what it computes.
    kinds = ("LN", "RMS") if "LayerNorm" in type(inner).__name__ else ("RMS", "LN")
    return [
        FinalNorm(kind=kind, weight=weight, bias=bias, eps=eps, offset=offset)
        for kind in kinds
        for offset in (0.0, 1.0)
    ]
