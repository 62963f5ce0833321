"""What every kind of model must offer: about six operations, and where things lie.

A prompt goes in as token ids and comes out as the residual stream behind some block. What happens in between is the
model's own forward; the exceptions, which an adapter may offer, are compared with it before they are used.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caa_lens.models.adapters.torch_hooks import attached
from caa_lens.provenance import HOOK_POINT

BlockEdit = Callable[[int, Tensor], Tensor]
"""`edit(layer, resid_post)`: what the next block gets; it may have more rows."""

Hear = Callable[[Tensor], Tensor | None]
"""`hear(out)`: what goes on in the output's place, or None for the output itself."""

Coming = Callable[[slice, slice], None]
"""`coming(questions, branches)`: which rows the next run of `edit` is about."""


Unembedding = tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_vocab"]]
"""W_U and b_U."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinalNorm:
    """What stands between the last block and the unembedding: x is centred (LN), divided by its size, times w, plus b.

    Attributes:
        kind: "RMS" or "LN".
        weight: as it is stored; None where there is none, or it was folded into the unembedding.
        offset: what is added to the stored weight: 1 in Gemma, which stores it less one.
        bias: None where there is none.
        eps: added to the mean square.
    """

    kind: str
    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """What a block is given when it starts to run.

    Attributes:
        resid: the stream before the block.
        behind: tokens in the KV cache.
        cache: the KV cache, or what stands for it; None without one.
        mask: which tokens attention may see, `[batch pos]`, those behind included; None for all.
        run: a number of the forward, where the model tells it; None where it does not.
        injected: whether the stream was put in here, and what the blocks below wrote is forgotten.
        stops: whether the run ends before this block, as the caller asked.
    """

    resid: Float[Tensor, "batch pos d_model"]
    behind: int
    cache: Any
    mask: Tensor | None
    run: int | None = None
    injected: bool = False
    stops: bool = False


@runtime_checkable
class Text(Protocol):
    """A batch of texts that grow token by token, with what was computed of them kept."""

    behind: int

    def step(self, tokens: Int[Tensor, "batch pos"], edit: BlockEdit) -> Float[Tensor, "batch pos d_model"]:
        """`resid_post` of the last block at the new tokens."""


class Adapter(ABC):
    """One kind of model. It has no state: whatever belongs to a model is kept at the model.

    Attributes:
        wiring: packages whose own forward hooks on modules belong to the model, and are nobody's experiment.
        rows_copy_prefix: whether rows that share a prefix each copy its keys and values, one block at a time.
        takes_trees: whether a row of a suffix may hold several texts, whose tokens see each their own.
    """

    wiring: frozenset[str] = frozenset()
    rows_copy_prefix: bool = False
    takes_trees: bool = False

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raises `TypeError` or `ValueError` for a model of this kind that cannot be taken."""

    @abstractmethod
    def settle(self, model: Any) -> None:
        """Find out what a model needs to run at all, by running it; once a model, without anybody's hooks."""

    @abstractmethod
    def quantised(self, model: Any) -> str | None:
        """How weights are packed into fewer bits, such as "int8" or "nf4"; None where they are plain numbers."""

    # ---- where things lie

    @abstractmethod
    def dtype(self, model: Any) -> torch.dtype:
        """The type of the residual stream."""

    @abstractmethod
    def device(self, model: Any) -> torch.device:
        """Where token ids go."""

    @abstractmethod
    def device_behind(self, model: Any) -> torch.device:
        """Where the unembedding lies, which may be another device than the first block's."""

    # ---- the model's own forward

    @abstractmethod
    def run(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch all_pos"] | None = None,
        *,
        n_layers: int | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """`resid_post` behind the first `n_layers` blocks (all by default), all hooks felt; nothing is unembedded.

        Args:
            mask: False for padding, of all tokens, those in the cache included; None without padding.
            cache: from `new_cache`; it is filled, and what it holds is behind the tokens.

        Raises:
            RuntimeError: the cache was not filled.
        """

    @abstractmethod
    def run_on(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        resid: Float[Tensor, "batch pos d_model"],
        layer: int,
        *,
        n_layers: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What `run` gives of whole texts whose stream behind block `layer` is `resid`; -1: before the first block."""

    @abstractmethod
    def new_cache(self, model: Any, n_rows: int) -> Any:
        """An empty KV cache for `run`."""

    @abstractmethod
    def whole(self, model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits."""

    # ---- hook points

    @abstractmethod
    def resid_post(self, model: Any, layer: int) -> nn.Module:
        """The module whose output is the stream behind a block, whatever stands in its place."""

    @abstractmethod
    def written(self, model: Any, layer: int) -> Mapping[str, nn.Module]:
        """What a block adds to the stream: "attn" and "mlp", to the modules whose outputs are it."""

    @abstractmethod
    def site(self, model: Any, layer: int, site: str) -> nn.Module:
        """The hook point inside of a block whose output is a site, by the name that a `HookedTransformer` has for it.

        Raises:
            ValueError: the block has no such point, or TransformerLens' hooks do not reach it.
        """

    @abstractmethod
    def site_width(self, model: Any, layer: int, site: str) -> int | None:
        """How many numbers a position has at a site, several heads as one; None where only a run can tell."""

    @abstractmethod
    def listening(self, point: nn.Module, hear: Hear) -> AbstractContextManager[None]:
        """`hear(out)` for every output of a module that `written` or `site` gave; what it gives goes on instead."""

    @abstractmethod
    def hook_points(self, model: Any, layer: int, site: str = HOOK_POINT) -> Sequence[Any]:
        """The hook points that a steering hook of this layer needs, the site's the last.

        Raises:
            ValueError: TransformerLens' hooks do not reach them.
        """

    @abstractmethod
    def entering(self, model: Any, layer: int, given: tuple, keywords: Mapping[str, Any]) -> Entry:
        """What a block was called with."""

    def cache_of(self, model: Any, run: int) -> Any:
        """The KV cache that a forward of that number made, if it is still there; None where that is not known."""
        return None

    # ---- behind the blocks

    @abstractmethod
    def final_norms(self, model: Any) -> Sequence[FinalNorm | None]:
        """What the final norm may be, most likely first; None stands for no norm. Which one it is, numbers must tell.

        Raises:
            ValueError: for a norm whose formula is not known here.
        """

    @abstractmethod
    def unembedding(self, model: Any) -> Unembedding | None:
        """W_U and b_U in numbers that can be multiplied with, on one device; None where the unembedding has no matrix.

        What lies elsewhere until it runs is fetched for it, and what is packed is unpacked, each time anew.
        """

    @abstractmethod
    def parts_behind(self, model: Any) -> Sequence[nn.Module]:
        """The final norm, if there is one, and the unembedding."""

    def run_behind(self, model: Any, states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm and unembedding as they are, with everybody's hooks, in their own type, without a cap."""
        for part in self.parts_behind(model):
            states = part(states)
        return states

    @abstractmethod
    def scales(self, model: Any) -> Sequence[float]:
        """What the model may multiply its logits by; 1 first. Which one it is, numbers must tell."""

    def whole_from(self, model: Any, states: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
        """The model's own logits, with `states` in the place of the last block's output: slow, and exact for any."""
        last = self.resid_post(model, model.cfg.n_layers - 1)
        tokens = torch.zeros(1, len(states), dtype=torch.long, device=self.device(model))
        with attached([(last, lambda module, given, output: states[None].to(output))]):
            return self.whole(model, tokens)[0]

    # ---- what it is made of

    @abstractmethod
    def modules(self, model: Any) -> Iterator[tuple[str, nn.Module]]:
        """Every module that runs, by name, once."""

    @abstractmethod
    def values_of(self, module: nn.Module) -> Iterator[Any]:
        """What of a module's own attributes tells that somebody changed what it does."""

    @abstractmethod
    def stored_parameters(self, model: Any) -> dict[str, nn.Parameter] | None:
        """The parameters that a checkpoint of the model has, tied ones once; None where the module does not tell."""

    @abstractmethod
    def written_anew(self, model: Any) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Parts that TransformerLens computes in its own way: their name, they, and what they stand for."""

    @abstractmethod
    def alterations(self, name: str, module: nn.Module, *, inside: bool = False) -> Sequence[str]:
        """What was put in a module's or method's place, in words; `inside` of a part that knows no other classes."""

    @abstractmethod
    def altered(self, model: Any) -> Sequence[str]:
        """The alterations of the whole model, if the library's own arithmetic would pass them over."""

    # ---- one prompt, many rows

    @abstractmethod
    def depends_on_length(self, model: Any) -> str | None:
        """Why a token's numbers may depend on how long the whole text is, or None where they do not."""

    @abstractmethod
    def cannot_share(self, model: Any) -> str | None:
        """Why a prompt's keys and values cannot stand for the prompt, or None where they may."""

    @abstractmethod
    def prefill(self, model: Any, prefixes: Sequence[Sequence[int]], n_layers: int | None = None) -> Any:
        """Run prompts through the first blocks, and keep what the tokens behind them will look at."""

    @abstractmethod
    def run_suffixes(
        self,
        model: Any,
        prefix: Any,
        suffixes: Sequence[Sequence[Sequence[int]]],
        edit: BlockEdit,
        n_layers: int | None = None,
        coming: Coming | None = None,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "question row pos d_model"]:
        """Rows of suffix tokens through the blocks behind their question's prefix; see `engine.shared_prefix`."""

    @abstractmethod
    def kept_text(self, model: Any, n_rows: int, visible: Bool[Tensor, "batch pos"] | None, room: int) -> Text | None:
        """A faster way to make text than `run` with a cache, of a model that may share; None if there is none."""
