"""Whether the library sees the model that was loaded: its numbers beside those of the untouched Hugging Face module."""

import importlib.metadata
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.adapters.torch_hooks import stream_of
from caa_lens.models.adapters.watch import cache_in
from caa_lens.models.placement import dtype_name, dtype_of
from caa_lens.models.structure import CANNOT_RUN, rounding, without_users_hooks
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
            f"nats, expected at most {allowed:g}. TransformerLens' adapter of this architecture is wrong for it; "
            "check=False loads it all the same"
        )
    n = tokens.shape[1]
    if not adapter.quantised(model):  # whose tokens do depend on what else is in a batch, by the rounding
        before = final_logits(model, adapter.run(model, tokens[:, : n // 2])[0]).log_softmax(-1)
        if not _difference(before, logp[: n // 2]) <= allowed:
            raise ValueError(
                f"{name} sees the tokens behind a token, expected a model that generates, from left to right"
            )
    return (
        f"{model.cfg.model_name}: compared with the untouched Hugging Face module on {n} tokens, log-probabilities "
        f"agree to {error:.1g} nats ({dtype_name(model)}), {_cached(model, tokens, logp, allowed)}"
    )


_compared: WeakSet[Any] = WeakSet()


def check_parts(model: Any) -> None:
    """Compare what TransformerLens computes in its own way with what it stands for, part by part; once a model.

    A bridge's attention, norms and MLPs are TransformerLens' own code over the weights of Hugging Face's modules, which
    are still there. Each is given what it gets in a run of a short text. A part whose original cannot be run by itself
    is passed over.

    Raises:
        ValueError: a part computes something else than what it stands for.
        TypeError: a token's numbers depend on what comes after it.
    """
    if model in _compared:
        return
    adapter = adapter_of(model)
    differences: list[tuple[str, nn.Module, float]] = []
    with torch.no_grad(), without_users_hooks(model), ExitStack() as at_the_end:
        adapter.settle(model)
        parts = list(adapter.written_anew(model))
        if parts:
            _check_one_way(model)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(model.cfg.d_vocab, (1, min(6, model.cfg.n_ctx)), generator=generator)
            for name, part, original in parts:
                hook = partial(_compare, differences=differences, name=name, original=original)
                at_the_end.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
            adapter.run(model, tokens.to(adapter.device(model)))
    for name, original, difference in differences:
        if not difference <= rounding(model):
            lens, hf = (importlib.metadata.version(package) for package in ("transformer-lens", "transformers"))
            raise ValueError(
                f"TransformerLens {lens} computes {name} of {model.cfg.model_name} otherwise than transformers {hf} "
                f"does ({type(original).__name__}): by {difference:.2g} of its size, so that no number would be the "
                "model's. Another version of TransformerLens may do it right"
            )
    _compared.add(model)


def _check_one_way(model: Any) -> None:
    """Two texts that differ in their second token only: the first must not know."""
    adapter = adapter_of(model)
    if adapter.quantised(model):
        return  # its tokens do depend on what else is in a batch, by the rounding of whole numbers
    texts = [torch.tensor([[0, token]], device=adapter.device(model)) for token in (0, model.cfg.d_vocab - 1)]
    one, other = (adapter.run(model, text)[0, 0].float() for text in texts)
    if float((one - other).norm() / one.norm().clamp_min(1e-30)) > rounding(model):
        raise TypeError(
            f"{model.cfg.model_name} is an encoder, whose tokens see those behind them: take a model that generates, "
            "from left to right"
        )


def _compare(
    part: Any, given: tuple, keywords: dict, output: Any, *, differences: list, name: str, original: nn.Module
) -> None:
    if cache_in(keywords) is not None:
        return  # which would be filled twice
    try:
        expected = original(*given, **keywords)
    except Exception:  # whatever a module says that cannot be run by itself
        return
    found, expected = map(stream_of, (output, expected))
    if isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape:
        wide = torch.promote_types(torch.float32, expected.dtype)
        error = (found.to(wide) - expected.to(wide)).norm() / expected.to(wide).norm().clamp_min(1e-30)
        if bool(expected.isfinite().all()):
            differences.append((name, original, float(error)))


def _cached(model: Any, tokens: Int[Tensor, "1 pos"], logp: Float[Tensor, "pos d_vocab"], allowed: float) -> str:
    adapter, half = adapter_of(model), tokens.shape[1] // 2
    try:
        cache = adapter.new_cache(model, 1)
        parts = [tokens[:, :half], *tokens[:, half:].split(1, dim=1)]
        last = torch.cat([adapter.run(model, some, cache=cache)[0, -1:] for some in parts])
    except CANNOT_RUN as why:
        return f"without its key-value cache only ({str(why).partition(chr(10))[0]})"
    error = _difference(final_logits(model, last).log_softmax(-1), logp[half - 1 :])
    if not error <= allowed:
        return f"without its key-value cache only (with it they differ by {error:.2g})"
    return "with and without its key-value cache"


def _difference(ours: Float[Tensor, "pos d_vocab"], theirs: Float[Tensor, "pos d_vocab"]) -> float:
    """The largest over positions of the root mean square over the vocabulary; NaN where either is not finite."""
    return float((ours.double().cpu() - theirs.double().cpu()).pow(2).mean(-1).sqrt().max())
