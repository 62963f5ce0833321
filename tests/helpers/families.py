"""Small random models of many families, as Hugging Face computes them, and `TransformerBridge`s around copies of them.

Four blocks of width 64 behind the demo model's vocabulary, so that prompts are real. Every parameter is random and
large enough to count: biases, the weights of all norms, sinks, the experts' routers. `hf_of` gives the model that
nobody has touched, in float32 and with eager attention, `bridge_of` a bridge as a user boots one, around another copy.
"""

import importlib.metadata
import os
import warnings
from functools import cache
from typing import Any

import torch

D_MODEL, N_LAYERS, N_CTX, WINDOW = 64, 4, 384, 16
VOCABULARY = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SHAPE = {"hidden_size": D_MODEL, "intermediate_size": 96, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": N_CTX}
GROUPED = SHAPE | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 32}  # heads that are wider than their share of the stream
GPT = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": N_CTX}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LOCAL, GLOBAL = "sliding_attention", "full_attention"

# The class of each family's configuration in transformers, and what is said in it.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", GROUPED | {"rope_parameters": LLAMA3_ROPE}),
    "gpt2": ("GPT2Config", GPT),
    "pythia": ("GPTNeoXConfig", SHAPE),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", WIDE),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", WIDE | {"sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        WIDE | {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL]},
    ),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "mistral window": ("MistralConfig", GROUPED | {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "phi": ("PhiConfig", SHAPE | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", GROUPED | {"sliding_window": None}),
    "phi3 window": ("Phi3Config", GROUPED | {"sliding_window": WINDOW}),
    "olmo": ("OlmoConfig", GROUPED | {"clip_qkv": 2.0}),
    "olmo2": ("Olmo2Config", GROUPED),
    "olmo3": (
        "Olmo3Config",
        GROUPED | {"sliding_window": WINDOW, "layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL]},
    ),
    "olmoe": ("OlmoeConfig", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.25}),
    "cohere qk norm": ("CohereConfig", GROUPED | {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": (
        "Cohere2Config",
        GROUPED | {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL]},
    ),
    "granite": (
        "GraniteConfig",
        GROUPED
        | {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.7, "attention_multiplier": 0.4},
    ),
    "stablelm": ("StableLmConfig", GROUPED | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2Config", GROUPED | {"sliding_window": None}),
    "opt": ("OPTConfig", SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": D_MODEL}),
    "bloom": ("BloomConfig", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}),
    "falcon": ("FalconConfig", SHAPE | {"alibi": False, "multi_query": True, "parallel_attn": True}),
    "falcon alibi": (
        "FalconConfig",
        SHAPE | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("MptConfig", {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 4, "max_seq_len": N_CTX}),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 8}),
    "gpt neo": (
        "GPTNeoConfig",
        {
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "gpt bigcode": ("GPTBigCodeConfig", GPT | {"multi_query": True}),
    "codegen": ("CodeGenConfig", GPT | {"rotary_dim": 8}),
    "qwen2 moe": ("Qwen2MoeConfig", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3 moe": ("Qwen3MoeConfig", WIDE | EXPERTS),
    "granite moe": (
        "GraniteMoeConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 0.5, "residual_multiplier": 0.7},
    ),
    "smollm3": ("SmolLM3Config", GROUPED | {"no_rope_layers": [1, 1, 1, 0]}),
    "nemotron": ("NemotronConfig", GROUPED),
    "glm": ("GlmConfig", GROUPED | {"head_dim": 16}),
    "glm4": ("Glm4Config", GROUPED | {"head_dim": 16}),
    "gpt oss": (
        "GptOssConfig",
        WIDE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL],
        },
    ),
    "exaone4": (
        "Exaone4Config",
        GROUPED | {"sliding_window": WINDOW, "layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL]},
    ),
    "ernie": ("Ernie4_5Config", GROUPED | {"use_bias": True}),
    "seed oss": ("SeedOssConfig", WIDE | {"attention_bias": True}),
    "apertus": ("ApertusConfig", GROUPED),
    "arcee": ("ArceeConfig", GROUPED),
    "deepseek3": (
        "DeepseekV3Config",
        SHAPE
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 48,
        },
    ),
}
# Models with a state beside, or in the place of, keys and values.
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "state_size": 8}),
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", GLOBAL, "conv", GLOBAL]}),
    "qwen3 next": (
        "Qwen3NextConfig",
        WIDE
        | EXPERTS
        | {
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", GLOBAL],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "falcon h1": (
        "FalconH1Config",
        GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        GROUPED | {"head_dim": 16, "lru_width": D_MODEL, "attention_window_size": WINDOW},
    ),
}
# Models that do not write a text from left to right out of one stream.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SHAPE),
    "t5": ("T5Config", {"d_model": D_MODEL, "num_layers": N_LAYERS, "num_heads": 4, "d_ff": 96, "d_kv": 16}),
}
FAMILIES = DECODERS | RECURRENT | OTHERS
# What a block's attention adds to the stream, where that is not the output of its module of attention: another module's
# output, times a factor.
ATTENTION_WRITES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "olmo3", "exaone4"), ("post_attention_layernorm", 1.0)),
    "glm4": ("post_self_attn_layernorm", 1.0),
    "granite": ("self_attn", 0.7),
    "granite moe": ("self_attn", 0.7),
    "bloom": ("self_attention.dense", 1.0),
    "gpt neo": ("attn.attention", 1.0),
}
# Families that transformers itself computes differently behind padding on the left, masked or not.
SEES_PADDING = ("recurrent gemma",)
# Where a prompt of twenty tokens is longer than what some layers look back.
WINDOWED = tuple(
    name for name, (_, said) in DECODERS.items() if WINDOW in (said.get("sliding_window"), said.get("window_size"))
)
# What TransformerLens 3 computes otherwise than transformers, and says nothing (it turns queries and keys in another
# way); and what it cannot load, or run with the transformers of today, and says so.
WRONG_IN_3 = ("cohere", "cohere2")
FAILS_IN_3 = ("cohere qk norm", "t5")


def transformer_lens() -> str:
    """The main version that runs: 3 or 4."""
    return importlib.metadata.version("transformer-lens").partition(".")[0]


# What runs in the tests' second pass, under TransformerLens 4: what differs between the two, and what is used most. All
# families run there where CAA_LENS_ALL_FAMILIES is set; the page of families was written from all of them.
MOST_USED = (
    *("llama3", "gpt2", "pythia", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "mistral window"),
    *("mixtral", "phi", "phi3", "olmo2", "cohere", "cohere2", "cohere qk norm", "granite", "nemotron", "gpt oss"),
    *("deepseek3", "falcon alibi", "mpt", "opt", "mamba", "qwen3 next"),
)


def run_here() -> list[str]:
    """Families that the tests run under the TransformerLens that is here."""
    known = [*DECODERS, *RECURRENT]
    if transformer_lens() == "3" or os.environ.get("CAA_LENS_ALL_FAMILIES"):
        return known
    return [name for name in known if name in MOST_USED]


def wrong_here() -> tuple[str, ...]:
    """Families whose bridge is not the model, under the TransformerLens that runs."""
    return WRONG_IN_3 if transformer_lens() == "3" else ()


def absent_here() -> tuple[str, ...]:
    """Families that the TransformerLens that runs does not load, or not run at all."""
    return FAILS_IN_3 if transformer_lens() == "3" else ()


def hf_of(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **said: Any) -> Any:
    """The family's model as transformers builds it, all numbers of it random; `said` goes into its configuration."""
    import transformers

    config_class, options = FAMILIES[name]
    config = getattr(transformers, config_class)(**VOCABULARY, **(options | said))
    make = {"bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration"}.get(name)
    torch.manual_seed(seed)
    if make is None:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:
        config._attn_implementation = "eager"
        model = getattr(transformers, make)(config)
    model = model.float().eval()
    randomize(model, seed)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype)


def randomize(model: Any, seed: int) -> None:
    """Numbers that count in every parameter, in place: nothing stays zero, one, or too small to be felt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rpartition(".")[2]
            if any(part in name for part in ("embed", "wte", "wpe", "lm_head", "word_emb")) and parameter.ndim == 2:
                parameter.copy_(0.3 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(0.14 * noise)
            elif last == "bias":
                parameter.copy_(0.1 * noise)
            else:  # norms (stored as they are, or less one), sinks, decays: about where they were
                parameter.add_(0.3 * noise)


@cache
def demo_tokenizer() -> Any:
    """The demo model's, as transformers reads it."""
    from transformers import AutoTokenizer

    from caa_lens.models.loading.demo_model import demo_model_path

    return AutoTokenizer.from_pretrained(str(demo_model_path()), local_files_only=True)


def bridge_of(name: str, *, hf: Any = None, **options: Any) -> Any:
    """A `TransformerBridge` as a user boots it, around a copy of the family's model (or around `hf`)."""
    import copy

    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            f"tiny/{name.replace(' ', '-')}",
            hf_model=hf_of(name) if hf is None else hf,
            tokenizer=copy.deepcopy(demo_tokenizer()),
            device="cpu",
            **options,
        )
