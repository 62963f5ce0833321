"""A small random Llama as a `TransformerBridge`, and the same numbers by torch's hooks on the Hugging Face module."""

import copy
from contextlib import contextmanager

import torch

from helpers import device
from helpers.models import demo_folder

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "attention_bias": True}
# Where a site is in a Llama of transformers: the module, and whether it is what goes in or what comes out.
PLACES = {
    "hook_resid_post": ("", "out"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "mlp.hook_pre": ("mlp.gate_proj", "out"),
    "hook_mlp_out": ("mlp", "out"),
}


def bridge_and_module(seed=0):
    """A bridge with the demo model's tokenizer, and an untouched copy of its Hugging Face module."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = str(demo_folder())
    torch.manual_seed(seed)
    d_vocab = len(AutoTokenizer.from_pretrained(folder))
    hf = LlamaForCausalLM._from_config(LlamaConfig(vocab_size=d_vocab, **SHAPE), attn_implementation="eager")
    hf = hf.float().eval()
    for name, parameter in hf.named_parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
        elif "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    hf = hf.to(device.device())
    alone = copy.deepcopy(hf)
    return TransformerBridge.boot_transformers(folder, hf_model=hf, device=str(device.device())), alone


def _module_at(hf, layer, site):
    place, end = PLACES[site]
    found = hf.model.layers[layer]
    return (found.get_submodule(place) if place else found), end


@contextmanager
def changed(hf, edits):
    """`edits` are `(layer, site, function of [batch pos width])`."""
    handles = []
    for layer, site, function in edits:
        module, end = _module_at(hf, layer, site)

        def before(module, given, function=function):
            return (function(given[0]), *given[1:])

        def behind(module, given, out, function=function):
            return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

        take = module.register_forward_pre_hook if end == "in" else module.register_forward_hook
        handles.append(take(before if end == "in" else behind))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(hf, tokens, edits=()):
    """`[pos d_vocab]` of one text, with what lies at some sites changed."""
    with torch.no_grad(), changed(hf, edits):
        return hf(torch.tensor([list(tokens)]), use_cache=False).logits[0]


def read_of(hf, tokens, layer, site):
    """`[pos width]` of one text at a site."""
    kept = []
    with torch.no_grad(), changed(hf, [(layer, site, lambda out: kept.append(out[0].clone()) or out)]):
        hf(torch.tensor([list(tokens)]), use_cache=False)
    return kept[0]
