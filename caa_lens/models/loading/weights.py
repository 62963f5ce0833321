"""Move Llama weights into TransformerLens without copying them twice, in the layout its forward pass wants.

TransformerLens writes attention weights as ``[head d_model d_head]`` and multiplies from the right; Hugging
Face writes ``[out in]`` matrices. On every forward pass TransformerLens turns its form back into the other
one (``W_in.T.contiguous()``, ``rearrange(W_Q, "n m h -> (n h) m")``), which copies every weight for every
token generated, unless the strides already are those of the Hugging Face matrix. So the parameters here are
*views* of Hugging Face's matrices: the same shapes and values as ever, and the conversion costs nothing.

Nothing is folded or centred: ``ln1.w``, ``ln2.w`` and ``ln_final.w`` are the norms' own weights, so a lens on
the residual stream has to apply ``ln_final`` before it unembeds.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.loading.checkpoints import EMBEDDING, UNEMBEDDING, Read, Shape

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig


# Layout: how a Hugging Face matrix [out in] is seen as a TransformerLens parameter; always a view.


def _heads_in(matrix: Float[Tensor, "out d_model"], d_head: int) -> Float[Tensor, "head d_model d_head"]:
    return rearrange(matrix, "(head d_head) d_model -> head d_model d_head", d_head=d_head)


def _heads_out(matrix: Float[Tensor, "d_model in"], d_head: int) -> Float[Tensor, "head d_head d_model"]:
    return rearrange(matrix, "d_model (head d_head) -> head d_head d_model", d_head=d_head)


def _transposed(matrix: Float[Tensor, "out in"], d_head: int) -> Float[Tensor, "in out"]:
    return matrix.T


def _as_is(tensor: Tensor, d_head: int) -> Tensor:
    return tensor


View = Callable[[Tensor, int], Tensor]


def _parameter_map(cfg: "HookedTransformerConfig") -> Iterator[tuple[str, Shape, str, View]]:
    """Each weight as ``(Hugging Face name, its shape there, TransformerLens name, view)``, largest first.

    The order keeps the peak down: while a tensor is read, it is in memory twice, so the large ones go first.
    """
    assert cfg.d_mlp is not None
    d_model, d_mlp = cfg.d_model, cfg.d_mlp
    d_query = cfg.n_heads * cfg.d_head
    d_key = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    # TransformerLens keeps ungrouped keys and values under an underscore, and shows them repeated without it.
    kv = "_" if cfg.n_key_value_heads is not None else ""
    yield EMBEDDING, (cfg.d_vocab, d_model), "embed.W_E", _as_is
    if not cfg.tie_word_embeddings:
        yield UNEMBEDDING, (cfg.d_vocab, d_model), "unembed.W_U", _transposed
    for layer in range(cfg.n_layers):
        hf, tl = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{hf}.mlp.gate_proj.weight", (d_mlp, d_model), f"{tl}.mlp.W_gate", _transposed
        yield f"{hf}.mlp.up_proj.weight", (d_mlp, d_model), f"{tl}.mlp.W_in", _transposed
        yield f"{hf}.mlp.down_proj.weight", (d_model, d_mlp), f"{tl}.mlp.W_out", _transposed
        yield f"{hf}.self_attn.q_proj.weight", (d_query, d_model), f"{tl}.attn.W_Q", _heads_in
        yield f"{hf}.self_attn.k_proj.weight", (d_key, d_model), f"{tl}.attn.{kv}W_K", _heads_in
        yield f"{hf}.self_attn.v_proj.weight", (d_key, d_model), f"{tl}.attn.{kv}W_V", _heads_in
        yield f"{hf}.self_attn.o_proj.weight", (d_model, d_query), f"{tl}.attn.W_O", _heads_out
        yield f"{hf}.input_layernorm.weight", (d_model,), f"{tl}.ln1.w", _as_is
        yield f"{hf}.post_attention_layernorm.weight", (d_model,), f"{tl}.ln2.w", _as_is
    yield "model.norm.weight", (d_model,), "ln_final.w", _as_is


def expected_shapes(cfg: "HookedTransformerConfig") -> dict[str, Shape]:
    """Hugging Face's name and shape of every tensor that a Llama of this configuration has.

    Tied embeddings appear once. The sum of the sizes is the number of parameters.
    """
    return {name: shape for name, shape, _, _ in _parameter_map(cfg)}


def checkpoint_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that a model's checkpoint has, by their names in the model, for code that trains it.

    A HookedTransformer of a Llama has more: biases, which a Llama has not. Tied embeddings are two parameters there,
    `embed.W_E` and `unembed.W_U`, over one piece of memory (in a model from `caa_lens.load_model`): both are named, and
    what is added to either in place is added to both. Of an optimizer that is not linear in the gradient, their
    gradients have to be summed first. A bridge has its checkpoint's parameters and no others.

    Raises:
        ValueError: the model's tied embeddings do not share their memory, so that training would part them.
    """
    stored = adapter_of(model).stored_parameters(model)
    if stored is not None:
        return stored
    found = {name: model.get_parameter(name) for _, _, name, _ in _parameter_map(model.cfg)}
    if model.cfg.tie_word_embeddings:
        embedding, unembedding = found["embed.W_E"], model.get_parameter("unembed.W_U")
        if embedding.data_ptr() != unembedding.data_ptr():
            raise ValueError(
                "the embeddings are tied, but W_E and W_U are two tensors, expected one piece of memory: load the "
                "model with caa_lens.load_model in the type that it is trained in"
            )
        found["unembed.W_U"] = unembedding
    return found


def build_model(cfg: "HookedTransformerConfig", read: Read) -> "HookedTransformer":
    """A HookedTransformer whose every tensor comes from `read`, on ``cfg.device`` as ``cfg.dtype``, for inference."""
    from transformer_lens import HookedTransformer

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
    fill_weights(model, read)
    return model.eval()


def fill_weights(model: "HookedTransformer", read: Read) -> None:
    """Give a model that was built without memory (on the ``meta`` device) its weights and buffers.

    Every tensor is asked for once, placed on ``model.cfg.device`` as ``model.cfg.dtype``, and set as a view
    of the matrix that was read; biases are zero. A tensor that is already there in that type is shared.

    Args:
        model: a Llama-shaped HookedTransformer, from ``models.py``; changed in place.
        read: fetches one tensor by its Hugging Face name.
    """
    cfg = model.cfg
    for hf_name, _, tl_name, view in _parameter_map(cfg):
        tensor = read(hf_name).to(device=cfg.device, dtype=cfg.dtype)
        _set_parameter(model, tl_name, view(tensor, cfg.d_head))
    if cfg.tie_word_embeddings:
        _set_parameter(model, "unembed.W_U", model.embed.W_E.data.T)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            assert name.rpartition(".")[2].lstrip("_").startswith("b_"), f"{name} was not filled"
            _set_parameter(model, name, torch.zeros(parameter.shape, dtype=cfg.dtype, device=cfg.device))
    _fill_buffers(model)


def _set_parameter(model: "HookedTransformer", name: str, value: Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    assert getattr(module, attribute).shape == value.shape, name
    setattr(module, attribute, nn.Parameter(value))


def _fill_buffers(model: "HookedTransformer") -> None:
    """Masks and rotary tables; the layers share one table, where TransformerLens would keep a copy each."""
    cfg = model.cfg
    attentions = [block.attn for block in model.blocks]
    first = attentions[0]
    assert cfg.rotary_dim is not None
    # TransformerLens makes the table longer when a prompt needs it.
    length = min(cfg.n_ctx, first.ROTARY_INITIAL_CACHE_SIZE)
    tables = first.calculate_sin_cos_rotary(cfg.rotary_dim, length, base=cfg.rotary_base, dtype=cfg.dtype)
    sin, cos = (table.to(cfg.device) for table in tables)
    for attention in attentions:
        attention.mask = torch.empty((0, 0), dtype=torch.bool, device=cfg.device)
        attention.IGNORE = torch.tensor(-torch.inf, device=cfg.device)
        attention.rotary_sin, attention.rotary_cos = sin, cos


def lay_out_weights(model: "HookedTransformer") -> "HookedTransformer":
    """Rewrite the weights of any HookedTransformer so that its forward pass stops copying them.

    Models from `caa_lens.load_model` come that way. Names, shapes, values and outputs stay the same,
    bit for bit; only strides change, one parameter at a time, so the extra memory is that of the largest one.
    Weights whose layout the forward pass does not undo (of an MLP without gate, of experts, quantised ones)
    are left alone.

    Args:
        model: changed in place, in storage only.

    Returns:
        The same model.
    """
    from transformer_lens.components import AbstractAttention, GatedMLP, Unembed

    for module in model.modules():
        order_of: Mapping[str, Shape] = {}  # dimensions as they lie in memory, slowest first
        if isinstance(module, AbstractAttention):
            order_of = {**dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), (0, 2, 1)), "W_O": (2, 0, 1)}
        elif isinstance(module, GatedMLP):
            order_of = dict.fromkeys(("W_in", "W_gate", "W_out"), (1, 0))
        elif isinstance(module, Unembed):
            order_of = {"W_U": (1, 0)}
        for name, parameter in module.named_parameters(recurse=False):
            order = order_of.get(name)
            if order and parameter.is_floating_point():
                back = [order.index(dim) for dim in range(len(order))]
                parameter.data = parameter.data.permute(order).contiguous().permute(back)
    return model
