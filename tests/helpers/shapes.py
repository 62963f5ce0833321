"""Small random models of many families' shapes, as `HookedTransformer`."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

LLAMA = {
    "n_heads": 4,
    "n_key_value_heads": None,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 8,
    "rotary_adjacent_pairs": False,
    "act_fn": "silu",
    "gated_mlp": True,
    "final_rms": True,
}
GPT2 = {"normalization_type": "LN", "positional_embedding_type": "standard", "act_fn": "gelu_new", "gated_mlp": False}
GPT2 |= {"final_rms": False, "rotary_dim": None}
NEOX = {"normalization_type": "LN", "act_fn": "gelu", "gated_mlp": False, "final_rms": False, "parallel_attn_mlp": True}
SANDWICH = {"use_normalization_before_and_after": True, "act_fn": "gelu_pytorch_tanh"}
LOCAL = {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local", "global", "local"]}

# What the shared-prefix engine is written for.
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama grouped": {"n_key_value_heads": 2},
    "llama one key head": {"n_key_value_heads": 1},
    "llama folded": {"normalization_type": "RMSPre"},
    "qwen2": {"n_key_value_heads": 2, "original_architecture": "Qwen2ForCausalLM"},
    "qwen3": {"n_key_value_heads": 2, "use_qk_norm": True, "original_architecture": "Qwen3ForCausalLM"},
    "partial rotary": {"rotary_dim": 4},
    "adjacent rotary": {"rotary_adjacent_pairs": True},
    "capped logits": {"output_logits_soft_cap": 0.7},
    "llama 3 rotary": {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 16},
}
# What it is not.
OTHER: dict[str, dict[str, Any]] = {
    "ungrouped heads": {"n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
    "gemma2": {
        **SANDWICH,
        **LOCAL,
        "n_key_value_heads": 2,
        "attn_scores_soft_cap": 0.5,
        "output_logits_soft_cap": 0.7,
    },
    "capped scores": {"attn_scores_soft_cap": 0.5},
    "sandwich norms": SANDWICH,
    "olmo2": {"original_architecture": "Olmo2ForCausalLM"},
    "olmo3": {"original_architecture": "Olmo3ForCausalLM", "n_key_value_heads": 2},
    "clipped": {"clip_qkv": 0.2},
    "gpt2": GPT2,
    "gpt2 folded": {**GPT2, "normalization_type": "LNPre"},
    "neox": {**NEOX, "rotary_dim": 4},
    "pythia": {**NEOX, "rotary_dim": 2},
    "gptj": {**NEOX, "rotary_dim": 4, "rotary_adjacent_pairs": True},
    "bloom": {**GPT2, "positional_embedding_type": "alibi", "post_embedding_ln": True},
    "moe": {"num_experts": 4, "experts_per_token": 2},
    "attention only": {"attn_only": True},
    "no norm": {"normalization_type": None, "final_rms": False},
    "local attention": LOCAL,
    "parallel llama": {"parallel_attn_mlp": True},
    "log n attention": {"use_logn_attn": True, "train_seq_length": 4},
    "dynamic rotary": {"use_dynamic_ntk_rope": True, "train_seq_length": 4},
    "per-head results": {"use_attn_result": True},
    "split inputs": {"use_split_qkv_input": True},
}


def model_of(shape: str, tokenizer: Any = None, *, d_vocab: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose every parameter counts, biases and norms too."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    options = {**LLAMA, **(PLAIN | OTHER)[shape]}
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        model_name=shape,
        n_layers=4,
        d_model=32,
        d_head=8,
        d_mlp=40,
        d_vocab=len(tokenizer) if tokenizer is not None else d_vocab,
        n_ctx=256,
        dtype=dtype,
        device="cpu",
        seed=0,
        initializer_range=0.15,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2].lstrip("_")
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if last == "w":
            parameter.data = 1 + 0.3 * noise
        elif last.startswith("b"):
            parameter.data = 0.2 * noise
        elif not parameter.data.abs().sum() or "experts" in name or "W_gate" in name:
            parameter.data = 0.15 * noise
    model.tokenizer = tokenizer
    return model.eval()


# ---- ways to change a model so that its own forward computes something else ----------------------------------------


def _hooked(register: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda model: register(model) and None


def _double(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
    return 1.5 * out


def _double_first(module: Any, given: tuple) -> tuple:
    return (1.5 * given[0], *given[1:])


class Rescaled(torch.nn.Module):
    """Stands in a hook point's place, as a sparse autoencoder does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.7 * x + 0.1


class Wrapped(torch.nn.Module):
    """A block inside of another module, as adapters do it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.9 * self.inner(*args, **kwargs)


class Halved(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


def _replace_forward(module: Any) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: 1.2 * own(*args, **kwargs)


def _replace_rotary(model: Any) -> None:
    model.blocks[1].attn.apply_rotary = lambda x, *args, **kwargs: x


def _replace_qkv(model: Any) -> None:
    attn = model.blocks[1].attn
    own = attn.calculate_qkv_matrices
    attn.calculate_qkv_matrices = lambda *args: tuple(2 * one for one in own(*args))


def _replace_attention_scores(model: Any) -> None:
    attn = model.blocks[1].attn
    own = attn.calculate_attention_scores
    attn.calculate_attention_scores = lambda q, k: 3 * own(q, k)


def _in_hook_point(model: Any) -> None:
    model.blocks[1].hook_mlp_out = Rescaled()
    model.setup()


def _in_resid_post(model: Any) -> None:
    model.blocks[1].hook_resid_post = Rescaled()
    model.setup()


def _parametrize(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(model.blocks[1].attn, "W_O", Halved())


def _own_configuration(model: Any) -> None:
    import copy

    cfg = copy.deepcopy(model.cfg)
    cfg.attn_scores_soft_cap = 0.3
    model.blocks[1].attn.cfg = cfg


CHANGES: dict[str, Callable[[Any], None]] = {
    "hook": lambda model: model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 1.5 * x),
    "permanent hook": lambda model: model.add_perma_hook("blocks.1.attn.hook_z", lambda x, hook: 1.5 * x),
    "hook at the norm": lambda model: model.add_hook("ln_final.hook_normalized", lambda x, hook: x + 0.3),
    "hook at the logits": lambda model: model.add_hook("unembed.hook_in", lambda x, hook: x.flip(-1)),
    "hook at a position": lambda model: model.add_hook("blocks.1.hook_resid_post", _third_position),
    "hook at the first position": lambda model: model.add_hook("blocks.1.hook_resid_post", _position(0)),
    "hook at the last position": lambda model: model.add_hook("blocks.1.hook_resid_post", _position(-1)),
    "torch hook on a block": _hooked(lambda model: model.blocks[1].register_forward_hook(_double)),
    "torch hook before a block": _hooked(lambda model: model.blocks[1].register_forward_pre_hook(_double_first)),
    "torch hook on attention": _hooked(lambda model: model.blocks[1].attn.register_forward_hook(_double)),
    "torch hook on a norm": _hooked(lambda model: model.blocks[1].ln2.register_forward_hook(_double)),
    "torch hook on the mlp": _hooked(lambda model: model.blocks[1].mlp.register_forward_hook(_double)),
    "torch hook on the embedding": _hooked(lambda model: model.embed.register_forward_hook(_double)),
    "torch hook on the final norm": _hooked(lambda model: model.ln_final.register_forward_hook(_double)),
    "torch hook on the unembedding": _hooked(lambda model: model.unembed.register_forward_hook(_double)),
    "torch hook on a hook point": _hooked(lambda model: model.blocks[1].hook_attn_out.register_forward_hook(_double)),
    "block.forward": lambda model: _replace_forward(model.blocks[1]),
    "attn.forward": lambda model: _replace_forward(model.blocks[1].attn),
    "embed.forward": lambda model: _replace_forward(model.embed),
    "apply_rotary": _replace_rotary,
    "calculate_qkv_matrices": _replace_qkv,
    "calculate_attention_scores": _replace_attention_scores,
    "module in a hook point's place": _in_hook_point,
    "module in the stream": _in_resid_post,
    "wrapped block": lambda model: model.blocks.__setitem__(1, Wrapped(model.blocks[1])),
    "wrapped unembedding": lambda model: setattr(model, "unembed", Wrapped(model.unembed)),
    "parametrized weight": _parametrize,
    "attention's own configuration": _own_configuration,
    "per-head results": lambda model: model.set_use_attn_result(True),
    "split inputs": lambda model: model.set_use_split_qkv_input(True),
}


def _position(where: int) -> Callable[..., torch.Tensor]:
    """A hook that edits one position of whatever runs, which under a cache is another text than without."""

    def edit(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        resid = resid.clone()
        resid[:, where] = -1.5 * resid[:, where].flip(-1)
        return resid

    return edit


def _third_position(resid: torch.Tensor, hook: Any) -> torch.Tensor:
    """As TransformerLens' own patching does: it looks at absolute positions of the text that runs."""
    resid = resid.clone()
    if resid.shape[1] > 3:
        resid[:, 3] += 2
    return resid
