"""The model's own `forward`, in batches and with its own key-value cache where these were found to change nothing.

Where the shared-prefix engine cannot stand in for a model, prompts go through `model.forward`. Two things are still
done to save time: prompts of unequal length are padded on the left and masked, and generation feeds one token at a time
to the cache of the model's kind, TransformerLens' or Hugging Face's. Not every model computes the same under them (a
cache may not know the model's heads, a mask may not reach its positions), so once a model, and again when its structure
has changed, a short prompt is run in each of these ways and by itself, and compared.

With hooks of the caller's nothing is tried out here, since that would run them too: a hook may count, or look at
absolute positions. Prompts then run one at a time and unpadded, and generation uses the cache only where a prompt may
be shared, and only after it compared the first token of the very text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.structure import CANNOT_RUN, once_a_structure, rounding, structure_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRuns:
    """What `model.forward` was found to give the same numbers under.

    Attributes:
        padded: prompts of unequal length, padded on the left and masked, in one batch.
        cached: a prompt and then one token at a time, with the key-value cache of its kind.
    """

    padded: bool
    cached: bool


_checked: WeakKeyDictionary[Any, tuple[tuple, PlainRuns]] = WeakKeyDictionary()


def plain_runs(model: Any) -> PlainRuns:
    """How a model's own forward may be run; see the module."""
    structure = structure_of(model)
    if structure.hooked:
        return PlainRuns(
            padded=False, cached=structure.altered is None and adapter_of(model).cannot_share(model) is None
        )
    return once_a_structure(_checked, model, structure.signature, _compare)


@torch.inference_mode()
def _compare(model: Any) -> PlainRuns:
    cfg, adapter = model.cfg, adapter_of(model)
    # What is scaled by the length of a text would differ only where texts are longer than any that is tried here.
    if adapter.depends_on_length(model) is not None or cfg.n_ctx < 8:
        return PlainRuns(padded=False, cached=False)
    tokens = torch.randint(cfg.d_vocab, (1, 7), generator=torch.Generator().manual_seed(0)).to(adapter.device(model))
    alone = adapter.run(model, tokens)[:, -1].float()
    again = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)  # one position of padding in front
    mask = torch.ones_like(again, dtype=torch.bool)
    mask[:, 0] = False

    def padded() -> Tensor:
        longer = torch.cat([tokens[:, :1], tokens], dim=1)
        both = torch.cat([mask, torch.ones_like(mask)])
        return adapter.run(model, torch.cat([again, longer]), both)[:1, -1].float()

    def cached() -> Tensor:
        cache = adapter.new_cache(model, 1)
        for first, stop in ((0, 5), (5, 7), (7, 8)):
            last = adapter.run(model, again[:, first:stop], mask[:, :stop], cache=cache)
        return last[:, -1].float()

    return PlainRuns(padded=_works(model, padded, alone), cached=_works(model, cached, alone))


def _works(model: Any, run: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether a way to run the model works at all, and gives what is expected but for rounding."""
    try:
        return agrees(model, run(), expected)
    except (*CANNOT_RUN, AssertionError):
        return False


def agrees(model: Any, found: Float[Tensor, "batch d_model"], expected: Float[Tensor, "batch d_model"]) -> bool:
    """Whether two ways to run a model through all its blocks differ by no more than rounding, in every row."""
    expected = expected.float()
    error = (found.to(expected.device).float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    # Errors add up over the blocks here.
    return bool((error <= rounding(model) * model.cfg.n_layers**0.5).all())
