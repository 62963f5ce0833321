"""Compute an expression over named vectors, e.g. `0.5 * A.without(B) - B`, as `expressions` writes it.

Python's own parser reads the text, because what is written is Python. It runs nothing: its tree is walked here, and
whatever is not listed below is refused, with a caret under its place.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from caa_lens.vectors.algebra.arithmetic import VectorAlgebra
from caa_lens.vectors.algebra.combinations import mean_vector
from caa_lens.vectors.algebra.expressions import LONGEST

FUNCTIONS: dict[str, Callable[..., Any]] = {"mean": mean_vector}
METHODS = ("at", "at_layer", "lerp", "normalized", "onto", "rotated", "scaled_to", "slerp", "top_k", "without")
ATTRIBUTES = ("norm", "norms")
SIGNS: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


class ExpressionError(ValueError):
    """An expression that cannot be read or computed; the message shows where."""


def evaluate(text: str, vectors: Mapping[str, VectorAlgebra]) -> VectorAlgebra:
    """The vectors that an expression describes.

    It may use names, numbers, `+ - * /`, parentheses, `A[13]`, `A.at([13, 14])`, `mean(A, B)`, `A.norms` and
    the methods of vectors.

    Raises:
        ExpressionError: if it is not understood, uses an unknown name, cannot be computed, or is a mere number.
    """
    text = " ".join(text.split())
    if not 0 < len(text) <= LONGEST:
        raise ExpressionError(f"the expression has {len(text)} characters, expected 1 to {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's about `2if`, which is refused below
            tree = ast.parse(text, mode="eval").body
        value = _Reader(text, vectors).value(tree)
    except SyntaxError as error:
        place = error.offset - 1 if error.offset else len(text)  # no offset: it ended too early
        raise ExpressionError(_marked(text, f"not understood: {error.msg}", place)) from None
    except (RecursionError, MemoryError):
        raise ExpressionError("not understood: nested too deeply") from None
    if not isinstance(value, VectorAlgebra):
        raise ExpressionError(_marked(text, "this is a number, expected vectors", 0))
    return value


class _Reader:
    def __init__(self, text: str, vectors: Mapping[str, VectorAlgebra]) -> None:
        self.text, self.vectors = text, vectors

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(id=name) if name in self.vectors:
                return self.vectors[name]
            case ast.Name(id=name):
                raise self.error(f"unknown name {name!r}: known are {', '.join(self.vectors)}", node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.compute(node, operator.neg, self.value(operand))
            case ast.BinOp(left=left, right=right, op=op) if type(op) in SIGNS:
                return self.infix(node, left, right, *SIGNS[type(op)])
            case ast.Subscript(value=inner, slice=ast.Constant(value=int() as layer)):
                return self.compute(node, operator.getitem, self.value(inner), layer)
            case ast.List(elts=elements):
                return [self.value(element) for element in elements]
            case ast.Attribute(value=inner, attr=name) if name in ATTRIBUTES:
                return self.compute(node, getattr, self.value(inner), name)
            case ast.Call(func=ast.Attribute(value=inner, attr=name)) if name in METHODS:
                return self.call(node, self.compute(node, getattr, self.value(inner), name))
            case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
                return self.call(node, FUNCTIONS[name])
        known = ", ".join([*FUNCTIONS, *(f".{name}" for name in [*METHODS, *ATTRIBUTES])])
        raise self.error(f"not understood: expected vectors, numbers, + - * /, parentheses, {known}", node)

    def infix(self, node: ast.BinOp, left: ast.expr, right: ast.expr, sign: str, function: Callable) -> Any:
        v, w = self.value(left), self.value(right)
        place = self.text.index(sign, _characters(self.text, left.end_col_offset or 0))
        numbers = [not isinstance(side, VectorAlgebra) for side in (v, w)]
        if sign in "+-" and any(numbers) and not all(numbers):
            raise ExpressionError(_marked(self.text, "vectors and a number can only be multiplied or divided", place))
        if sign in "*/" and not (numbers[1] or (sign == "*" and numbers[0])):
            raise ExpressionError(_marked(self.text, "vectors can be multiplied and divided by numbers only", place))
        return self.compute(place, function, v, w)

    def call(self, node: ast.Call, function: Callable) -> Any:
        named = {word.arg or "**": self.value(word.value) for word in node.keywords}
        return self.compute(node, function, *map(self.value, node.args), **named)

    def compute(self, where: ast.expr | int, function: Callable, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except ExpressionError:
            raise
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as trouble:
            raise self.error(str(trouble), where) from None

    def error(self, message: str, where: ast.expr | int) -> ExpressionError:
        place = where if isinstance(where, int) else _characters(self.text, where.col_offset)
        return ExpressionError(_marked(self.text, message, place))


def _characters(text: str, offset: int) -> int:
    """Python counts columns in bytes."""
    return len(text.encode()[:offset].decode())


def _marked(text: str, message: str, place: int) -> str:
    return f"{message}\n  {text}\n  {' ' * place}^"
