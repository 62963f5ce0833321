"""Small things that tests build: random Llamas, tokenizers, vectors."""

import json
import os
from pathlib import Path

import pytest
import torch

from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVectors
from helpers import device

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
# A folder with the demo model's text files alone, on a machine that has not its weights: `make gpu` names it.
TOKENIZER = os.environ.get("CAA_LENS_TOKENIZER")


def demo_folder():
    """The folder with the demo model's tokenizer, and, unless `TOKENIZER` is set, with the model."""
    from caa_lens.models.loading.demo_model import demo_model_path

    return Path(TOKENIZER) if TOKENIZER else demo_model_path()


def demo_hugging_face():
    """The demo model as transformers itself runs it: nothing of ours or of TransformerLens' in it."""
    from transformers import AutoModelForCausalLM

    if TOKENIZER:
        pytest.skip("needs the demo model, of which only the tokenizer is here")
    return AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32).to(device.device()).eval()


KINDS = ("hooked", "bridge")


def kinds_here():
    """The kinds of models that the installed TransformerLens can make."""
    from importlib.metadata import version

    return KINDS if int(version("transformer-lens").partition(".")[0]) < 4 else KINDS[1:]


def tiny_model(
    *,
    kind: str = "hooked",
    n_layers: int = 5,
    n_key_value_heads: int | None = 2,
    d_model: int = 32,
    d_vocab: int = 64,
    n_ctx: int = 128,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: object = None,
):
    """A random model of Llama's shape with four heads, quick enough for laws; both kinds have the same numbers."""
    shape = {"n_layers": n_layers, "d_model": d_model, "d_vocab": d_vocab, "n_ctx": n_ctx, "dtype": dtype}
    make = {"hooked": _hooked_transformer, "bridge": _bridge}[kind]
    model = make(n_key_value_heads=n_key_value_heads, seed=seed, **shape)
    model.tokenizer = tokenizer
    return model.eval()


def _hooked_transformer(*, n_layers, n_key_value_heads, d_model, d_vocab, n_ctx, dtype, seed):
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
    for norm in [
        model.ln_final,
        *(block.ln1 for block in model.blocks),
        *(block.ln2 for block in model.blocks),
    ]:
        norm.w.data = 1 + 0.3 * torch.randn_like(norm.w)
    return model.to(device.device())


def _bridge(*, n_layers, n_key_value_heads, d_model, d_vocab, n_ctx, dtype, seed):
    """The numbers are drawn in the order in which a `HookedTransformer` draws its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from caa_lens.models.loading.bridges import boot

    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=n_key_value_heads or 4,
        max_position_embeddings=n_ctx,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        hf = LlamaForCausalLM(config)
    hf.to(dtype).to_empty(device="cpu")
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=config)
    torch.manual_seed(seed)

    def drawn(*shape):
        return torch.empty(shape, dtype=dtype).normal_(std=0.15)

    def into_heads(n_heads):
        return drawn(n_heads, d_model, d_model // 4).transpose(1, 2).reshape(-1, d_model).contiguous()

    hf.model.embed_tokens.weight.data = drawn(d_vocab, d_model)
    for layer in hf.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj.weight.data = into_heads(4)
        attention.o_proj.weight.data = drawn(4, d_model // 4, d_model).reshape(-1, d_model).T.contiguous()
        attention.k_proj.weight.data = into_heads(config.num_key_value_heads)
        attention.v_proj.weight.data = into_heads(config.num_key_value_heads)
        mlp.up_proj.weight.data = drawn(d_model, 48).T.contiguous()
        mlp.down_proj.weight.data = drawn(48, d_model).T.contiguous()
        mlp.gate_proj.weight.data = drawn(d_model, 48).T.contiguous()
    hf.lm_head.weight.data = drawn(d_model, d_vocab).T.contiguous()
    for norm in [
        hf.model.norm,
        *(layer.input_layernorm for layer in hf.model.layers),
        *(layer.post_attention_layernorm for layer in hf.model.layers),
    ]:
        norm.weight.data = 1 + 0.3 * torch.randn(d_model, dtype=dtype)
    return boot(hf.to(device.device()), "tiny-random-llama", None, "", check=False)


def load_in_its_place(monkeypatch, load):
    """Let a function stand in for `load_model`, wherever that is looked up.

    A package keeps a name after its first use, so the real one is fetched before another is put in its place.
    """
    import caa_lens
    from caa_lens.models.loading import load as module

    for place in (caa_lens, caa_lens.models, module):
        monkeypatch.setattr(place, "load_model", load)


def random_vectors(model, *, layers=None, scale: float = 1.0, seed: int = 0, behavior: str = "random"):
    """One random vector a layer."""
    layers = tuple(range(model.cfg.n_layers)) if layers is None else tuple(layers)
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        directions=scale * torch.randn(len(layers), model.cfg.d_model, generator=generator),
        layers=layers,
        provenance=Provenance(model=model.cfg.model_name, behavior=behavior, expression=behavior),
    )


def random_llama(folder, *, dtype=torch.float32, shard="5GB", seed=0, **options):
    """Save a random Llama of transformers (grouped queries, untied, unless told otherwise), and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**{**shape, **heads, **tokens, "initializer_range": 0.2, **options})
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def edited(source, target, *, tensors=None, **config):
    """A copy of a one-file folder with other tensors or config entries."""
    from safetensors.torch import load_file, save_file

    target.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / "model.safetensors") if tensors is None else tensors, target / "model.safetensors")
    return target


def known_as(folder, hub_id):
    """Write a checkpoint's hub id into its config.json, as the hub's own files have it."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": hub_id}))


def write_gguf(path, hf, *, architecture="llama", rope_factors=None, scaling=None, drop=(), tokens=()):
    """The file that llama.cpp's converter would write, in float32; with a tokenizer if it gets tokens."""
    import einops
    import gguf

    config, writer = hf.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(["Ġ Ġ"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    if scaling:
        writer.add_rope_scaling_type(scaling)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in hf.state_dict().items():
        for projection, n_heads in heads.items():
            if projection in name:  # llama.cpp rotates neighbours, Hugging Face the two halves
                tensor = einops.rearrange(tensor, "(n two h) m -> (n h two) m", n=n_heads, two=2)
        if name not in drop:
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.float().numpy())
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
