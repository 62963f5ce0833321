"""How arithmetic on vectors is written down: readable, exact, with the parentheses that the order needs.

What is written is Python, so that it can be read back, by `expression_parser` or by a person at a prompt::

    2 * (a[13] - b[13]).without(c[13]).normalized(to=0.1)
"""

import re
from collections.abc import Sequence

SUM, PRODUCT, MINUS, ATOM = 1, 2, 3, 4
LONGEST = 2000  # characters; an expression that uses itself twice would double at every step of a loop

_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}")


def infix(left: str, sign: str, right: str) -> str:
    """`left sign right`; what binds less tightly than the sign, or stands right of an equal, gets parentheses."""
    level = SUM if sign in "+-" else PRODUCT
    return _shortened(f"{_grouped(left, level)} {sign} {_grouped(right, level + 1, leading_minus=False)}")


def negated(text: str) -> str:
    """`-text`."""
    return _shortened(f"-{_grouped(text, ATOM)}")


def method(text: str, name: str, *arguments: str) -> str:
    """`text.name(arguments)`."""
    return _shortened(f"{_grouped(text, ATOM)}.{name}({', '.join(arguments)})")


def call(name: str, *arguments: str) -> str:
    """`name(arguments)`."""
    return _shortened(f"{name}({', '.join(arguments)})")


def indexed(text: str, layer: int) -> str:
    """`text[layer]`."""
    return f"{_grouped(text, ATOM)}[{layer}]"


def number(value: float | int) -> str:
    """The shortest text that reads back as the same number: 2.0 is `2`, a third `0.3333333333333333`."""
    return repr(float(value)).removesuffix(".0")


def numbers(values: Sequence[float | int]) -> str:
    """`[1, 2.5]`."""
    return f"[{', '.join(map(number, values))}]"


def _level(text: str) -> int:
    """How tightly the outermost operator of a text binds."""
    while (outside := _BRACKETS.sub("", text)) != text:
        text = outside
    if any(sign in text for sign in (" + ", " - ", "…", *"()[]{}")):
        return SUM
    if " * " in text or " / " in text:
        return PRODUCT
    return MINUS if text.startswith("-") else ATOM


def _grouped(text: str, least: int, *, leading_minus: bool = True) -> str:
    needed = _level(text) < least or (text.startswith("-") and not leading_minus)
    return f"({text})" if needed else text


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 2]} … {text[1 - LONGEST // 2 :]}"
