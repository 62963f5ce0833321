"""Small things that tests build: random Llamas, tokenizers, vectors."""

from pathlib import Path

import torch

from caa_lens.vectors import Provenance, SteeringVectors

SHARED = Path(__file__).resolve().parents[2] / "shared"


def tiny_model(
    *,
    n_layers: int = 5,
    n_key_value_heads: int | None = 2,
    d_model: int = 32,
    d_vocab: int = 64,
    n_ctx: int = 128,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: object = None,
):
    """A random `HookedTransformer` of Llama's shape with four heads, quick enough for laws."""
    import warnings

    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(seed)
    cfg = HookedTransformerConfig(
        model_name="tiny-random-llama",
        n_layers=n_layers,
        d_model=d_model,
        d_head=d_model // 4,
        n_heads=4,
        n_key_value_heads=n_key_value_heads,
        d_mlp=48,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_model // 4,
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        final_rms=True,
        dtype=dtype,
        device="cpu",
        initializer_range=0.15,
        seed=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg)
    for norm in [model.ln_final, *(block.ln1 for block in model.blocks), *(block.ln2 for block in model.blocks)]:
        norm.w.data = 1 + 0.3 * torch.randn_like(norm.w)
    model.tokenizer = tokenizer
    model.eval()
    return model


def random_vectors(model, *, layers=None, scale: float = 1.0, seed: int = 0, behavior: str = "random"):
    """One random vector a layer."""
    layers = tuple(range(model.cfg.n_layers)) if layers is None else tuple(layers)
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        directions=scale * torch.randn(len(layers), model.cfg.d_model, generator=generator),
        layers=layers,
        provenance=Provenance(model=model.cfg.model_name, behavior=behavior, expression=behavior),
    )
