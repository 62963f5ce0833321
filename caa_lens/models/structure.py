"""What a HookedTransformer is made of, and what somebody has changed about it since TransformerLens built it.

Whoever does a model's arithmetic in another way than `model.forward` must know that nothing would be passed over. Two
questions are answered here from the modules themselves, without running them:

- `structure_of`: is every module TransformerLens' own, without hooks (TransformerLens' or torch's), without a method
  that was replaced, and with the model's own configuration? And a signature, which changes when any of this does.
- `not_a_plain_llama`: is each block what the shared-prefix engine is written for? Every field of the configuration and
  every kind of module must be on a list of what was verified; a field that the list does not know is refused.

Neither is proof by itself: `shared_prefix.unsupported` also compares numbers.
"""

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

Found = TypeVar("Found")

# Largest relative difference of a block's output, by the engine and by the model itself, that is put down to rounding.
# Seen: 1e-6 in float32, 3e-2 in bfloat16, 7e-3 in float16; blocks of another kind differ by 0.2 to 1.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.03}
TF32_ROUNDING = 1e-2

# What a configuration may say for the engine to hold. Anything that is in neither table must be switched off.
_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "positional_embedding_type": lambda value: value == "rotary",
    "normalization_type": lambda value: value in ("RMS", "RMSPre"),
    "gated_mlp": bool,
    "attention_dir": lambda value: value == "causal",
    "act_fn": lambda value: value in ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"),
    "original_architecture": lambda value: (
        value in (None, *(f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")))
    ),
    "window_size": lambda value: True,  # read under `use_local_attn` only, which must be off
    "attn_types": lambda value: True,
    "attn_scores_soft_cap": lambda value: value <= 0,
    "output_logits_soft_cap": lambda value: True,  # behind the blocks
}
# Sizes and names; what the blocks' own modules and tables carry out; what happens before or behind the blocks.
_IRRELEVANT = frozenset(
    """
    model_name d_model d_head n_layers n_ctx n_heads n_key_value_heads d_mlp d_vocab d_vocab_out n_params eps dtype
    device seed init_mode init_weights initializer_range from_checkpoint checkpoint_index checkpoint_label_type
    checkpoint_value tokenizer_name tokenizer_prepends_bos default_prepend_bos trust_remote_code quantization_method
    layer_norm_folding n_devices
    final_rms uses_rms_norm tie_word_embeddings use_attn_scale attn_scale scale_attn_by_inverse_layer_idx use_qk_norm
    use_hook_mlp_in use_hook_tokens decoder_start_token_id train_seq_length experts_per_token norm_topk_prob
    relative_attention_max_distance relative_attention_num_buckets
    rotary_dim rotary_base rotary_base_local rotary_scaling_factor rotary_adjacent_pairs
    use_NTK_by_parts_rope NTK_by_parts_low_freq_factor NTK_by_parts_high_freq_factor NTK_by_parts_factor
    NTK_original_ctx_len use_yarn_rope yarn_factor yarn_attention_factor yarn_beta_fast yarn_beta_slow
    yarn_original_max_position_embeddings yarn_truncate yarn_global_attn_only
    """.split()  # noqa: SIM905 (a list of strings would take a page)
)
_BLOCK = {"ln1": {"RMSNorm", "RMSNormPre"}, "ln2": {"RMSNorm", "RMSNormPre"}, "mlp": {"GatedMLP"}}
_BLOCK |= {"attn": {"Attention", "GroupedQueryAttention"}}
_IN_BLOCK = {"attn.q_norm": {"RMSNorm"}, "attn.k_norm": {"RMSNorm"}}
_MODEL = {"embed": {"Embed"}, "blocks": {"ModuleList", "TypedModuleList"}}
_BEHIND = ("ln_final", "unembed")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# SAELens' model differs from TransformerLens' own in what stands in its hook points' places, and in a hook point that
# its MLPs have in front; see `_replaced_methods`.
_SAE_MODEL = ("sae_lens.analysis.hooked_sae_transformer", "HookedSAETransformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What was found in a model's modules.

    Attributes:
        hooked: forward hooks somebody registered, in words; None if there are none.
        only_ours: whether all hooks are this library's, those of an open `steer` block.
        altered: a module, method or configuration that is not TransformerLens' own, in words; None if there is none.
        signature: equal only for the same structure; numbers in the weights do not count.
    """

    hooked: str | None
    only_ours: bool
    altered: str | None
    signature: tuple


def structure_of(model: Any) -> Structure:
    """Look at every module of a model; nothing is run."""
    hooked: list[str] = []
    only_ours = True
    altered: list[str] = []
    signature: list[Any] = [id(type(model)), *((key, repr(value)) for key, value in sorted(vars(model.cfg).items()))]
    for name, module in model.named_modules():
        kind = type(module)
        if _has_hooks(module):
            hooked.append(name or "the model itself")
            only_ours = only_ours and _hooks_are_ours(module)
        altered.extend(_alterations(name, module))
        cfg = getattr(module, "cfg", model.cfg)
        if cfg is not model.cfg and vars(cfg) != vars(model.cfg):
            altered.append(f"{name} has a configuration of its own")
        if kind.__name__ != "HookPoint":
            signature.append((name, id(kind), id(kind.forward), *_plain_values(module)))
            signature.extend((key, p.dtype, p.device) for key, p in module._parameters.items() if p is not None)
    if _hooks_everywhere():
        hooked.append("every module of torch")
        only_ours = False
    return Structure(
        hooked=f"the model has hooks of your own at {_some(hooked)}" if hooked else None,
        only_ours=only_ours,
        altered=_some(altered) if altered else None,
        signature=(*signature, *hooked, *altered),
    )


def not_a_plain_llama(model: Any) -> str | None:
    """Why the blocks are none that the shared-prefix engine is written for, or None if they are."""
    cfg = model.cfg
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or cfg.n_devices > 1:
        return f"{cfg.model_name} lies on several devices ({', '.join(sorted(devices))})"
    what = f"{cfg.model_name} is not a plain Llama-family model"
    for key, value in vars(cfg).items():
        allowed = _ALLOWED.get(key)
        if not (allowed(value) if allowed else key in _IRRELEVANT or not value):
            return f"{what} (its configuration has {key}={value!r})"
    for name, module in _inner_modules(model):
        _, _, place = name.partition(".")
        expected = _MODEL.get(name) or (_BLOCK | _IN_BLOCK).get(place.partition(".")[2])
        if place.isdecimal():
            expected = {"TransformerBlock"}
        if expected is None or type(module).__name__ not in expected:
            return f"{what} ({name} is a {type(module).__name__})"
    tables = {id(table): table for block in model.blocks for table in (block.attn.rotary_cos, block.attn.rotary_sin)}
    if len({(table.shape, table.dtype) for table in tables.values()}) != 1:
        return f"{what} (its blocks have different rotary tables)"
    return None


def _hooks_are_ours(module: nn.Module) -> bool:
    """Whether every forward hook of a module is a function of this library; TransformerLens wraps those it is given."""
    given = [handle.user_hook for handle in getattr(module, "fwd_hooks", ())]
    raw = [hook for hooks in _HOOKS for hook in getattr(module, hooks).values()]
    wrapped = [hook for hook in raw if getattr(hook, "__module__", "") == "transformer_lens.hook_points"]
    if len(wrapped) != len(given):
        return False
    mine = [*given, *(hook for hook in raw if hook not in wrapped)]
    return all(str(getattr(hook, "__module__", "")).partition(".")[0] == "caa_lens" for hook in mine)


def untouched(module: nn.Module) -> bool:
    """Whether a part of a model is TransformerLens' own, with nobody's hooks on it or on all of torch's modules."""
    return not _hooks_everywhere() and all(
        _is_transformer_lens(type(part)) and not _has_hooks(part) and not _alterations(name, part)
        for name, part in module.named_modules()
    )


def once_a_structure(
    found: MutableMapping[Any, tuple[tuple, Found]], model: Any, signature: tuple, find: Callable[[Any], Found]
) -> Found:
    """What `find(model)` gives, kept in `found` until the model's signature is another one."""
    known = found.get(model)
    if known is None or known[0] != signature:
        known = found[model] = (signature, find(model))
    return known[1]


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _hooks_everywhere() -> bool:
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def _alterations(name: str, module: nn.Module) -> list[str]:
    """What of a module is not TransformerLens' own, hooks apart, in words."""
    kind, found = type(module), []
    if name.rpartition(".")[2].startswith("hook_"):
        if kind.__name__ != "HookPoint" or not _is_transformer_lens(kind):
            found.append(f"{name} is a {kind.__name__} instead of a HookPoint")
    elif not _is_own(kind):
        found.append(f"{name or 'the model'} is a {kind.__name__}, which is not TransformerLens' own")
    found.extend(f"{name}.{key}".lstrip(".") + " was replaced" for key in _replaced_methods(module))
    if getattr(module, "_compiled_call_impl", None) is not None:
        found.append(f"{name or 'the model'} was compiled")
    return found


def _inner_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """All modules but hook points, the model itself and what stands behind the blocks."""
    for name, module in model.named_modules():
        if name and not name.rpartition(".")[2].startswith("hook_") and name.partition(".")[0] not in _BEHIND:
            yield name, module


def _is_transformer_lens(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformer_lens"


def _is_own(kind: type) -> bool:
    """A class of TransformerLens or torch, SAELens' model, or one made from these that runs as they do."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("transformer_lens", "torch"):
            return True
        if (base.__module__, base.__qualname__) == _SAE_MODEL:
            continue
        if {"forward", "__call__", "_call_impl", "input_to_embed", "get_residual", "__getattr__"} & vars(base).keys():
            return False
    return False


def _replaced_methods(module: nn.Module) -> list[str]:
    """Methods of a module's class that an attribute of the instance hides, as in `block.forward = ...`."""
    kind = type(module)
    hidden = [key for key, value in vars(module).items() if callable(value) and callable(getattr(kind, key, None))]
    return [key for key in hidden if not (key == "forward" and _is_sae_lens_mlp(module))]


def _is_sae_lens_mlp(module: nn.Module) -> bool:
    """Whether a module's `forward` is what SAELens makes of it: its own behind a hook point, of this very module.

    A copy of the model has the `forward` of the original's module, with the original's weights.
    """
    forward = module.forward
    code = getattr(forward, "__code__", None)
    if code is None or (forward.__module__, code.co_qualname) != (
        _SAE_MODEL[0],
        "add_hook_in_to_mlp.<locals>.<lambda>",
    ):
        return False
    inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in forward.__closure__ or ()), strict=True))
    own = inside.get("original_forward")
    return (
        inside.keys() == {"mlp", "original_forward"}
        and inside["mlp"] is module
        and own == MethodType(type(module).forward, module)
    )


def _plain_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if isinstance(value, str | int | float | bool):
            yield key, value
        elif callable(value):
            yield key, _identity(value)


def _identity(value: Any) -> Any:
    """Equal only for the same object: an `id` may be that of another one, once the first is gone."""
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def rounding(model: Any) -> float:
    is_tf32 = model.cfg.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TF32_ROUNDING if is_tf32 else ROUNDING[model.cfg.dtype]
