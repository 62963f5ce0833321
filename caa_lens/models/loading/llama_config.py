"""From the ``config.json`` of a Llama to the TransformerLens configuration that computes the same.

What TransformerLens cannot compute as Hugging Face does is refused, not approximated.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from caa_lens.models.loading.weights import expected_shapes

# TransformerLens takes about 3 s to import, so it is imported where it is used.
if TYPE_CHECKING:
    from transformer_lens.config import HookedTransformerConfig

Config = Mapping[str, Any]
"""The contents of a Hugging Face ``config.json``."""


class NotByHookedTransformerError(ValueError):
    """A model that HookedTransformer does not compute as transformers does; a TransformerBridge may."""


def count_parameters(cfg: "HookedTransformerConfig") -> int:
    """Number of parameters of the Llama that a TransformerLens configuration describes, tied embeddings once."""
    return sum(math.prod(shape) for shape in expected_shapes(cfg).values())


def hooked_config(
    config: Config, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> "HookedTransformerConfig":
    """The TransformerLens configuration that computes what Hugging Face computes from this ``config.json``.

    Args:
        config: the parsed ``config.json`` of a Llama.
        dtype: type of the weights and activations.
        device: where they go.

    Raises:
        NotByHookedTransformerError: another architecture, or an option that it does not compute the same way.
        ValueError: the configuration is not complete.
    """
    from transformer_lens.config import HookedTransformerConfig

    def require(key: str, default: Any, reason: str) -> None:
        got = config.get(key) or default
        if got != default:
            raise NotByHookedTransformerError(f"config.json has {key}={got!r}, expected {default!r}: {reason}")

    if config.get("model_type") != "llama":
        raise NotByHookedTransformerError(
            f"config.json has model_type={config.get('model_type')!r}, expected 'llama': only models of the"
            " Llama architecture become a HookedTransformer (Llama 1 to 3, TinyLlama, SmolLM2, Vicuna ...)"
        )
    if config.get("quantization_config"):
        raise NotByHookedTransformerError(
            "config.json has a quantization_config, expected plain weights: use the checkpoint that it was"
            " quantised from, or a GGUF file"
        )
    require("attention_bias", False, "biases in the attention are not supported")
    require("mlp_bias", False, "biases in the MLP are not supported")
    require("hidden_act", "silu", "other activation functions are not supported")
    try:
        d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
        n_key_value_heads = config.get("num_key_value_heads") or n_heads
        d_head = config.get("head_dim") or d_model // n_heads
        return HookedTransformerConfig(
            n_layers=config["num_hidden_layers"],
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_head,
            # Set only where heads do share keys: TransformerLens has a slower class of attention for that.
            n_key_value_heads=n_key_value_heads if n_key_value_heads != n_heads else None,
            d_mlp=config["intermediate_size"],
            d_vocab=config["vocab_size"],
            n_ctx=config.get("max_position_embeddings", 2048),
            eps=config.get("rms_norm_eps", 1e-6),
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            final_rms=True,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=d_head,
            **_rotary_options(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            original_architecture="LlamaForCausalLM",
            init_weights=False,
            dtype=dtype,
            device=device,
        )
    except KeyError as error:
        raise ValueError(f"config.json has no {error}: it is not the configuration of a complete Llama") from None


def _rotary_options(config: Config) -> dict[str, Any]:
    """Rotary base and scaling: ``rope_parameters``, or before transformers 5 in two other places."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise NotByHookedTransformerError("config.json has a partial_rotary_factor, expected none: it is not supported")
    if kind == "default":
        return {"rotary_base": base}
    trained_length = rope.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
    )
    if kind == "linear":
        return {"rotary_base": base, "rotary_scaling_factor": rope["factor"]}
    if kind == "llama3":
        return {
            "rotary_base": base,
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": trained_length,
        }
    if kind == "yarn" and not (rope.get("mscale") or rope.get("mscale_all_dim")):
        attention_factor = rope.get("attention_factor") or 1.0 + 0.1 * math.log(max(rope["factor"], 1.0))
        return {
            "rotary_base": base,
            "use_yarn_rope": True,
            "yarn_factor": rope["factor"],
            "yarn_attention_factor": attention_factor,
            "yarn_beta_fast": rope.get("beta_fast") or 32.0,
            "yarn_beta_slow": rope.get("beta_slow") or 1.0,
            "yarn_truncate": rope.get("truncate", True),
            "yarn_original_max_position_embeddings": trained_length,
        }
    raise NotByHookedTransformerError(
        f"config.json has the rope type {kind!r} ({rope}), expected 'default', 'linear', 'llama3', or 'yarn'"
        " without mscale: TransformerLens does not compute other types as Hugging Face does"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a folder with config.json and safetensors, as"
            " transformers' save_pretrained writes it"
        ) from None
    except ValueError:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds a {type(config).__name__}, expected an object")
    return config
