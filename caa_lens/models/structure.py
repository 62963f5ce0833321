"""What a model is made of, and what somebody has changed about it since it was built.

Whoever does a model's arithmetic in another way than its own forward must know that nothing would be passed over:
nobody's hooks, TransformerLens' or torch's, and nothing in a module's or method's place. This is read from the modules
themselves, without running them. It is no proof by itself; whoever relies on it also compares numbers, once a model and
again when the signature has changed.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from caa_lens.models.adapters.choice import adapter_of

Found = TypeVar("Found")

# Largest relative difference of a block's output, by the engine and by the model itself, that is put down to rounding.
# Seen: 1e-6 in float32, 3e-2 in bfloat16, 7e-3 in float16; blocks of another kind differ by 0.2 to 1.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.03}
TF32_ROUNDING = 1e-2

# What a model raises that cannot be run in some way at all.
CANNOT_RUN = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What was found in a model's modules.

    Attributes:
        hooked: forward hooks somebody registered, in words; None if there are none.
        only_ours: whether all hooks are this library's, those of an open `steer` block.
        altered: a module, method or configuration that is not TransformerLens' own, in words; None if there is none.
        signature: equal only for the same structure; numbers in the weights do not count.
    """

    hooked: str | None
    only_ours: bool
    altered: str | None
    signature: tuple


def structure_of(model: Any) -> Structure:
    """Look at every module of a model; nothing is run."""
    adapter = adapter_of(model)
    hooked: list[str] = []
    only_ours = True
    signature: list[Any] = [id(type(model)), *((key, repr(value)) for key, value in sorted(vars(model.cfg).items()))]
    for name, module in adapter.modules(model):
        kind = type(module)
        if users := _users_hooks(module, adapter.wiring):
            hooked.append(name or "the model itself")
            only_ours = only_ours and all(map(_is_ours, users))
        if kind.__name__ != "HookPoint":
            signature.append((name, id(kind), id(kind.forward), *adapter.values_of(module)))
            signature.extend((key, p.dtype, p.device) for key, p in module._parameters.items() if p is not None)
    if _hooks_everywhere():
        hooked.append("every module of torch")
        only_ours = False
    altered = list(adapter.altered(model))
    return Structure(
        hooked=f"the model has hooks of your own at {_some(hooked)}" if hooked else None,
        only_ours=only_ours,
        altered=_some(altered) if altered else None,
        signature=(*signature, *hooked, *altered),
    )


def untouched(model: Any, module: nn.Module) -> bool:
    """Whether a part of a model is as it was built, with nobody's hooks on it or on all of torch's modules."""
    adapter = adapter_of(model)
    return not _hooks_everywhere() and all(
        not _users_hooks(part, adapter.wiring) and not adapter.alterations(name, part, inside=True)
        for name, part in module.named_modules()
    )


@contextmanager
def without_users_hooks(model: Any) -> Iterator[None]:
    """Forward hooks that are the user's do not run inside: for trying out what a model computes by itself."""
    adapter = adapter_of(model)
    put_aside: list[tuple[Any, list]] = []
    for _, module in adapter.modules(model):
        users = _users_hooks(module, adapter.wiring, unwrapped=False)
        for hooks in (getattr(module, name) for name in _HOOKS) if users else ():
            put_aside.append((hooks, list(hooks.items())))
            for key in [key for key, hook in hooks.items() if any(hook is one for one in users)]:
                del hooks[key]  # in place, since who registered a hook holds this very mapping
    try:
        yield
    finally:
        for hooks, entries in put_aside:
            hooks.clear()
            hooks.update(entries)


def once_a_structure(
    found: MutableMapping[Any, tuple[tuple, Found]], model: Any, signature: tuple, find: Callable[[Any], Found]
) -> Found:
    """What `find(model)` gives, kept in `found` until the model's signature is another one."""
    known = found.get(model)
    if known is None or known[0] != signature:
        known = found[model] = (signature, find(model))
    return known[1]


def rounding(model: Any) -> float:
    """Largest relative difference that is put down to rounding in the model's type."""
    dtype = adapter_of(model).dtype(model)
    is_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TF32_ROUNDING if is_tf32 else ROUNDING[dtype]


def _users_hooks(module: nn.Module, wiring: frozenset[str], *, unwrapped: bool = True) -> list[Callable]:
    """Forward hooks of a module that are neither a library's own wiring nor an adapter's.

    TransformerLens wraps those that a hook point is given; they come as they were given, if wanted `unwrapped`.
    """
    found: list[Callable] = []
    raw = [hook for hooks in _HOOKS for hook in getattr(module, hooks).values()]
    if not raw:
        return found
    wrapped = [hook for hook in raw if _home_of(hook) == "transformer_lens.hook_points"]
    given: list[Any] = [handle.user_hook for handle in getattr(module, "fwd_hooks", ())]
    if len(given) != len(wrapped):
        given = [None] * len(wrapped)
    for hook in raw:
        home = _home_of(hook)
        if hook in wrapped or home.startswith("caa_lens.models."):
            continue
        if home.partition(".")[0] not in wiring:
            found.append(hook)
    for own, hook in zip(given, wrapped, strict=True):  # hook points are not TransformerLens' own affair alone
        if own is None or _home_of(own).partition(".")[0] not in wiring:
            found.append(hook if own is None or not unwrapped else own)
    return found


def _is_ours(hook: Callable) -> bool:
    return _home_of(hook).partition(".")[0] == "caa_lens"


def _home_of(hook: Callable) -> str:
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def _hooks_everywhere() -> bool:
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
