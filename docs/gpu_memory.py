"""The tables of docs/gpu_memory.md: what models of a shape need, from the rules that the library itself goes by.

    .venv/bin/python docs/gpu_memory.py

Shapes are those of the models' published `config.json`.
"""

import sys
from pathlib import Path

import torch

from caa_lens.engine import shared_prefix
from caa_lens.engine.shared_prefix import MOST_TOKENS
from caa_lens.models.loading.llama_config import count_parameters, hooked_config
from caa_lens.models.loading.load import HEADROOM

CARDS = (8, 12, 16, 24, 40, 48, 80, 141)  # GB on the label
PROMPT = 150  # tokens; A/B questions have 100 to 200


def shape(
    d_model: int, d_mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "SmolLM2 135M": shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "SmolLM2 1.7B": shape(2048, 8192, 24, 32, 32, 49152, tied=True),
    "Llama 3.2 3B": shape(3072, 8192, 28, 24, 8, 128256, tied=True),
    "Llama 2 7B": shape(4096, 11008, 32, 32, 32, 32000),
    "Llama 3.1 8B": shape(4096, 14336, 32, 32, 8, 128256),
    "Llama 2 13B": shape(5120, 13824, 40, 40, 40, 32000),
    "Llama 2 70B": shape(8192, 28672, 80, 64, 8, 32000),
}

PAPERS = {"Llama 2 7B": "meta-llama/Llama-2-7b-chat-hf", "Llama 2 13B": "meta-llama/Llama-2-13b-chat-hf"}


def row(name: str, config: dict) -> list[str]:
    cfg = hooked_config(config, dtype=torch.bfloat16)
    weights = count_parameters(cfg) * cfg.dtype.itemsize
    prompts = shared_prefix.kv_numbers(cfg, MOST_TOKENS) * cfg.dtype.itemsize
    answers = MOST_TOKENS * shared_prefix.suffix_numbers(cfg, PROMPT) * cfg.dtype.itemsize
    smallest = HEADROOM * weights
    comfortable = max(smallest, weights + 4 * max(prompts, answers))  # each gets a quarter of what is free
    sizes = [f"{size / 1e9:.1f}" for size in (weights, smallest, prompts, answers)]
    cards = [next((f"{card} GB" for card in CARDS if need <= card * 1e9), "none") for need in (smallest, comfortable)]
    return [name, *sizes, *cards]


def table() -> str:
    heads = ["model", "weights", "must be free", "prompts", "answers", "smallest card", "full batches"]
    rows = [heads, ["---"] * len(heads), *(row(name, config) for name, config in MODELS.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def runs() -> str:
    """What the paper's runs take, as `python -m experiments` plans them: a process' memory, and the disk."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from experiments.catalogue import EXPERIMENTS
    from experiments.paper.tables_4_10_13_finetuning import EXPERIMENT as FINETUNING
    from experiments.running.plan import disk_bytes, memory_bytes, scratch_bytes
    from experiments.running.settings import BYTES, RunConfig

    heads = ["model", "number format", "weights", "must be free", "with finetuning", "on the disk", "with adapters"]
    rows = [heads, ["---"] * len(heads)]
    for name, repo in PAPERS.items():
        config = RunConfig.of(repo)
        parameters = count_parameters(hooked_config(MODELS[name]))
        rest = [one for one in EXPERIMENTS if one is not FINETUNING]
        adapters = config.model_copy(update={"finetune": "lora"})
        stored = disk_bytes(config) or 0.0
        sizes = [
            BYTES[config.dtype] * parameters,
            memory_bytes(config, parameters, rest),
            memory_bytes(config, parameters, EXPERIMENTS),
            stored,
            stored + scratch_bytes(adapters, parameters, EXPERIMENTS),
        ]
        rows.append([f"{name} chat", config.dtype, *(f"{size / 1e9:.1f}" for size in sizes)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n\n{runs()}\n")
