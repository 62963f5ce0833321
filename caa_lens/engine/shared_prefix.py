"""The shared-prefix engine: run a prompt once, then only what differs.

Steering starts at the end of the prompt, and the two answers of a contrast pair differ only in their last tokens. So
the tokens before are the same in every condition: `prefill` runs them once and keeps each layer's keys and values;
`run_suffixes` then takes many *rows* of suffix tokens a question through the blocks. Every row attends to its
question's prefix, which is stored once and never copied, and to itself::

    question 0   prefix ------------------+--> row 0: suffix of condition 0
                                          +--> row 1: suffix of condition 1   ...

Between two blocks an `edit` function sees the residual stream of all rows. It may read it (extraction), or add rows:
`staircase.Staircase` appends the steered rows of layer l right after block l, so that no row recomputes what it shares.

How this is done depends on the kind of model (`models.adapters`): a plain Llama of TransformerLens runs its own
modules, with attention written anew; a bridge runs Hugging Face's forward over Hugging Face's cache, one row at first.
`unsupported` allows a model with nobody's hooks, whose numbers were compared with its own forward on a short prompt,
and says why another one has to take the plain path instead.
"""

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.engine.token_trees import TokenTree
from caa_lens.models.adapters.adapter import BlockEdit, Coming
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.adapters.torch_hooks import attached, stream_of
from caa_lens.models.loading.device_memory import free_memory
from caa_lens.models.placement import device_of_tokens, dtype_of
from caa_lens.models.structure import CANNOT_RUN, once_a_structure, rounding, structure_of

MOST_TOKENS = 8192  # in flight at once, in prefixes or suffixes
_SPLIT = 3  # rows that every row is split into when the engine is tried out


class SharedPrefixWarning(UserWarning):
    """The shared-prefix engine could not be used; the plain path gives the same numbers more slowly."""


_checked: WeakKeyDictionary[Any, tuple[tuple, str | None]] = WeakKeyDictionary()


def unsupported(model: Any) -> str | None:
    """Why the engine cannot stand in for `model.forward`, or None if it can.

    Nobody's hooks, no replaced module or method, blocks of the kind that is verified here; and, once a model and again
    when its structure has changed, the same numbers as `model.forward` on a short prompt.
    """
    structure = structure_of(model)
    reason = structure.hooked or structure.altered or adapter_of(model).cannot_share(model)
    if reason is not None:
        return reason
    return once_a_structure(_checked, model, structure.signature, _disagreement)


@torch.inference_mode()
def _disagreement(model: Any) -> str | None:
    """Run a short prompt by the engine and by the model itself, and say where a block's output differs.

    Two questions with prefixes of unequal length and two rows each. Every block is given what the model's own blocks
    wrote before it, so that rounding does not add up.
    """
    cfg, adapter = model.cfg, adapter_of(model)
    generator = torch.Generator().manual_seed(0)
    lengths = (min(4, max(1, cfg.n_ctx - 2)), 1)
    prefixes = [torch.randint(cfg.d_vocab, (n,), generator=generator).tolist() for n in lengths]
    suffixes = torch.randint(cfg.d_vocab, (2, 2, min(2, cfg.n_ctx - 1)), generator=generator).tolist()
    n_suffix = len(suffixes[0][0])
    own: list[list[Tensor]] = []  # what each block gives, of each question and row, at the suffix: `[pos d_model]`

    def keep(block: Any, given: Any, out: Any) -> None:
        own[-1].append(stream_of(out)[0, -n_suffix:])

    with attached([(block, keep) for block in model.blocks]):
        for prefix, both in zip(prefixes, suffixes, strict=True):
            for suffix in both:
                own.append([])
                adapter.run(model, torch.tensor([prefix + suffix], device=adapter.device(model)))
    differences: list[Tensor] = []
    questions = branches = slice(None)

    def coming(*which: slice) -> None:
        nonlocal questions, branches
        questions, branches = which

    def compare(layer: int, resid: Tensor) -> Tensor:
        rows = torch.stack([whole[layer] for whole in own]).unflatten(0, (2, 2))[questions, branches]
        expected = rows.repeat(1, resid.shape[1] // rows.shape[1], 1, 1)
        wide = torch.promote_types(torch.float32, expected.dtype)
        error = (resid.to(wide) - expected.to(wide)).norm(dim=-1) / expected.to(wide).norm(dim=-1).clamp_min(1e-30)
        # Where the model itself overflows, the engine has to as well; there is nothing to compare then.
        overflow = ~expected.isfinite().all(-1)
        agrees = overflow & ~resid.isfinite().all(-1)
        differences.append(error.masked_fill(agrees, 0.0).max().to(device))
        # Rows split off behind the first block: the model's own masks and angles have to bear it.
        return rows.repeat(1, _SPLIT, 1, 1) if layer == 0 else expected

    device = adapter.device(model)
    try:
        shared = prefill(model, prefixes)
        run_suffixes(model, shared, suffixes, compare, coming=coming)
        if adapter.takes_trees:
            trees = [TokenTree.of(both) for both in suffixes]
            places = torch.tensor([tree.places for tree in trees], device=device)  # [question row pos]

            index = places.flatten(1)[:, None, :, None].expand(-1, -1, -1, cfg.d_model)

            def apart(layer: int, resid: Tensor) -> Tensor:
                rows = resid.gather(2, index).unflatten(2, places.shape[1:]).flatten(1, 2)
                own = compare(layer, rows)[:, : rows.shape[1]]  # not split again
                return torch.zeros_like(resid).scatter(2, index, own.flatten(1, 2)[:, None])

            both_in_one = [[tree.tokens] for tree in trees]
            run_suffixes(model, shared, both_in_one, apart, parents=[tree.parents for tree in trees])
    except CANNOT_RUN:
        return f"rows cannot be split off between the blocks of {cfg.model_name}, whose masks or positions count them"
    worst = torch.stack(differences).reshape(-1, cfg.n_layers).max(0).values
    if bool((worst <= rounding(model)).all()):  # never true of NaN; one wait for the device
        return None
    worst = worst.cpu()
    layer = int(worst.nan_to_num(nan=torch.inf).argmax())
    share = f"{float(worst[layer]):.2g} of the output of block {layer}"
    return f"the engine and {cfg.model_name} itself differ on a short prompt, by {share}"


def prefill(model: Any, prefixes: Sequence[Sequence[int]], n_layers: int | None = None) -> Any:
    """Run the first `n_layers` blocks (all by default) on a batch of token sequences; sequences may be empty.

    Returns:
        What `run_suffixes` wants: the keys and values of each block, in whatever form the kind of model has them.
    """
    return adapter_of(model).prefill(model, prefixes, n_layers)


def run_suffixes(
    model: Any,
    prefix: Any,
    suffixes: Sequence[Sequence[Sequence[int]]],
    edit: BlockEdit,
    n_layers: int | None = None,
    coming: Coming | None = None,
    parents: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "question row pos d_model"]:
    """Take rows of suffix tokens through the blocks behind their question's prefix.

    Args:
        suffixes: `suffixes[question][row]` is a sequence of token ids; every question has equally many rows.
        edit: `edit(layer, resid)` sees `resid_post` of every layer, `[question row pos d_model]`, and returns what
            the next block gets. It may change the number of rows. All questions and rows may come at once, or some at a
            time: `coming` is told which.
        parents: for each token of a question's rows, the index of the one before it (`token_trees`), for a kind of
            model that takes trees; by default each follows the one that it stands behind.

    Returns:
        What `edit` returned after the last block; positions past a row's end hold padding.
    """
    return adapter_of(model).run_suffixes(model, prefix, suffixes, edit, n_layers, coming, parents)


def warn_unshared(reason: str, what: str = "the prompt that conditions share is run once for each of them,") -> None:
    """Tell the user that whole prompts are run again and again, and why."""
    warnings.warn(
        f"{what} because {reason}",
        SharedPrefixWarning,
        stacklevel=3,
    )


def token_budget(model: Any, prefix_length: int, suffix_length: int) -> int:
    """How many suffix tokens may be in flight at once, from the memory that is free on the model's device.

    A quarter of it is used, and at most `MOST_TOKENS`, past which matrix products gain nothing.
    """
    n_seen = prefix_length + suffix_length
    numbers = suffix_numbers(model.cfg, n_seen)
    if adapter_of(model).rows_copy_prefix:
        # Hugging Face's attention holds more of its scores at once, and every row copies the prefix's keys and values.
        cfg = model.cfg
        numbers = 8 * cfg.d_model + 4 * (cfg.d_mlp or 4 * cfg.d_model) + 4 * cfg.n_heads * n_seen
        numbers += 4 * cfg.d_model * n_seen // max(1, suffix_length)
    a_token = numbers * dtype_of(model).itemsize
    return max(suffix_length, min(MOST_TOKENS, free_memory(device_of_tokens(model)) // 4 // a_token))


def prefix_budget(model: Any, prefix_length: int) -> int:
    """How many prefixes of a length may be held at once: a quarter of the free memory, `MOST_TOKENS` tokens at most."""
    held = free_memory(device_of_tokens(model)) // 4 // max(1, kv_bytes(model, prefix_length))
    return max(1, min(held, MOST_TOKENS // max(1, prefix_length)))


def suffix_numbers(cfg: Any, n_seen: int) -> int:
    """How many numbers one suffix token in flight is, where it sees `n_seen` tokens with itself, at the most.

    5 d_model + max(4 d_mlp, 3 (kv heads x d_head + heads x tokens seen)): the stream, with what the MLP holds or
    what attention does.
    """
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    in_attention = 3 * (n_kv * cfg.d_head + cfg.n_heads * n_seen)
    return 5 * cfg.d_model + max(4 * (cfg.d_mlp or 4 * cfg.d_model), in_attention)


def kv_bytes(model: Any, n_pos: int) -> int:
    """Bytes of the keys and values of one prefix."""
    return kv_numbers(model.cfg, n_pos) * dtype_of(model).itemsize


def kv_numbers(cfg: Any, n_pos: int) -> int:
    """How many numbers the keys and values of one prefix are: 2 x layers x kv heads x d_head x tokens."""
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    return 2 * cfg.n_layers * n_kv * cfg.d_head * n_pos
