"""The tensors and the texts of a small GGUF file, read within bounds.

The package `gguf` believes what a header says: an array that claims 2^60 entries keeps its reader busy for ever. Here
every length is compared with what is left of the file first, so that the work is bounded by the file's size.

    "GGUF", version, n_tensors, n_keys, n_keys x (key, type, value), n_tensors x (name, dims, type, offset), the numbers

Source: the specification in ggml, docs/gguf.md; versions 2 and 3, little endian.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caa_lens.extras import needed_for

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # ggml's numbers of its types
MAX_DEPTH = 4  # arrays of arrays


class GgufError(ValueError):
    """What is wrong with a file, worded to follow its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor is; `shape` is row first, as torch has it."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufContents:
    """All of a file: `texts` are the values that are strings, other values are passed over."""

    data: bytes
    texts: dict[str, str]
    tensors: dict[str, GgufTensor]

    def numbers(self, name: str) -> Tensor:
        """A tensor as stored, copied.

        Raises:
            GgufError: if its type is none of float32, float16, bfloat16 and float64, or the file ends before it does.
        """
        tensor = self.tensors[name]
        if tensor.type not in FLOATS:
            raise GgufError(
                f"{name} has type {_type_name(tensor.type)}, expected F32, F16, BF16 or F64: write it again unquantised"
            )
        dtype = FLOATS[tensor.type]
        end = tensor.start + math.prod(tensor.shape) * dtype.itemsize
        if end > len(self.data):
            raise GgufError(
                f"is damaged: {name} ends at byte {end} of {len(self.data)}: it may be cut off, get it again"
            )
        raw = bytearray(self.data[tensor.start : end])
        return (
            torch.frombuffer(raw, dtype=dtype).reshape(tensor.shape) if raw else torch.empty(tensor.shape, dtype=dtype)
        )


def parse_gguf(data: bytes) -> GgufContents:
    """Read a file's header.

    Raises:
        GgufError: if it is damaged, of another version or big endian.
    """
    if int.from_bytes(data[4:8], "little") & 0xFFFF == 0 and len(data) >= 8:
        raise GgufError("is big endian, expected little endian: write it again on such a machine")
    cursor = _Cursor(data)
    try:
        if cursor.take(4) != b"GGUF":
            raise GgufError("is no GGUF file")
        if (version := cursor.scalar("I")) not in (2, 3):
            raise GgufError(f"has GGUF version {version}, expected 2 or 3: write it again")
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        values = {}
        for _ in range(n_keys):
            key = cursor.text()
            if key in values:
                raise GgufError(f"is damaged: it has the key {key!r} twice")
            values[key] = cursor.value(cursor.scalar("I"))
        found = []
        for _ in range(n_tensors):
            name, n_dims = cursor.text(), cursor.scalar("I")
            if n_dims > 4:
                raise GgufError(f"is damaged: tensor {name!r} has {n_dims} dimensions, GGUF has at most 4")
            dims = [cursor.scalar("Q") for _ in range(n_dims)]
            found.append((name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")))
    except (struct.error, UnicodeDecodeError) as error:
        raise GgufError(f"is damaged or no GGUF file ({error}): get or write it again") from None
    align = values.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise GgufError(f"is damaged: its alignment is {align!r}, expected a power of 2")
    numbers_start = -(-cursor.at // align) * align
    tensors = {
        name: GgufTensor(shape=shape, type=type_, start=numbers_start + offset) for name, shape, type_, offset in found
    }
    if len(tensors) < len(found):
        raise GgufError("is damaged: it has two tensors of one name")
    return GgufContents(
        data=data, texts={key: value for key, value in values.items() if isinstance(value, str)}, tensors=tensors
    )


class _Cursor:
    """A place in the bytes of a file; whatever would go beyond their end is a `struct.error`."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise struct.error(f"it ends {n - (len(self.data) - self.at)} bytes too early")
        self.at += n
        return self.data[self.at - n : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A string or a number; an array is passed over."""
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY or depth == MAX_DEPTH:
            raise struct.error(f"a value of unknown type {kind}")
        inner, n = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            self.take(n * struct.calcsize(SCALARS[inner]))
            return None
        for _ in range(n):  # each takes 8 bytes at least, so that the file's end comes first
            self.value(inner, depth + 1)
        return None


def _type_name(number: int) -> str:
    with needed_for("files in GGUF"):
        from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}, which is unknown"
