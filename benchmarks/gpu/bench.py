"""A Llama with random weights on one device, and what is asked of it."""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import seconds

import caa_lens as cl
from caa_lens.models.loading.llama_config import hooked_config
from caa_lens.models.loading.weights import _parameter_map, build_model, expected_shapes
from caa_lens.prompts.prompt_formats import Prompt

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
LETTERS = (29909, 29933)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model with what is asked of it."""

    model: Any
    pairs: list[tuple[Prompt, Prompt]]
    vectors: cl.SteeringVectors
    options: argparse.Namespace
    limits: dict[str, float]

    @property
    def device(self) -> torch.device:
        return self.model.W_E.device

    @property
    def of_a_token(self) -> int:
        """Floating-point operations of the blocks' matrices for one token."""
        cfg = self.model.cfg
        kv = (cfg.n_key_value_heads or cfg.n_heads) / cfg.n_heads
        return int(2 * cfg.n_layers * ((2 + 2 * kv) * cfg.d_model**2 + 3 * cfg.d_model * cfg.d_mlp))

    def share_of_matrix(self, operations: float, time: float) -> float:
        return operations / time / self.limits[f"matrix {self.options.dtype}"]


def prompt_of(generator: torch.Generator, n_tokens: int, letter: int) -> Prompt:
    """A random question that ends like `... ] ( A`: steering starts three tokens before the end."""
    body = torch.randint(3, 32000, (n_tokens - 1,), generator=generator).tolist()
    return Prompt(
        text="",
        tokens=(*body, letter),
        steer_start=n_tokens - 3,
        answer_start=n_tokens - 2,
        read=(n_tokens - 1, n_tokens),
    )


def pairs_of(n_pairs: int, n_tokens: int) -> list[tuple[Prompt, Prompt]]:
    pairs = []
    for seed in range(n_pairs):
        sides = [prompt_of(torch.Generator().manual_seed(seed), n_tokens, letter) for letter in LETTERS]
        pairs.append((sides[0], sides[1]))
    return pairs


def peak_of(run: Callable[[], object]) -> tuple[float, str]:
    """Seconds, and the peak above what was there before; without a name of it on a CPU, which does not tell."""
    if not torch.cuda.is_available():
        return seconds(run), ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time = seconds(run)
    return time, f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB"


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def at_least(aim: float, value: float, words: str) -> dict[str, Any]:
    return {"aim": words, "met": value >= aim}


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **SHAPES[options.shape]}


def built(options: argparse.Namespace) -> Any:
    """Random weights, made on the device."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    cfg = hooked_config(config_of(options), dtype=dtype, device=str(device))
    torch.manual_seed(0)
    cfg.model_name = f"shape-of-llama-2-{options.shape}"
    shapes = expected_shapes(cfg)
    return build_model(cfg, lambda name: torch.randn(shapes[name], device=device, dtype=dtype) * 0.02)


def as_hugging_face(model: Any, options: argparse.Namespace) -> Any:
    """transformers' own module over the very same memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    back = {"_transposed": lambda w: w.T, "_as_is": lambda w: w}
    back |= {
        "_heads_in": lambda w: w.transpose(1, 2).flatten(0, 1),
        "_heads_out": lambda w: w.permute(2, 0, 1).flatten(1),
    }
    told = config_of(options)
    del told["model_type"]
    with torch.device("meta"):
        hf = LlamaForCausalLM(LlamaConfig(**told, rms_norm_eps=model.cfg.eps, attn_implementation="sdpa"))
    weights = {
        name: back[view.__name__](model.get_parameter(ours).data) for name, _, ours, view in _parameter_map(model.cfg)
    }
    hf.load_state_dict(weights, strict=True, assign=True)
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=hf.config).to(options.device)
    hf.generation_config.eos_token_id = None
    return hf.to(getattr(torch, options.dtype)).eval()
