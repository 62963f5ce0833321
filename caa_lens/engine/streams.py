"""Read and edit the stream between blocks while the model itself runs, of either kind.

Torch's own hooks on the module whose output is `resid_post` do it: they are felt in the order in which they were added,
behind those that the caller has there, and `model.reset_hooks()` leaves them alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from caa_lens.engine.edits import NOT_MET, Edit
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.adapters.torch_hooks import attached
from caa_lens.provenance import HOOK_POINT


@contextmanager
def reading(model: Any, layers: Sequence[int], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """`keep(layer, resid_post)` for every run of these layers' blocks in the `with` block, `[batch pos d_model]`.

    Whatever module stands in the stream's place, its output is what is read.
    """

    def read(module: Any, given: Any, out: Tensor, layer: int) -> None:
        keep(layer, out)

    adapter = adapter_of(model)
    with attached([(adapter.resid_post(model, layer), partial(read, layer=layer)) for layer in layers]):
        yield


@contextmanager
def reading_what_is_written(
    model: Any, layers: Sequence[int], keep: Callable[[int, str, Tensor], None]
) -> Iterator[None]:
    """`keep(layer, kind, out)` for what attention and MLP of these layers add to the stream, `[batch pos d_model]`."""
    adapter = adapter_of(model)
    with ExitStack() as open_ones:
        for layer in layers:
            for kind, point in adapter.written(model, layer).items():
                open_ones.enter_context(adapter.listening(point, partial(keep, layer, kind)))
        yield


@contextmanager
def editing(model: Any, edits: Sequence[Edit], behind: int = 0) -> Iterator[None]:
    """What the model runs in the `with` block is edited; `behind` tokens lie in the cache of each run.

    Raises:
        ValueError: a layer's stream, or a site inside of a block, cannot be reached.
        RuntimeError: a block ran, and its forward did not come to the site in it.
    """
    met: set[tuple[int, str]] = set()

    def apply(module: Any, given: Any, out: Tensor, edit: Edit) -> Tensor:
        return edit.apply(out, behind)

    def inside(out: Tensor, edit: Edit) -> Tensor:
        met.add((edit.layer, edit.site))
        return edit.apply(out, behind)

    def check(module: Any, given: Any, out: Any, edit: Edit) -> None:
        if (edit.layer, edit.site) not in met:
            raise RuntimeError(NOT_MET.format(f"blocks.{edit.layer}.{edit.site}"))

    adapter = adapter_of(model)
    points = [adapter.hook_points(model, edit.layer, edit.site)[-1] for edit in edits]
    with ExitStack() as open_ones:
        for edit, point in zip(edits, points, strict=True):
            if edit.site == HOOK_POINT:
                open_ones.enter_context(attached([(point, partial(apply, edit=edit))]))
            else:
                open_ones.enter_context(adapter.listening(point, partial(inside, edit=edit)))
                end = adapter.resid_post(model, edit.layer)
                open_ones.enter_context(attached([(end, partial(check, edit=edit))]))
        yield


@contextmanager
def reading_sites(model: Any, layers: Sequence[int], site: str, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """`keep(layer, out)` for every run of a site inside of these layers' blocks in the `with` block."""
    adapter = adapter_of(model)
    with ExitStack() as open_ones:
        for layer in layers:
            open_ones.enter_context(adapter.listening(adapter.site(model, layer, site), partial(keep, layer)))
        yield


def last_residual(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch all_pos"] | None = None,
    *,
    edits: Sequence[Edit] = (),
    n_layers: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """`resid_post` behind the first `n_layers` blocks (all by default) of whole texts, edited, all hooks felt."""
    with editing(model, edits):
        return adapter_of(model).run(model, tokens, mask, n_layers=n_layers)
