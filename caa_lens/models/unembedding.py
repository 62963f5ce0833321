"""From the residual stream to logits as the model itself does it, but in float32.

    logits = cap( norm(x) W_U + b_U )

`norm` is the model's own final norm (RMSNorm or LayerNorm, with its weights or with these folded into W_U, or none at
all), and `cap` its soft cap, c tanh(logits / c), where it has one (Gemma 2). Half precision is good for the blocks, but
not for this: a bfloat16 logit between 16 and 32 is a multiple of 0.125, and a probability that is read from two of them
has hardly more than a dozen values. So the last block's output is taken as it is, and everything behind it is computed
in float32, whatever the weights' type. Where somebody has put hooks on the final norm or the unembedding, or another
module in their place, they are run as they are, in their own type.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models.structure import once_a_structure, rounding, untouched

PIECE = 2**25  # numbers of W_U that are converted at once, 134 MB in float32
AT_ONCE = 256  # positions whose logits over the whole vocabulary are held at once


def final_logits(model: Any, resid: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_vocab"]:
    """The logits that residuals give as the last block's output, in float32; `AT_ONCE` states at a time keep it small.

    Raises:
        ValueError: for a final norm that is neither RMSNorm nor LayerNorm.
    """
    resid = resid.to(device_behind(model))
    if not _is_own(model):
        states = resid.reshape(1, -1, resid.shape[-1]).to(model.cfg.dtype)
        logits = model.unembed(model.ln_final(states) if _final_norm(model) is not None else states)
        return soft_capped(model, logits.float()).reshape(*resid.shape[:-1], -1)
    return soft_capped(model, _times_unembedding(model, _normed(model, resid)) + _wide(model, model.b_U))


def token_logits(
    model: Any, resid: Float[Tensor, "*state d_model"], tokens: Int[Tensor, "*#state token"]
) -> Float[Tensor, "*state token"]:
    """`final_logits` of some tokens only, without those of all others where nothing else sees them."""
    resid, tokens = resid.to(device_behind(model)), tokens.to(device_behind(model))
    if not _is_own(model):
        logits = final_logits(model, resid)
        return logits.gather(-1, tokens.expand(*logits.shape[:-1], tokens.shape[-1]))
    columns = _wide(model, model.W_U[:, tokens])  # [d_model *state token]
    logits = torch.einsum("...d,d...t->...t", _normed(model, resid), columns)
    return soft_capped(model, logits + _wide(model, model.b_U[tokens]))


def token_logp(
    model: Any, resid: Float[Tensor, "*row pos d_model"], targets: Int[Tensor, " pos"], at_once: int = AT_ONCE
) -> Float[Tensor, "*row pos"]:
    """Log-probability of each target token given the last block's output just before it.

    The full vocabulary is needed for the softmax, but never for more than `at_once` positions.
    """
    states = resid.to(device_behind(model)).reshape(-1, resid.shape[-1])
    wanted = targets.to(states.device).expand(resid.shape[:-1]).reshape(-1)
    pieces = []
    for some, tokens in zip(states.split(at_once), wanted.split(at_once), strict=True):
        logits = final_logits(model, some)
        pieces.append(logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(pieces).reshape(resid.shape[:-1])


def device_behind(model: Any) -> torch.device:
    """Where the unembedding lies, which may be another device than the first block's."""
    return next(model.unembed.parameters()).device


def soft_capped(model: Any, logits: Tensor) -> Tensor:
    """Logits after the model's cap, if it has one."""
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


# ---- the parts, for lenses that are linear in them ------------------------------------------------------------------


def centred(model: Any, states: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_model"]:
    """What the final norm divides: x itself, or for LayerNorm x minus its mean over d_model. In float32."""
    states = _wide(model, states)
    return states - states.mean(-1, keepdim=True) if "LayerNorm" in _norm_kind(model) else states


def normalised(model: Any, states: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_model"]:
    """The final norm without its weight and bias, in float32: x / rms(x) of what `centred` gives; x without a norm."""
    states = centred(model, states)
    norm = _final_norm(model)
    return states if norm is None else states / (states.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()


def unembed_linear(model: Any, normed: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_vocab"]:
    """(x * w) W_U in float32 with the final norm's weight w: linear, without any bias and without the cap."""
    weight = getattr(_final_norm(model), "w", None)  # absent where it was folded into W_U
    return _times_unembedding(model, normed if weight is None else normed * _wide(model, weight))


def is_linear_behind_the_norm(model: Any) -> bool:
    """Whether logits are linear in the normalised stream: no cap, and nobody's hooks or modules."""
    return model.cfg.output_logits_soft_cap <= 0 and _is_own(model)


def _normed(model: Any, states: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_model"]:
    normed = normalised(model, states)
    for name, combine in (("w", torch.mul), ("b", torch.add)):
        parameter = getattr(_final_norm(model), name, None)
        normed = normed if parameter is None else combine(normed, _wide(model, parameter))
    return normed


def _times_unembedding(model: Any, normed: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_vocab"]:
    W_U = model.W_U
    if W_U.dtype == normed.dtype:
        return F.linear(normed, W_U.T)
    n_columns = max(1, PIECE // W_U.shape[0])
    return torch.cat([F.linear(normed, _wide(model, some).T) for some in W_U.split(n_columns, dim=1)], dim=-1)


def _wide(model: Any, tensor: Tensor) -> Tensor:
    """In float32; a float64 model keeps its own type."""
    return tensor.to(torch.float64 if model.cfg.dtype == torch.float64 else torch.float32)


def _final_norm(model: Any) -> Any:
    return model.ln_final if model.cfg.normalization_type is not None else None


def _norm_kind(model: Any) -> str:
    """Name of the final norm's class. Raises `ValueError` for one whose formula is not known here."""
    norm = _final_norm(model)
    kind = "none" if norm is None else type(norm).__name__
    if kind not in ("none", "RMSNorm", "RMSNormPre", "LayerNorm", "LayerNormPre"):
        raise ValueError(
            f"the final norm of {model.cfg.model_name!r} is a {kind}, expected RMSNorm or LayerNorm: the lens knows no "
            "formula for another one"
        )
    return kind


_checked: WeakKeyDictionary[Any, tuple[tuple, bool]] = WeakKeyDictionary()


def _is_own(model: Any) -> bool:
    """Whether the formulas here stand for what is behind the blocks: own modules, and the same numbers once."""
    behind = [module for module in (_final_norm(model), model.unembed) if module is not None]
    if not all(untouched(module) for module in behind):
        return False
    kinds = [(id(type(part)), id(type(part).forward)) for module in behind for part in module.modules()]
    signature = (*kinds, model.cfg.dtype, model.cfg.normalization_type)
    return once_a_structure(_checked, model, signature, _agrees)


@torch.inference_mode()
def _agrees(model: Any) -> bool:
    """Whether norm and unembedding, run as they are, give what the formulas give, but for rounding in their type."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, model.cfg.d_model, generator=generator).to(device_behind(model), model.cfg.dtype)
    run = model.unembed(states if _final_norm(model) is None else model.ln_final(states)).double().nan_to_num()
    told = (_times_unembedding(model, _normed(model, states)) + _wide(model, model.b_U)).double().nan_to_num()
    return bool((run - told).norm() <= rounding(model) * told.norm())
