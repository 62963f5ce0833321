"""Where a model lies and in which type it computes, whatever kind it is."""

from typing import Any

import torch

from caa_lens.models.adapters.choice import adapter_of


def dtype_of(model: Any) -> torch.dtype:
    """The type of the residual stream, which is that of the embedding; a quantised model's is not its weights'."""
    return adapter_of(model).dtype(model)


def dtype_name(model: Any) -> str:
    """The same in words, as settings and vectors say it: "float32"; of packed weights, "bfloat16, weights nf4"."""
    name, packed = str(dtype_of(model)).removeprefix("torch."), adapter_of(model).quantised(model)
    return name if packed is None else f"{name}, weights {packed}"


def device_of_tokens(model: Any) -> torch.device:
    """Where token ids go."""
    return adapter_of(model).device(model)


def device_behind(model: Any) -> torch.device:
    """Where the unembedding lies, which may be another device than the first block's."""
    return adapter_of(model).device_behind(model)
