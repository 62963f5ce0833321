"""Several devices for machines that have one: real numbers on "card:0" and "card:1", computed by the CPU.

    with devices():
        hf = over_devices(hf, {"model.embed_tokens": "card:0", "model.layers.0": "card:0", "": "card:1"})
        cl.sweep(cl.load_model(name, hf_model=hf), pairs, vectors)

An operation whose tensors lie on two devices raises, as it does with real ones; only a CPU tensor of one number goes
along with any. What comes of an operation is, to the bit, what the CPU computes, so that a model over two devices can
be compared with the same model on one. `helpers.fake_gpu` has no numbers, and counts. There is no backward, which torch
runs on a thread of the device's own, and no forward mode.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers.fake_gpu import _AsTensor  # importing it names torch's spare device "card"

aten = torch.ops.aten


class OnCard(torch.Tensor):
    """A tensor whose numbers the CPU holds, and that says it is elsewhere."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(
        cls, numbers: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> "OnCard":
        if device is None:  # accelerate makes a parameter anew by the class of the one before, of any tensor
            return torch.nn.Parameter(numbers, requires_grad=requires_grad)
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
            requires_grad=False,
        )
        found.numbers = numbers
        return found

    def tolist(self) -> list:
        return self.numbers.tolist()

    def __repr__(self) -> str:
        return f"OnCard({self.numbers}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    if torch.is_inference_mode_enabled() and func.namespace == "aten":  # there, operations come whole
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    here = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, OnCard)}
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # indices may come from the CPU
        here = {tensor.device for tensor in (args[0], *args[2:3]) if isinstance(tensor, torch.Tensor)}
        here |= {
            one.device
            for one in args[1]
            if one is not None and (here == {torch.device("cpu")} or one.device.type == "card")
        }
    if len(here) > 1 and not moves:
        raise RuntimeError(f"{func} got tensors on {' and '.join(sorted(map(str, here)))}")
    generator = kwargs.get("generator")
    if generator is not None and here - {generator.device}:
        raise RuntimeError(f"{func} draws on {generator.device} for a tensor on {here}")
    wanted = kwargs.get("device")
    target = wanted if wanted is not None else tensors[0].device if moves else next(iter(here), None)
    target = torch.device("cpu") if target is None else torch.device(target)
    if target.type == "card" and target.index is None:
        target = torch.device("card:0")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_numbers, (args, kwargs))
    with torch.inference_mode(False):  # a view made in inference mode of a tensor from outside is none of its tensors
        return _computed(func, args, inner_args, inner_kwargs, target, tensors)


def _computed(
    func: Any, args: tuple, inner_args: Any, inner_kwargs: Any, target: torch.device, tensors: list[torch.Tensor]
) -> Any:
    result = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and any(result is one for one in tree_leaves(inner_args)):
        result = result.clone()
    if target.type == "cpu":
        return args[0] if func is aten.copy_.default else result
    written = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, OnCard)}  # by operations in place

    def wrap(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        known = written.get(id(one))
        return OnCard(one, target) if known is None else known

    return tree_map(wrap, result)


def _numbers(one: Any) -> Any:
    return one.numbers if isinstance(one, OnCard) else one


class _Devices(TorchDispatchMode):
    """What sees operations that have no tensor yet, or only the CPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, OnCard) or (isinstance(leaf, torch.device) and leaf.type == "card") for leaf in leaves):
            with self if torch.is_inference_mode_enabled() else _nothing():
                return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def devices() -> Iterator[None]:
    """ "card:0" and "card:1" are there inside of the block."""
    torch._C._set_only_lift_cpu_tensors(True)  # numbers become a tensor on the CPU first
    try:
        with _AsTensor(), _Devices():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def over_devices(hf: Any, device_map: Mapping[str, str]) -> Any:
    """A model of transformers as accelerate spreads it: its own hooks, its own map; changed in place."""
    from accelerate import dispatch_model

    return dispatch_model(hf, device_map=dict(device_map), skip_keys=hf._skip_keys_device_placement, force_hooks=True)
