"""Follows the forwards of the Hugging Face module inside of a bridge: what lies behind them, and whether it was kept.

Such a module passes its cache from layer to layer by name; TransformerLens' own attention looks for it by that name.
transformers 5.24 renamed it (`past_key_values` became `cache` inside of layers), and nothing failed: with
TransformerLens 3.9 and 4.3 the cache stays empty, and every new token sees itself alone. So

- `Watch.repair` gives the cache its old name back, where only the new one is there,
- `check_filled` compares a cache's length with the tokens that were run, layer by layer, after each of our runs, and
  `Watch` does so before one of the caller's goes on with it,
- `Watch` knows how many tokens lay behind a run, from the cache itself; a sliding window keeps fewer keys than that.
"""

import importlib.metadata
import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_WATCH = "caa_lens_watch"  # where a hook point keeps what counts its model's runs


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One forward of the Hugging Face module: its number, the tokens behind it, its cache and its mask."""

    number: int
    behind: int | None
    cache: Any
    mask: Tensor | None


class Watch:
    """Follows the forwards of the Hugging Face module inside of a bridge.

    Attributes:
        takes_positions: whether the module can be told the tokens' positions.
        needs_cache: whether the module fails without a cache.
    """

    def __init__(self, *, takes_positions: bool = False) -> None:
        self.takes_positions = takes_positions
        self.needs_cache = False
        self._runs: dict[int, Run] = {}  # each thread's latest
        self._count = 0
        # Of a cache that a whole run went through, by its id: itself, the run, and the tokens that it should hold.
        self._filled: dict[int, tuple[weakref.ref, int, int]] = {}

    def enter(self, module: Any, given: tuple, keywords: dict) -> None:
        """Forward pre-hook of the whole module.

        Raises:
            RuntimeError: the run goes on with a cache that was not filled.
        """
        cache = cache_in(keywords)
        self._count += 1
        if (known := self._known(cache)) is not None:
            check_filled(cache, known[2])
        mask = keywords.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._runs[threading.get_ident()] = Run(self._count, 0 if cache is None else length_of(cache), cache, mask)

    def leave(self, module: Any, given: tuple, keywords: dict, output: Any) -> None:
        """Forward hook of the whole module: note what a cache should hold, whoever gave it."""
        run, cache = self.run, cache_in(keywords)
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        inputs = (*given, keywords.get("input_ids"), keywords.get("inputs_embeds"))
        tokens = next((one for one in inputs if one is not None), None)
        self._filled = {key: known for key, known in self._filled.items() if known[0]() is not None}
        if run.behind is None or length_of(cache) is None or not isinstance(tokens, Tensor):
            return
        try:
            self._filled[id(cache)] = weakref.ref(cache), run.number, run.behind + tokens.shape[1]
        except TypeError:  # a tuple, as older code has it
            return

    def __deepcopy__(self, memo: dict) -> "Watch":
        """Of a copied model: it has run nothing yet."""
        other = memo[id(self)] = Watch(takes_positions=self.takes_positions)
        other.needs_cache = self.needs_cache
        return other

    def cache_of(self, number: int) -> Any:
        """The cache that a run made or filled, if it is still there."""
        return next((known[0]() for known in self._filled.values() if known[1] == number), None)

    def _known(self, cache: Any) -> tuple[weakref.ref, int, int] | None:
        known = self._filled.get(id(cache))
        return known if known is not None and known[0]() is cache else None

    def repair(self, module: Any, given: tuple, keywords: dict, *, wanted: str) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a block's part: the cache under the name that TransformerLens looks for."""
        known = ("past_key_values", "layer_past", "cache_params")
        if keywords.get("cache") is None or any(keywords.get(name) is not None for name in known):
            return None
        return given, {**keywords, wanted: keywords["cache"]}

    @property
    def run(self) -> Run:
        """This thread's latest forward."""
        return self._runs.get(threading.get_ident(), Run(0, 0, None, None))

    @property
    def behind(self) -> int:
        """How many tokens lie behind those that run.

        Raises:
            RuntimeError: the model's cache does not tell.
        """
        behind = self.run.behind
        if behind is None:
            raise RuntimeError(
                f"a {type(self.run.cache).__name__} does not say how many tokens it holds, so positions are unknown: "
                "run the whole text again for each token (use_past_kv_cache=False)"
            )
        return behind


def stamp(point: Any, watch: Watch) -> None:
    """Let a hook point know what counts its model's runs."""
    setattr(point, _WATCH, watch)


def watch_at(point: Any) -> Watch | None:
    """What counts the runs of a hook point's model, if anything does; `point` may be another name of one."""
    return getattr(getattr(point, "_target", point), _WATCH, None)


def length_of(cache: Any) -> int | None:
    """How many tokens a cache says that it holds; None if it does not."""
    if isinstance(cache, tuple | list):  # keys and values of each layer, as older code passes them
        return cache[0][0].shape[-2] if cache else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def check_filled(cache: Any, n_tokens: int) -> None:
    """Raises `RuntimeError` unless every layer of a cache that holds keys holds those of all tokens that were run."""
    found = length_of(cache)
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "is_initialized", False)]
    lengths = [length_of(layer) for layer in layers]
    if found == n_tokens and all(length in (None, n_tokens) for length in lengths):
        return
    holds = found if found != n_tokens else next(length for length in lengths if length not in (None, n_tokens))
    raise RuntimeError(
        f"the model's KV cache holds {holds} tokens after {n_tokens} were run, so that every new token would be "
        "computed without the text before it: transformers "
        f"{importlib.metadata.version('transformers')} and TransformerLens do not fit together. "
        "Install another transformers, or run the whole text again for each token (use_cache=False; in the model's own "
        "generate, use_past_kv_cache=False)"
    )


def cache_in(keywords: dict) -> Any:
    """The KV cache that a module is called with, by whichever name; None without one."""
    names = ("past_key_values", "cache", "cache_params", "layer_past")
    return next((keywords[name] for name in names if keywords.get(name) is not None), None)
