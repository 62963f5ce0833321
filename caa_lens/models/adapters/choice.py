"""Which of TransformerLens' two kinds a model is: the only place that asks."""

from typing import Any

from caa_lens.models.adapters.adapter import Adapter
from caa_lens.models.adapters.bridge import Bridge
from caa_lens.models.adapters.hooked import Hooked

_KINDS: dict[tuple[str, str], Adapter] = {
    ("transformer_lens", "HookedTransformer"): Hooked(),
    ("transformer_lens", "TransformerBridge"): Bridge(),
}


def adapter_of(model: Any) -> Adapter:
    """How a model offers what the library needs. Raises `TypeError` for what is neither kind."""
    found = known_adapter(model)
    if found is None:
        raise TypeError(
            f"got a {type(model).__name__}, expected a HookedTransformer or a TransformerBridge: load it with "
            "caa_lens.load_model(...)"
        )
    return found


def known_adapter(model: Any) -> Adapter | None:
    """The same, or None. A model is known by its class, since others have the same names for other things."""
    for kind in type(getattr(model, "_orig_mod", model)).__mro__:  # of one that torch.compile wraps
        found = _KINDS.get((kind.__module__.partition(".")[0], kind.__name__))
        if found is not None:
            return found
    return None
