"""The shared-prefix engine: run a prompt once, then only what differs.

Steering starts at the end of the prompt, and the two answers of a contrast pair differ only in their last tokens. So
the tokens before are the same in every condition: `prefill` runs them once and keeps each layer's keys and values;
`run_suffixes` then takes many *rows* of suffix tokens a question through the blocks. Every row attends to its
question's prefix, which is stored once and never copied, and to itself::

    question 0   prefix ------------------+--> row 0: suffix of condition 0
                                          +--> row 1: suffix of condition 1   ...

Between two blocks an `edit` function sees the residual stream of all rows. It may read it (extraction), or add rows:
`staircase.Staircase` appends the steered rows of layer l right after block l, so that no row recomputes what it shares.

The blocks' own modules do the arithmetic (norms, projections, MLP), so the numbers are the model's; only attention is
written here. That holds for blocks of the Llama family as TransformerLens builds them, with nobody's hooks on them:
`unsupported` allows a model whose every part is known and whose numbers were compared with `model.forward`, and says
why another one has to take the plain path instead. Right padding needs no mask: the blocks are causal, and padded keys
of a prefix are hidden by its length.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.models.loading.device_memory import free_memory
from caa_lens.models.structure import not_a_plain_llama, once_a_structure, rounding, structure_of

BlockEdit = Callable[[int, Tensor], Tensor]

MOST_TOKENS = 8192  # in flight at once, in prefixes or suffixes


class SharedPrefixWarning(UserWarning):
    """The shared-prefix engine could not be used; the plain path gives the same numbers more slowly."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """Keys (rotated) and values of each layer for a batch of prefixes, right-padded.

    Attributes:
        keys: one tensor a layer, `[question kv_head d_head pos]`.
        values: one tensor a layer, `[question kv_head pos d_head]`.
        lengths: number of real tokens, `[question]`.
    """

    keys: tuple[Float[Tensor, "question kv_head d_head pos"], ...]
    values: tuple[Float[Tensor, "question kv_head pos d_head"], ...]
    lengths: Int[Tensor, " question"]


_checked: WeakKeyDictionary[Any, tuple[tuple, str | None]] = WeakKeyDictionary()


def unsupported(model: Any) -> str | None:
    """Why the engine cannot stand in for `model.forward`, or None if it can.

    Nobody's hooks, no replaced module or method, blocks of the kind that is verified here; and, once a model and again
    when its structure has changed, the same numbers as `model.forward` on a short prompt.
    """
    structure = structure_of(model)
    reason = structure.hooked or structure.altered or not_a_plain_llama(model)
    if reason is not None:
        return reason
    return once_a_structure(_checked, model, structure.signature, _disagreement)


@torch.inference_mode()
def _disagreement(model: Any) -> str | None:
    """Run a short prompt by the engine and by the model itself, and say where a block's output differs.

    Two questions with prefixes of unequal length and two rows each. Every block is given what the model's own blocks
    wrote before it, so that rounding does not add up.
    """
    cfg, device = model.cfg, model.W_E.device
    generator = torch.Generator().manual_seed(0)
    lengths = (min(4, max(1, cfg.n_ctx - 2)), 1)
    prefixes = [torch.randint(cfg.d_vocab, (n,), generator=generator).tolist() for n in lengths]
    suffixes = torch.randint(cfg.d_vocab, (2, 2, min(2, cfg.n_ctx - 1)), generator=generator).tolist()
    rows = [prefix + suffix for prefix, both in zip(prefixes, suffixes, strict=True) for suffix in both]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    n_suffix = len(suffixes[0][0])
    own: list[Tensor] = []  # resid_post of each layer at the suffixes, `[question row pos d_model]`

    def keep(block: Any, given: Any, resid: Tensor) -> None:
        ends = [resid[i, len(row) - n_suffix : len(row)] for i, row in enumerate(rows)]
        own.append(torch.stack(ends).unflatten(0, (2, 2)))

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        model(tokens.to(device), attention_mask=torch.ones_like(tokens).to(device), stop_at_layer=cfg.n_layers)
    finally:
        for handle in handles:
            handle.remove()
    differences: list[Tensor] = []

    def compare(layer: int, resid: Tensor) -> Tensor:
        expected = own[layer].float()
        error = (resid.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
        # Where the model itself overflows, the engine has to as well; there is nothing to compare then.
        overflow = ~expected.isfinite().all(-1)
        agrees = overflow & ~resid.isfinite().all(-1)
        differences.append(error.masked_fill(agrees, 0.0).max())
        return own[layer]

    run_suffixes(model, prefill(model, prefixes), suffixes, compare)
    worst = torch.stack(differences)
    if bool((worst <= rounding(model)).all()):  # never true of NaN; one wait for the device
        return None
    worst = worst.cpu()
    layer = int(worst.nan_to_num(nan=torch.inf).argmax())
    share = f"{float(worst[layer]):.2g} of the output of block {layer}"
    return f"the engine and {cfg.model_name} itself differ on a short prompt, by {share}"


def prefill(model: Any, prefixes: Sequence[Sequence[int]], n_layers: int | None = None) -> Prefix:
    """Run the first `n_layers` blocks (all by default) on a batch of token sequences; sequences may be empty."""
    device = model.W_E.device
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    resid = _embed(model, [[prefix] for prefix in prefixes])  # [question 1 pos d_model]
    n_pos = resid.shape[2]
    blocks = model.blocks[: model.cfg.n_layers if n_layers is None else n_layers]
    if n_pos == 0:
        n_kv, d_head = model.cfg.n_key_value_heads or model.cfg.n_heads, model.cfg.d_head
        no_keys = resid.new_empty(len(prefixes), n_kv, d_head, 0)
        return Prefix(keys=(no_keys,) * len(blocks), values=(no_keys.transpose(2, 3),) * len(blocks), lengths=lengths)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn: Any) -> Tensor:
        cos, sin = rotary_tables(attn, n_pos)
        q, k = rotate(attn, q, cos, sin), rotate(attn, k, cos, sin)
        keys.append(k.permute(0, 2, 3, 1).contiguous())
        values.append(v.transpose(1, 2).contiguous())
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=1 / attn.attn_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return z.transpose(1, 2)

    for block in blocks:
        resid = run_block(block, resid, partial(attend, attn=block.attn))
    return Prefix(keys=tuple(keys), values=tuple(values), lengths=lengths)


def run_suffixes(
    model: Any,
    prefix: Prefix,
    suffixes: Sequence[Sequence[Sequence[int]]],
    edit: BlockEdit,
    n_layers: int | None = None,
) -> Float[Tensor, "question row pos d_model"]:
    """Take rows of suffix tokens through the blocks behind their question's prefix.

    Args:
        suffixes: `suffixes[question][row]` is a sequence of token ids; every question has equally many rows.
        edit: `edit(layer, resid)` sees `resid_post` of every layer, `[question row pos d_model]`, and returns what
            the next block gets. It may change the number of rows.

    Returns:
        What `edit` returned after the last block; positions past a row's end hold padding.
    """
    resid = _embed(model, suffixes)
    n_pos = resid.shape[2]
    longest = prefix.keys[0].shape[-1]
    position = prefix.lengths[:, None] + torch.arange(n_pos, device=resid.device)  # [question pos]
    hidden = torch.arange(longest, device=resid.device) >= prefix.lengths[:, None]  # [question prefix_pos]
    blocks = model.blocks[: model.cfg.n_layers if n_layers is None else n_layers]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int, attn: Any) -> Tensor:
        n_rows = len(q) // len(position)
        cos_table, sin_table = rotary_tables(attn, longest + n_pos)
        cos = cos_table[position].repeat_interleave(n_rows, 0)
        sin = sin_table[position].repeat_interleave(n_rows, 0)
        q, k = rotate(attn, q, cos, sin), rotate(attn, k, cos, sin)
        return _attend_to_prefix(q, k, v, prefix.keys[layer], prefix.values[layer], hidden, attn.attn_scale)

    for layer, block in enumerate(blocks):
        resid = edit(layer, run_block(block, resid, partial(attend, layer=layer, attn=block.attn)))
    return resid


def _attend_to_prefix(
    q: Float[Tensor, "row pos head d_head"],
    k: Float[Tensor, "row pos kv_head d_head"],
    v: Float[Tensor, "row pos kv_head d_head"],
    prefix_k: Float[Tensor, "question kv_head d_head prefix_pos"],
    prefix_v: Float[Tensor, "question kv_head prefix_pos d_head"],
    hidden: Tensor,
    scale: float,
) -> Float[Tensor, "row pos head d_head"]:
    """Softmax attention of each row over its question's prefix and, causally, over itself.

    Query heads that share a key head, rows and positions all become one long axis against the question's single copy
    of the prefix, so the prefix is read once and never expanded.
    """
    n_question, n_kv, d_head, n_prefix = prefix_k.shape
    n_pos, n_head = q.shape[1:3]
    rows, group = q.shape[0] // n_question, n_head // n_kv
    q = q.reshape(n_question, rows, n_pos, n_kv, group, d_head).permute(0, 3, 1, 4, 2, 5).contiguous() / scale
    k = k.reshape(n_question, rows, n_pos, n_kv, d_head).permute(0, 3, 1, 2, 4)
    v = v.reshape(n_question, rows, n_pos, n_kv, d_head).permute(0, 3, 1, 2, 4)

    # One axis of queries (row, group, pos) against the prefix, and one block a row against the row itself.
    together = (n_question, n_kv, rows * group * n_pos)
    each_row = (n_question, n_kv, rows, group * n_pos)
    to_prefix = (q.reshape(*together, d_head) @ prefix_k).masked_fill(hidden[:, None, None, :], -torch.inf)
    to_self = q.reshape(*each_row, d_head) @ k.transpose(-1, -2)
    future = torch.ones(n_pos, n_pos, dtype=torch.bool, device=q.device).triu(1).repeat(group, 1)
    to_self = to_self.masked_fill(future, -torch.inf)
    pattern = torch.softmax(torch.cat([to_prefix.reshape(*each_row, n_prefix), to_self], dim=-1), dim=-1)
    from_prefix = pattern[..., :n_prefix].reshape(*together, n_prefix) @ prefix_v
    z = from_prefix.reshape(*each_row, d_head) + pattern[..., n_prefix:] @ v
    z = z.reshape(n_question, n_kv, rows, group, n_pos, d_head).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(n_question * rows, n_pos, n_head, d_head)


def run_block(
    block: Any, resid: Float[Tensor, "*rows pos d_model"], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Float[Tensor, "*rows pos d_model"]:
    """One block with the model's own modules, and `attend(q, k, v) -> z` for what happens between projections.

    `attend` gets and returns `[row pos head d_head]`, with all leading dimensions of `resid` flattened into `row`.
    """
    x = resid.flatten(0, -3)  # [row pos d_model]
    normed = block.ln1(x)
    z = attend(*block.attn.calculate_qkv_matrices(normed, normed, normed))  # [row pos head d_head]
    x = x + F.linear(z.flatten(2), block.attn.W_O.flatten(0, 1).T, block.attn.b_O)
    x = x + block.mlp(block.ln2(x))
    return x.reshape(resid.shape)


def _embed(model: Any, suffixes: Sequence[Sequence[Sequence[int]]]) -> Float[Tensor, "question row pos d_model"]:
    n_pos = max(len(row) for question in suffixes for row in question)
    tokens = torch.zeros(len(suffixes), len(suffixes[0]), n_pos, dtype=torch.long)
    for i, question in enumerate(suffixes):
        for j, row in enumerate(question):
            tokens[i, j, : len(row)] = torch.tensor(row, dtype=torch.long)
    return F.embedding(tokens.to(model.W_E.device), model.W_E)


def rotary_tables(attn: Any, n_pos: int) -> tuple[Float[Tensor, "pos rotary"], Float[Tensor, "pos rotary"]]:
    """cos and sin of an attention's rotary embedding for the first `n_pos` positions."""
    if n_pos <= attn.rotary_cos.shape[0]:
        return attn.rotary_cos[:n_pos], attn.rotary_sin[:n_pos]
    # As the attention itself makes its table longer, but without touching the caller's model.
    cfg = attn.cfg
    sin, cos = attn.calculate_sin_cos_rotary(cfg.rotary_dim, n_pos, base=attn._rotary_base(), dtype=cfg.dtype)
    return cos.to(attn.rotary_cos.device), sin.to(attn.rotary_sin.device)


def rotate(attn: Any, x: Float[Tensor, "row pos head d_head"], cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding at the given positions; `cos` and `sin` are `[pos rotary]` or `[row pos rotary]`."""
    d_rotary = cos.shape[-1]
    turned = x[..., :d_rotary]
    turned = turned * cos.unsqueeze(-2) + attn.rotate_every_two(turned) * sin.unsqueeze(-2)
    return torch.cat([turned, x[..., d_rotary:]], dim=-1) if d_rotary < x.shape[-1] else turned


def warn_unshared(reason: str, what: str = "the prompt that conditions share is run once for each of them,") -> None:
    """Tell the user that whole prompts are run again and again, and why."""
    warnings.warn(
        f"{what} because {reason}",
        SharedPrefixWarning,
        stacklevel=3,
    )


def token_budget(model: Any, prefix_length: int, suffix_length: int) -> int:
    """How many suffix tokens may be in flight at once, from the memory that is free on the model's device.

    Bytes of one suffix token: (8 d_model + 4 d_mlp + 4 n_heads (prefix + suffix)) x bytes of a number. A quarter of
    the free memory is used, and at most `MOST_TOKENS`, past which matrix products gain nothing.
    """
    cfg = model.cfg
    n_bytes = model.W_E.element_size()
    a_token = (8 * cfg.d_model + 4 * cfg.d_mlp + 4 * cfg.n_heads * (prefix_length + suffix_length)) * n_bytes
    return max(suffix_length, min(MOST_TOKENS, free_memory(model.W_E.device) // 4 // a_token))


def prefix_budget(model: Any, prefix_length: int) -> int:
    """How many prefixes of a length may be held at once: a quarter of the free memory, `MOST_TOKENS` tokens at most."""
    held = free_memory(model.W_E.device) // 4 // max(1, kv_bytes(model, prefix_length))
    return max(1, min(held, MOST_TOKENS // max(1, prefix_length)))


def kv_bytes(model: Any, n_pos: int) -> int:
    """Bytes of the keys and values of one prefix: 2 x layers x kv heads x d_head x tokens x bytes of a number."""
    cfg = model.cfg
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    return 2 * cfg.n_layers * n_kv * cfg.d_head * n_pos * model.W_E.element_size()
