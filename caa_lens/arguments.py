"""What may stand for a number: any number of Python, numpy or torch, and never a text, a truth value or NaN.

Checks of numbers, lists, seeds and texts are here; a check of a pair, a prompt, a model or a vector is in its own room.

`True` is 1 to Python, `"3"` is 3 to `int`, and a random generator takes -1 for 1: each would be a wrong number without
a word.
"""

import math
import numbers
import secrets
from collections.abc import Iterable
from typing import Any

LARGEST_SEED = 2**63 - 1


def as_float(name: str, value: object) -> float:
    """A finite number as a float of Python.

    Raises:
        TypeError: for anything but one number.
        ValueError: for NaN or an infinite one.
    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        found = float(number)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {found}")
    return found


def as_multiplier(value: object) -> float:
    """`as_float` of a multiplier, which float32 must hold."""
    found = as_float("multiplier", value)
    if abs(found) > 3.4e38:
        raise ValueError(f"multiplier must be finite in float32, got {found:g}")
    return found


def check_count(name: str, value: object, *, least: int | None = 1) -> int:
    """A whole number as an `int`.

    Raises:
        TypeError: for anything but a whole number.
        ValueError: for one below `least`.
    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {describe(value)}")
    found = int(number)
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found


def as_seed(seed: object) -> int:
    """A seed as an `int` that every random generator takes for what it is; None draws a fresh one.

    Raises:
        TypeError: for anything but a whole number or None.
        ValueError: for a negative one, which Python takes for its opposite, or one that torch does not take.
    """
    if seed is None:
        return secrets.randbits(32)
    found = check_count("seed", seed, least=0)
    if found > LARGEST_SEED:
        raise ValueError(f"seed must be at most 2**63 - 1, got {found}")
    return found


def check_list(name: str, values: object, kind: type[int] | type[float]) -> list:
    """A list of numbers, as plain numbers of Python.

    Raises:
        TypeError: for one number, a text, or a list with anything but numbers (with `int`: whole numbers) in it.
    """
    wanted = "whole numbers" if kind is int else "numbers"
    one = _plain(values)
    if isinstance(one, numbers.Real) and len(repr(one)) < 60:
        raise TypeError(f"{name} must be a list of {wanted}, got {one!r}: write {name}=[{one!r}]")
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of {wanted}, got {describe(values)}: write e.g. {name}=[1, 2]")
    found = []
    for value in values:
        number = _plain(value)
        taken = isinstance(number, numbers.Integral)
        if not taken and isinstance(number, numbers.Real):
            taken = kind is float or float(number).is_integer()
        if not taken or isinstance(number, bool):
            raise TypeError(f"{name} must be {wanted}, got {describe(value)} among them")
        try:
            found.append(int(number) if kind is int else float(number))
        except OverflowError:
            raise ValueError(f"{name} must be finite, got a number of more than 300 digits among them") from None
    return found


def describe(value: object) -> str:
    """A value as an error message shows it: its type, and itself where that is short; never a tensor's numbers."""
    kind = type(value).__name__
    if kind in ("Tensor", "Parameter", "ndarray"):
        return f"{'an array' if kind == 'ndarray' else 'a tensor'} of shape {tuple(getattr(value, 'shape', ()))}"
    if isinstance(value, tuple | list):
        return f"a {kind} of {', '.join(type(one).__name__ for one in value[:4])}{', ...' if value[4:] else ''}"
    shown = repr(value)
    return f"the {kind} {shown}" if len(shown) <= 60 and isinstance(value, str | numbers.Number) else kind


def _plain(value: object) -> Any:
    """What a value of numpy or torch with one number in it is to Python; everything else as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def is_unicode(text: str) -> bool:
    """Whether a text can be written down: half a surrogate pair (`"\\ud83d"`) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
