"""From the residual stream to logits as the model itself does it, but in float32.

    logits = cap( k ( norm(x) W_U + b_U ) )

`norm` is the model's own final norm (RMSNorm or LayerNorm, with its weights or with these folded into W_U, or none at
all), k what some models multiply their logits by (Cohere, Granite; 1 elsewhere), and `cap` a soft cap,
c tanh(logits / c), where there is one (Gemma 2). Half precision is good for the blocks, but not for this: a bfloat16
logit between 16 and 32 is a multiple of 0.125, and a probability that is read from two of them has hardly more than a
dozen values. So the last block's output is taken as it is, and everything behind it is computed in float32, whatever
the weights' type.

Which norm it is, whether its weight is stored less one, and what k is, is read off numbers: the formula has to give
what the model's own modules give, and a bridge's whole forward. Where somebody has put hooks on the final norm or the
unembedding, or another module in their place, they are run as they are, in their own type; where no formula gives the
model's numbers, the states are put behind its last block, and it makes the logits of them itself.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models.adapters.adapter import FinalNorm, Unembedding
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.placement import device_behind, dtype_of
from caa_lens.models.structure import once_a_structure, rounding, untouched, without_users_hooks

PIECE = 2**25  # numbers of W_U that are converted at once, 134 MB in float32
AT_ONCE = 256  # positions whose logits over the whole vocabulary are held at once
# Where only the softmax's normaliser is wanted, logits are made in tiles, positions by tokens, that stay in a cache.
TILE = (512, 1024)
TILE_ON_CARD = (8192, 2048)


@dataclass(frozen=True, slots=True)
class Formula:
    """What was found to give a model's logits.

    Attributes:
        norm: which of the adapter's final norms it is; None if none of them gives the model's numbers.
        scale: what the model multiplies its logits by.
        whole: whether the modules behind the blocks, times `scale` and capped, are all that makes logits.
    """

    norm: int | None
    scale: float
    whole: bool


def final_logits(model: Any, resid: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_vocab"]:
    """The logits that residuals give as the last block's output, in float32; `AT_ONCE` at a time keep it small."""
    resid = resid.to(device_behind(model))
    if is_own(model):
        W_U, b_U = _unembedding(model)
        logits = _times(model, _normed(model, resid, final_norm(model)), W_U) + _wide(model, b_U)
        return soft_capped(model, _formula(model).scale * logits)
    formula, states = _formula(model), resid.reshape(-1, resid.shape[-1]).to(dtype_of(model))
    if formula.whole:
        logits = soft_capped(model, formula.scale * adapter_of(model).run_behind(model, states[None])[0].float())
    else:
        logits = torch.cat([adapter_of(model).whole_from(model, some).float() for some in states.split(AT_ONCE)])
    return logits.to(resid.device).reshape(*resid.shape[:-1], -1)


def token_logits(
    model: Any, resid: Float[Tensor, "*state d_model"], tokens: Int[Tensor, "*#state token"]
) -> Float[Tensor, "*state token"]:
    """`final_logits` of some tokens only, without those of all others where nothing else sees them."""
    resid, tokens = resid.to(device_behind(model)), tokens.to(device_behind(model))
    if not is_own(model):
        logits = final_logits(model, resid)
        return logits.gather(-1, tokens.expand(*logits.shape[:-1], tokens.shape[-1]))
    W_U, b_U = _unembedding(model)
    columns = _wide(model, W_U[:, tokens])  # [d_model *state token]
    logits = einsum(_normed(model, resid, final_norm(model)), columns, "... d, d ... token -> ... token")
    return soft_capped(model, _formula(model).scale * (logits + _wide(model, b_U[tokens])))


def token_logp(
    model: Any, resid: Float[Tensor, "*row pos d_model"], targets: Int[Tensor, " pos"], at_once: int = AT_ONCE
) -> Float[Tensor, "*row pos"]:
    """Log-probability of each target token given the last block's output just before it.

    The full vocabulary is needed for the softmax, but never for more than `at_once` positions.
    """
    return token_logps(model, resid, targets[:, None], at_once)[..., 0]


def token_logps(
    model: Any,
    resid: Float[Tensor, "*row pos d_model"],
    targets: Int[Tensor, "pos option"],
    at_once: int = AT_ONCE,
) -> Float[Tensor, "*row pos option"]:
    """`token_logp` of several tokens at each position, whose softmax is computed once.

    Where no gradient is wanted and the formulas hold, the logits are never held beside each other: tile by tile, each
    adds to the normaliser and is forgotten.
    """
    states = resid.to(device_behind(model)).reshape(-1, resid.shape[-1])
    wanted = targets.to(states.device).expand(*resid.shape[:-1], -1).reshape(len(states), -1)
    if not torch.is_grad_enabled() and is_own(model):
        return _logp_in_tiles(model, states, wanted).reshape(*resid.shape[:-1], -1)
    pieces = []
    for some, tokens in zip(states.split(at_once), wanted.split(at_once), strict=True):
        logits = final_logits(model, some)
        pieces.append(logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(pieces).reshape(*resid.shape[:-1], -1)


def soft_cap(model: Any) -> float:
    """What the model's logits cannot exceed; 0 for no cap."""
    return float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)


def soft_capped(model: Any, logits: Tensor) -> Tensor:
    """Logits after the model's cap, if it has one."""
    cap = soft_cap(model)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


# ---- the parts, for lenses that are linear in them ------------------------------------------------------------------


def final_norm(model: Any) -> FinalNorm | None:
    """The model's final norm; None where it has none.

    Raises:
        ValueError: the formula of the final norm is not known.
    """
    norms, formula = adapter_of(model).final_norms(model), _formula(model)  # the first refuses what it does not know
    if formula.norm is None:
        raise ValueError(
            f"no formula of a final norm gives the numbers of {model.cfg.model_name!r}, expected RMSNorm or LayerNorm: "
            "read it with reading='in_context', or with residual_lens, which run the model's own modules"
        )
    return norms[formula.norm]


def centred(model: Any, states: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_model"]:
    """What the final norm divides: x itself, or for LayerNorm x minus its mean over d_model. In float32."""
    return _centred(model, states, final_norm(model))


def normalised(model: Any, states: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_model"]:
    """The final norm without its weight and bias, in float32: x / rms(x) of what `centred` gives; x without a norm."""
    return _normalised(model, states, final_norm(model))


def normalised_change(
    model: Any, states: Float[Tensor, "*#state d_model"], changes: Float[Tensor, "*state d_model"]
) -> Float[Tensor, "*state d_model"]:
    """The derivative of `normalised` at the states along the changes: (c - n mean(n c)) / s, in float32.

    n is the normalised state, s what the norm divides by, c the change (less its mean for LayerNorm).
    """
    norm = final_norm(model)
    changes = _centred(model, changes, norm)
    if norm is None:
        return changes
    normed = _normalised(model, states, norm)
    along = (normed * changes).mean(-1, keepdim=True)
    return (changes - normed * along) / norm_scale(model, states)[..., None]


def norm_scale(model: Any, states: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state"]:
    """What the final norm divides by: rms of what `centred` gives; 1 without a norm."""
    norm = final_norm(model)
    states = _centred(model, states, norm)
    return torch.ones_like(states[..., 0]) if norm is None else (states.pow(2).mean(-1) + norm.eps).sqrt()


def unembed_linear(model: Any, normed: Float[Tensor, "*state d_model"]) -> Float[Tensor, "*state d_vocab"]:
    """k (x * w) W_U in float32 with the final norm's weight w: linear, without any bias and without the cap."""
    weight = _weight(model, final_norm(model))
    return _formula(model).scale * _times(model, normed if weight is None else normed * weight, _unembedding(model)[0])


def token_directions(model: Any, tokens: Int[Tensor, "*token"]) -> Float[Tensor, "*token d_model"]:
    """What the normalised stream is multiplied by for a token's logit: k w W_U[:, token], in float32."""
    W_U, _ = _unembedding(model)
    columns = _wide(model, W_U[:, tokens.to(W_U.device)]).movedim(0, -1)
    weight = _weight(model, final_norm(model))
    return _formula(model).scale * (columns if weight is None else columns * weight)


def has_formula(model: Any) -> bool:
    """Whether the formulas give the model's logits where nobody's hooks are."""
    formula = _formula(model)
    return formula.norm is not None and formula.whole


def is_linear_behind_the_norm(model: Any) -> bool:
    """Whether logits are linear in the normalised stream: no cap, and nobody's hooks or modules."""
    return soft_cap(model) <= 0 and is_own(model)


def _centred(model: Any, states: Tensor, norm: FinalNorm | None) -> Tensor:
    states = _wide(model, states)
    return states - states.mean(-1, keepdim=True) if norm is not None and norm.kind == "LN" else states


def _normalised(model: Any, states: Tensor, norm: FinalNorm | None) -> Tensor:
    states = _centred(model, states, norm)
    return states if norm is None else states / (states.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()


def _weight(model: Any, norm: FinalNorm | None) -> Tensor | None:
    if norm is None or norm.weight is None:
        return None
    return _wide(model, norm.weight).to(device_behind(model)) + norm.offset


def _normed(model: Any, states: Tensor, norm: FinalNorm | None) -> Tensor:
    normed, weight = _normalised(model, states, norm), _weight(model, norm)
    normed = normed if weight is None else normed * weight
    return normed if norm is None or norm.bias is None else normed + _wide(model, norm.bias).to(normed.device)


def _unembedding(model: Any) -> Unembedding:
    """W_U and b_U, wherever and however they are kept, of a model whose formula is known."""
    found = adapter_of(model).unembedding(model)
    if found is None:
        raise ValueError(
            f"the unembedding of {model.cfg.model_name!r} has no matrix of plain numbers: read it with "
            "reading='in_context', or with residual_lens, which run the model's own modules"
        )
    return found


def _times(
    model: Any, normed: Float[Tensor, "*state d_model"], W_U: Float[Tensor, "d_model d_vocab"]
) -> Float[Tensor, "*state d_vocab"]:
    if W_U.dtype == normed.dtype:
        return F.linear(normed, W_U.T)
    n_columns = max(1, PIECE // W_U.shape[0])
    return torch.cat([F.linear(normed, _wide(model, some).T) for some in W_U.split(n_columns, dim=1)], dim=-1)


def _logp_in_tiles(
    model: Any, states: Float[Tensor, "state d_model"], wanted: Int[Tensor, "state option"]
) -> Float[Tensor, "state option"]:
    """Log-probabilities from tiles of the logits: log sum exp of each, and of these in the end."""
    n_rows, n_columns = TILE if states.device.type == "cpu" else TILE_ON_CARD
    scale, rows = _formula(model).scale, _normed(model, states, final_norm(model)).split(n_rows)
    targets = wanted.split(n_rows)
    found = [torch.zeros_like(some, dtype=rows[0].dtype) for some in targets]
    sums: list[list[Tensor]] = [[] for _ in rows]
    W_U, b_U = _unembedding(model)
    for first in range(0, W_U.shape[1], n_columns):
        weight = _wide(model, W_U[:, first : first + n_columns]).T
        bias = _wide(model, b_U[first : first + n_columns])
        for i, some in enumerate(rows):
            logits = F.linear(some, weight, bias)
            logits = soft_capped(model, logits if scale == 1 else logits.mul_(scale))
            column = targets[i] - first
            inside = (column >= 0) & (column < logits.shape[1])
            there = logits.gather(-1, column.clamp(0, logits.shape[1] - 1))
            found[i] = torch.where(inside, there, found[i])
            sums[i].append(logits.logsumexp(-1))
    normaliser = [torch.stack(some, dim=-1).logsumexp(-1, keepdim=True) for some in sums]
    return torch.cat([logit - total for logit, total in zip(found, normaliser, strict=True)])


def _wide(model: Any, tensor: Tensor) -> Tensor:
    """In float32; a float64 model keeps its own type."""
    return tensor.to(torch.float64 if dtype_of(model) == torch.float64 else torch.float32)


# ---- which formula it is --------------------------------------------------------------------------------------------

_checked: WeakKeyDictionary[Any, tuple[tuple, Formula]] = WeakKeyDictionary()


def is_own(model: Any) -> bool:
    """Whether the formulas here stand for what is behind the blocks: own modules, and the same numbers once."""
    return has_formula(model) and all(untouched(model, part) for part in adapter_of(model).parts_behind(model))


def _formula(model: Any) -> Formula:
    parts = adapter_of(model).parts_behind(model)
    kinds = [(id(type(part)), id(type(part).forward)) for module in parts for part in module.modules()]
    return once_a_structure(_checked, model, (*kinds, dtype_of(model), soft_cap(model)), _find)


@torch.inference_mode()
def _find(model: Any) -> Formula:
    with without_users_hooks(model):
        norm = _norm_that_agrees(model)
        scale = _scale_that_agrees(model)
    return Formula(norm, 1.0 if scale is None else scale, scale is not None)


def _norm_that_agrees(model: Any) -> int | None:
    """Which norm, with the unembedding, gives what the modules give, but for rounding in their type."""
    adapter = adapter_of(model)
    try:
        norms = adapter.final_norms(model)
    except ValueError:
        return None
    unembedding = adapter.unembedding(model)
    if unembedding is None:  # another module in its place, or packed in a way that is not known: its modules run
        return None
    W_U, b_U = unembedding
    generator = torch.Generator().manual_seed(0)
    # Their mean is not 0, so that it shows whether the norm subtracts it.
    states = torch.randn(1, 4, model.cfg.d_model, generator=generator) + 0.5
    states = states.to(device_behind(model), dtype_of(model))
    run = adapter.run_behind(model, states).double().nan_to_num()
    agree: list[tuple[int, Tensor]] = []
    for index, norm in enumerate(norms):
        told = _times(model, _normed(model, states, norm), W_U) + _wide(model, b_U)
        told = told.double().nan_to_num()
        error = (run - told).norm()
        if bool(error <= rounding(model) * told.norm()):
            agree.append((index, error))
    if len(agree) > 1:  # in half precision more than one may be near
        agree.sort(key=lambda one: float(one[1]))
    return agree[0][0] if agree else None


def _scale_that_agrees(model: Any) -> float | None:
    """By which number of the configuration the model multiplies its logits, so that its own forward gives them."""
    adapter = adapter_of(model)
    scales = adapter.scales(model)
    if len(scales) == 1:
        return scales[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, 6), generator=generator).to(adapter.device(model))
    whole = adapter.whole(model, tokens).double()
    behind = adapter.run_behind(model, adapter.run(model, tokens)).double().to(whole.device)
    if not bool(whole.isfinite().all()):
        return 1.0
    cap = soft_cap(model)
    inside = cap * torch.atanh((whole / cap).clamp(-1 + 1e-6, 1 - 1e-6)) if cap > 0 else whole
    measured = float((inside * behind).sum() / behind.pow(2).sum().clamp_min(1e-30))
    scale = min(scales, key=lambda one: (abs(one - measured), one != 1.0))
    told = soft_capped(model, scale * behind)
    agrees = abs(scale - measured) <= min(rounding(model), 0.01) * abs(measured)
    return scale if agrees and bool((told - whole).norm() <= rounding(model) * whole.norm()) else None
