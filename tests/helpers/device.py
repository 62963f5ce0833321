"""The one device that the whole suite runs on: `pytest --device cuda`.

Models that tests build lie there (`helpers.models`, `bridge_twins`, `families`), and so do token ids, masks and
positions that a test makes: all whole numbers. Vectors and other floating-point tensors lie on the CPU, where
`extract` leaves them. What a test's own line computes of both is computed on the device, without a word in the test.
Inside the library, which must move its tensors, mixed devices raise as ever.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

TESTS = str(Path(__file__).resolve().parents[1])
# Through these a function of torch calls itself by way of the mode below; all else in torch has tensors of its own.
DOORS = tuple(str(Path(torch.__file__).parent / name) for name in ("overrides.py", "functional.py", "_tensor.py"))
DOORS += (str(Path(torch.__file__).parent / "nn" / "functional.py"),)
FACTORIES = ("tensor", "as_tensor", "arange", "randint", "ones", "zeros", "full", "randperm", "eye", "empty")
IN_PLACE = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__")

chosen = torch.device("cpu")


def device() -> torch.device:
    """Where the models of this run lie."""
    return chosen


def there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, where the models lie."""
    return {name: one.to(chosen) for name, one in tensors.items()}


def choose(name: str) -> None:
    """Take the device of that name, or say what is there instead."""
    global chosen
    if name.partition(":")[0] == "card":
        from helpers.host_card import install

        install()
    try:
        wanted = torch.device(name)
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = ["cpu", "card"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"got --device {name}, but torch {torch.__version__} of this machine cannot use it ({error}): "
            f"choose one of {', '.join(known)}"
        ) from error
    chosen = wanted


def _exact(name: torch.device) -> torch.device:
    """With its number, as tensors have it."""
    return torch.device(name.type, name.index or 0)


def _asked_by_a_test() -> bool:
    """Whether a test's own line called."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in DOORS:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(TESTS)


class TestsMayMix(TorchFunctionMode):
    """Brings what a test's own line makes and computes with onto the device; everybody else's lines are left alone."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        found = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        name = getattr(func, "__name__", "")
        if found and name in ("numpy", "__array__") and found != {torch.device("cpu")} and _asked_by_a_test():
            return func(args[0].cpu(), *args[1:], **kwargs)
        both = found == {torch.device("cpu"), _exact(chosen)}
        if both and name not in ("to", "copy_", "__get__") and _asked_by_a_test():
            target = chosen
            if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
                target = args[0].device

            def moved(leaf: Any) -> Any:
                return leaf.to(target) if isinstance(leaf, Tensor) and leaf.device != target else leaf

            args, kwargs = tree_map(moved, (args, kwargs))
        result = func(*args, **kwargs)
        made = name in FACTORIES and "device" not in kwargs and isinstance(result, Tensor)
        if made and not result.dtype.is_floating_point and _asked_by_a_test():
            return result.to(chosen)
        return result


@contextmanager
def running_there() -> Iterator[None]:
    """While the suite runs on another device than the CPU."""
    if chosen.type == "cpu":
        yield
        return
    close = torch.testing.assert_close

    @wraps(close)
    def anywhere(*args: Any, **kwargs: Any) -> None:
        close(*args, **{"check_device": False, **kwargs})

    torch.testing.assert_close = anywhere
    try:
        with TestsMayMix():
            yield
    finally:
        torch.testing.assert_close = close
