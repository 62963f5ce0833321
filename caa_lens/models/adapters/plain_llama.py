"""Whether a HookedTransformer is what its class says, and a plain Llama: what the engine's own arithmetic stands for.

Whoever does a model's arithmetic in another way than `model.forward` must know that nothing would be passed over. Two
questions are answered here from the modules themselves, without running them:

- `alterations`: is a module TransformerLens' own, without a method that was replaced?
- `not_a_plain_llama`: is each block what `llama_blocks` is written for? Every field of the configuration and every kind
  of module must be on a list of what was verified; a field that the list does not know is refused.

Neither is proof by itself: `engine.shared_prefix.unsupported` also compares numbers.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

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
# SAELens' model differs from TransformerLens' own in what stands in its hook points' places, and in a hook point that
# its MLPs have in front; see `_replaced_methods`.
_SAE_MODEL = ("sae_lens.analysis.hooked_sae_transformer", "HookedSAETransformer")


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


def alterations(name: str, module: nn.Module) -> list[str]:
    """What of a module is not TransformerLens' own, hooks apart, in words."""
    kind, found = type(module), []
    if name.rpartition(".")[2].startswith("hook_"):
        if kind.__name__ != "HookPoint" or not is_transformer_lens(kind):
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


def is_transformer_lens(kind: type) -> bool:
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
