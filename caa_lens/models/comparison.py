"""Whether the library sees the model that was loaded: its numbers beside those of the untouched Hugging Face module."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.placement import dtype_name, dtype_of
from caa_lens.models.unembedding import final_logits

# Root mean square over the vocabulary of what log-probabilities may differ by, in nats. In half precision the module
# rounds its own logits, to a multiple of 0.125 where they are large; a wrong norm or scale differs by 0.5 and more.
_ROUNDING = {torch.float64: 1e-7, torch.float32: 3e-4, torch.bfloat16: 0.15, torch.float16: 0.05}


@torch.inference_mode()
def check_against(model: Any, tokens: Int[Tensor, "1 pos"], logp: Float[Tensor, "pos d_vocab"]) -> str:
    """Compare what the library reads of a model with what the module gave before anything was put around it.

    Args:
        tokens: a text of some tokens, not padded.
        logp: the untouched module's log-probabilities of the next token at each of them.

    Returns:
        One line that says what was compared.

    Raises:
        ValueError: the numbers are not the module's, or a token's depend on what comes after it.
    """
    adapter, allowed = adapter_of(model), _ROUNDING[dtype_of(model)]
    tokens = tokens.to(adapter.device(model))
    ours = final_logits(model, adapter.run(model, tokens)[0]).log_softmax(-1)
    error = _difference(ours, logp)
    name = f"{model.cfg.model_name} ({dtype_name(model)})"
    if not error <= allowed:
        raise ValueError(
            f"{name} does not give the numbers of its own Hugging Face module: log-probabilities differ by {error:.2g} "
            f"nats, expected at most {allowed:g}. TransformerLens' adapter for {type(adapter).__name__.lower()}s of this "
            "architecture is wrong for it; check=False loads it all the same"
        )
    n = tokens.shape[1]
    before = final_logits(model, adapter.run(model, tokens[:, : n // 2])[0]).log_softmax(-1)
    if not _difference(before, logp[: n // 2]) <= allowed:
        raise ValueError(f"{name} sees the tokens behind a token, expected a model that generates, from left to right")
    return (
        f"{model.cfg.model_name}: compared with the untouched Hugging Face module on {n} tokens, log-probabilities agree "
        f"to {error:.1g} nats ({dtype_name(model)}), {_cached(model, tokens, logp, allowed)}"
    )


def _cached(model: Any, tokens: Int[Tensor, "1 pos"], logp: Float[Tensor, "pos d_vocab"], allowed: float) -> str:
    adapter, half = adapter_of(model), tokens.shape[1] // 2
    try:
        cache = adapter.new_cache(model, 1)
        parts = [tokens[:, :half], *tokens[:, half:].split(1, dim=1)]
        last = torch.cat([adapter.run(model, some, cache=cache)[0, -1:] for some in parts])
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as why:
        return f"without its key-value cache only ({str(why).partition(chr(10))[0]})"
    error = _difference(final_logits(model, last).log_softmax(-1), logp[half - 1 :])
    if not error <= allowed:
        return f"without its key-value cache only (with it they differ by {error:.2g})"
    return "with and without its key-value cache"


def _difference(ours: Float[Tensor, "pos d_vocab"], theirs: Float[Tensor, "pos d_vocab"]) -> float:
    """The largest over positions of the root mean square over the vocabulary; NaN where either is not finite."""
    return float((ours.double().cpu() - theirs.double().cpu()).pow(2).mean(-1).sqrt().max())
