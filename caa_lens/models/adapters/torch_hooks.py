"""Torch's own forward hooks for as long as a `with` block lasts, and what a block's output is to them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ForwardHook = Callable[[Any, Any, Any], Tensor | None]


@contextmanager
def attached(hooks: Iterable[tuple[nn.Module, ForwardHook]]) -> Iterator[None]:
    """Each module has its forward hook in the `with` block, behind those that it had before."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attached_before(module: nn.Module, hook: Callable[[Any, tuple, dict], Any]) -> Iterator[None]:
    """The module has a hook before its forward in the `with` block, which is given its arguments, named ones too."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def stream_of(output: Any) -> Any:
    """The stream in what a block gives: itself, or the first of several things."""
    return output[0] if isinstance(output, tuple) else output
