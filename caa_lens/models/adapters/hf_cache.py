"""Hugging Face's KV cache under a bridge: made as a model's configuration asks for, and shared by many rows."""

import copy
from typing import Any

from torch import Tensor

# Kinds of rotary scaling under which a token's key depends on its position alone, whatever comes after it.
_FIXED_ROPES = (None, "default", "linear", "llama3", "yarn", "proportional")


def new_cache(config: Any) -> Any:
    """An empty cache that grows, with the windows and states that a model's configuration asks for."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def depends_on_length(config: Any) -> str | None:
    """Why keys that were computed for a short text may not be those of a longer one, or None where they are."""
    text = config.get_text_config(decoder=True)
    ropes = getattr(text, "rope_parameters", None) or {}
    several = [one for one in ropes.values() if isinstance(one, dict)] if isinstance(ropes, dict) else []
    for rope in several or [ropes]:
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        if kind not in _FIXED_ROPES:
            return f"its rotary embedding ({kind!r}) depends on the length of the whole text"
    if getattr(text, "use_logn_attn", False):
        return "its attention is scaled by the length of the whole text"
    return None


def recurrent_layers(cache: Any) -> str | None:
    """Why rows cannot be split off behind a cache: a layer that keeps a state, not keys; None if there is none."""
    for layer in cache.layers:
        if not hasattr(layer, "get_seq_length") or not hasattr(layer, "keys"):
            return f"some of its layers keep a state, not keys and values ({type(layer).__name__})"
    return None


def shared_by_rows(cache: Any) -> Any:
    """A filled cache of one row that any number of rows attend to; what they add is not kept."""
    from transformers import DynamicCache

    class SharedByRows(DynamicCache):
        def __init__(self) -> None:
            self.__dict__.update(cache.__dict__)

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            layer: Any = copy.copy(self.layers[layer_idx])
            if layer.is_initialized:
                layer.keys = layer.keys.expand(len(key_states), -1, -1, -1)
                layer.values = layer.values.expand(len(key_states), -1, -1, -1)
            return layer.update(key_states, value_states, *args, **kwargs)

    return SharedByRows()
