"""The blocks of a Llama as TransformerLens builds them, run over keys and values that are stored once.

`prefill` runs a batch of prefixes and keeps each layer's keys and values; `run_suffixes` takes many rows of suffix
tokens a question through the blocks, and all rows of a question attend to its one copy of the prefix. `KeptText` writes
a text's own keys and values in place, for generation. The blocks' own modules do the arithmetic (norms, projections,
MLP), so the numbers are the model's; only attention is written here. Right padding needs no mask: the blocks are
causal, and padded keys of a prefix are hidden by its length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

BlockEdit = Callable[[int, Tensor], Tensor]

# On a CPU an MLP takes so many tokens at a time: what it holds stays in a cache, in memory that is there already.
TOKENS_AT_ONCE = 1024


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


def prefill(model: Any, prefixes: Sequence[Sequence[int]], n_layers: int | None = None) -> Prefix:
    """Run the first `n_layers` blocks (all by default) on a batch of token sequences; sequences may be empty.

    Of the last block only the keys and values are computed: nothing reads what a prefix writes above it.
    """
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

    def keep(k: Tensor, v: Tensor, attn: Any) -> Tensor:
        k = rotate(attn, k, *rotary_tables(attn, n_pos))
        keys.append(rearrange(k, "question pos kv d_head -> question kv d_head pos").contiguous())
        values.append(rearrange(v, "question pos kv d_head -> question kv pos d_head").contiguous())
        return k

    def attend(q: Tensor, k: Tensor, v: Tensor, attn: Any) -> Tensor:
        q, k = rotate(attn, q, *rotary_tables(attn, n_pos)), keep(k, v, attn)
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=1 / attn.attn_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return z.transpose(1, 2)

    for block in blocks[:-1]:
        resid = run_block(block, resid, partial(attend, attn=block.attn))
    for block in blocks[-1:]:
        normed = block.ln1(resid.flatten(0, -3))
        _, k, v = block.attn.calculate_qkv_matrices(normed, normed, normed)
        keep(k, v, block.attn)
    return Prefix(keys=tuple(keys), values=tuple(values), lengths=lengths)


def run_suffixes(
    model: Any,
    prefix: Prefix,
    suffixes: Sequence[Sequence[Sequence[int]]],
    edit: BlockEdit,
    n_layers: int | None = None,
    parents: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "question row pos d_model"]:
    """Take rows of suffix tokens through the blocks behind their question's prefix.

    Args:
        suffixes: `suffixes[question][row]` is a sequence of token ids; every question has equally many rows.
        parents: for each token of a question's rows, the index of the one before it, which stands further in front, or
            -1 for the prefix; by default each follows the one that it stands behind.
        edit: `edit(layer, resid)` sees `resid_post` of every layer, `[question row pos d_model]`, and returns what
            the next block gets. It may change the number of rows.

    Returns:
        What `edit` returned after the last block; positions past a row's end hold padding.
    """
    resid = _embed(model, suffixes)
    n_pos = resid.shape[2]
    longest = prefix.keys[0].shape[-1]
    depth, unseen = _tree(parents, n_pos, resid.device)  # [question pos], [question pos pos]
    position = prefix.lengths[:, None] + depth
    hidden = torch.arange(longest, device=resid.device) >= prefix.lengths[:, None]  # [question prefix_pos]
    blocks = model.blocks[: model.cfg.n_layers if n_layers is None else n_layers]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int, attn: Any) -> Tensor:
        n_rows = len(q) // len(position)
        cos_table, sin_table = rotary_tables(attn, longest + n_pos)
        cos = cos_table[position].repeat_interleave(n_rows, 0)
        sin = sin_table[position].repeat_interleave(n_rows, 0)
        q, k = rotate(attn, q, cos, sin), rotate(attn, k, cos, sin)
        return _attend_to_prefix(q, k, v, prefix.keys[layer], prefix.values[layer], hidden, unseen, attn.attn_scale)

    for layer, block in enumerate(blocks):
        resid = edit(layer, run_block(block, resid, partial(attend, layer=layer, attn=block.attn)))
    return resid


def _tree(
    parents: Sequence[Sequence[int]] | None, n_pos: int, device: torch.device
) -> tuple[Int[Tensor, "#question pos"], Bool[Tensor, "#question pos pos"]]:
    """How many tokens of a row lie before each of its tokens, and which ones it does not see."""
    if parents is None:
        depth = torch.arange(n_pos, device=device)[None]
        return depth, torch.ones(1, n_pos, n_pos, dtype=torch.bool, device=device).triu(1)
    depths = torch.zeros(len(parents), n_pos, dtype=torch.long)
    seen = torch.eye(n_pos, dtype=torch.bool).repeat(len(parents), 1, 1)  # padding sees itself, and nobody looks at it
    for i, of_row in enumerate(parents):
        for token, parent in enumerate(of_row):
            if parent >= 0:
                depths[i, token] = depths[i, parent] + 1
                seen[i, token] |= seen[i, parent]
    return depths.to(device), ~seen.to(device)


def _attend_to_prefix(
    q: Float[Tensor, "row pos head d_head"],
    k: Float[Tensor, "row pos kv_head d_head"],
    v: Float[Tensor, "row pos kv_head d_head"],
    prefix_k: Float[Tensor, "question kv_head d_head prefix_pos"],
    prefix_v: Float[Tensor, "question kv_head prefix_pos d_head"],
    hidden: Bool[Tensor, "question prefix_pos"],
    unseen: Bool[Tensor, "#question pos pos"],
    scale: float,
) -> Float[Tensor, "row pos head d_head"]:
    """Softmax attention of each row over its question's prefix and over what each of its tokens sees of itself.

    Query heads that share a key head, rows and positions all become one long axis against the question's single copy
    of the prefix, so the prefix is read once and never expanded.
    """
    n_question, n_kv, _, n_prefix = prefix_k.shape
    n_pos, rows = q.shape[1], q.shape[0] // n_question
    q = rearrange(
        q, "(question row) pos (kv group) d_head -> question kv (row group pos) d_head", question=n_question, kv=n_kv
    )
    q = q / scale
    k = rearrange(k, "(question row) pos kv d_head -> question kv row d_head pos", question=n_question)
    v = rearrange(v, "(question row) pos kv d_head -> question kv row pos d_head", question=n_question)

    # One axis of queries (row, group, pos) against the prefix, and one block a row against the row itself.
    def by_row(of_queries: Tensor) -> Tensor:
        return rearrange(of_queries, "question kv (row query) x -> question kv row query x", row=rows)

    to_prefix = (q @ prefix_k).masked_fill(hidden[:, None, None, :], -torch.inf)
    to_self = by_row(q) @ k
    to_self = to_self.masked_fill(unseen.repeat(1, to_self.shape[3] // n_pos, 1)[:, None, None], -torch.inf)
    pattern = torch.softmax(torch.cat([by_row(to_prefix), to_self], dim=-1), dim=-1)
    from_prefix = rearrange(pattern[..., :n_prefix], "question kv row query x -> question kv (row query) x") @ prefix_v
    z = by_row(from_prefix) + pattern[..., n_prefix:] @ v
    return rearrange(z, "question kv row (group pos) d_head -> (question row) pos (kv group) d_head", pos=n_pos)


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
    if x.device.type != "cpu" or x.shape[0] * x.shape[1] <= TOKENS_AT_ONCE:
        return (x + block.mlp(block.ln2(x))).reshape(resid.shape)
    tokens = x.flatten(0, 1)[None]
    pieces = [some + block.mlp(block.ln2(some)) for some in tokens.split(TOKENS_AT_ONCE, dim=1)]
    return torch.cat(pieces, dim=1).reshape(resid.shape)


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


class KeptText:
    """A batch of texts that grow, with their keys and values written in place.

    Args:
        visible: False where a row has padding on its left, `[batch pos]`, of the first tokens; None without padding.
        room: how long the texts may become, in tokens.
    """

    def __init__(self, model: Any, n_rows: int, visible: Bool[Tensor, "batch pos"] | None, room: int) -> None:
        cfg, device = model.cfg, model.W_E.device
        shape = (n_rows, cfg.n_key_value_heads or cfg.n_heads, room, cfg.d_head)
        self.model = model
        self.behind = 0
        self._keys = [torch.empty(shape, dtype=cfg.dtype, device=device) for _ in range(cfg.n_layers)]
        self._values = [torch.empty(shape, dtype=cfg.dtype, device=device) for _ in range(cfg.n_layers)]
        # Layers of a model from `load_model` share one rotary table, so that it is looked up once a step.
        self._tables = {id(block.attn.rotary_cos): rotary_tables(block.attn, room) for block in model.blocks}
        self._visible = self._padding = None
        if visible is not None:
            self._padding = (~visible).sum(1, keepdim=True)  # [batch 1]
            self._visible = F.pad(visible, (0, room - visible.shape[1]), value=True)[:, None, None]  # [batch 1 1 pos]

    def step(self, tokens: Int[Tensor, "batch pos"], edit: BlockEdit) -> Float[Tensor, "batch pos d_model"]:
        """`resid_post` of the last block at the new tokens; `edit(layer, resid)` gives what the next block gets."""
        n_new, device = tokens.shape[1], tokens.device
        behind, until = self.behind, self.behind + n_new
        position = torch.arange(behind, until, device=device)
        if self._padding is not None:
            position = (position - self._padding).clamp_min(0)  # [batch pos]
        rotary = {table: (cos[position], sin[position]) for table, (cos, sin) in self._tables.items()}
        mask: Tensor | None = None
        if self._visible is not None:
            mask = self._visible[..., :until]
            if n_new > 1:
                mask = mask & torch.ones(n_new, until, dtype=torch.bool, device=device).tril(until - n_new)
                # A padded position sees itself, so that its softmax is defined; nobody looks at it.
                mask = mask | torch.eye(n_new, dtype=torch.bool, device=device)
        resid = F.embedding(tokens, self.model.W_E)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int, attn: Any) -> Tensor:
            cos, sin = rotary[id(attn.rotary_cos)]
            keys, values = self._keys[layer], self._values[layer]
            keys[:, :, behind:until] = rotate(attn, k, cos, sin).transpose(1, 2)
            values[:, :, behind:until] = v.transpose(1, 2)
            z = F.scaled_dot_product_attention(
                rotate(attn, q, cos, sin).transpose(1, 2),
                keys[:, :, :until],
                values[:, :, :until],
                attn_mask=mask,
                is_causal=mask is None and n_new > 1,
                scale=1 / attn.attn_scale,
                enable_gqa=q.shape[2] != k.shape[2],
            )
            return z.transpose(1, 2)

        for layer, block in enumerate(self.model.blocks):
            resid = edit(layer, run_block(block, resid, partial(attend, layer=layer, attn=block.attn)))
        self.behind = until
        return resid
