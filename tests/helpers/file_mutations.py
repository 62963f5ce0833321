"""Damaged copies of files, drawn by a seeded generator: bytes, lengths, archives' members, headers and JSON.

And what no file may do to its reader: run code.
"""

import base64
import copy
import io
import json
import os
import random
import warnings
import zipfile


class RunsCode:
    """Unpickled the ordinary way, this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


_WAYS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ODD_INTS = [0, 1, 2, 7, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]
ODD_BYTES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\r",
    b"\r\n",
    b"\x1a",
    b"\\ud800",
    b"\\u0000",
    b"\xed\xa0\x80",
    b'"',
    b"{",
    b"}",
    b"]",
    b",",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
]
ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    2**31,
    2**63,
    10**30,
    -0.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\ud800",
    "x" * 3000,
    "10",
    "(A)",
    "torch.bfloat16",
    "int16",
    "zstd",
    [],
    {},
    [[]],
    [1, 2, 3],
    {"question": "q"},
]


def damaged(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A copy with one to three changes, each at random or at a place that the format gives meaning to."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        shape = _SHAPES[_shape_of(data)] if draw.random() < 0.5 else None
        changed = shape(data, draw) if shape else None
        data = _bytes(data, draw, others) if changed is None else changed
    return data


def _shape_of(data):
    if data.startswith(b"PK\x03\x04"):
        return "zip"
    if data[8:9] == b"{":
        return "safetensors"
    if data[:1] in (b"{", b"["):
        return "json"
    return "head"


def _bytes(data, draw, others):
    kind = draw.randrange(9)
    at = draw.randrange(len(data) + 1)
    if draw.random() < 0.5:
        at = min(at, draw.randrange(200))
    end = min(len(data), at + draw.choice((1, 2, 4, 8, 64, 1000)))
    if kind == 0:  # some bits
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 9)):
            if changed:
                changed[min(at + draw.randrange(16), len(changed) - 1)] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + draw.randbytes(draw.randrange(1, 20)) + data[at:]
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:end] + data[at:]
    if kind == 5:
        return data[:at] + bytes(end - at) + data[end:]
    if kind == 6:
        other = draw.choice(others)
        return data[:at] + other[draw.randrange(len(other) + 1) :]
    if kind == 7:
        return data[:at] + draw.choice(ODD_BYTES) + data[at:]
    return _number(data, draw, at)


def _number(data, draw, at):
    """An odd number in the place of eight, four or two bytes, or of one that is written in digits."""
    digits = [i for i, byte in enumerate(data[:3000]) if 48 <= byte <= 57]
    if digits and draw.random() < 0.4:
        at = draw.choice(digits)
        return data[:at] + str(draw.choice(ODD_INTS)).encode() + data[at + 1 :]
    width = draw.choice((1, 2, 4, 8))
    number = draw.choice(ODD_INTS) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _head(data, draw):
    return _number(data, draw, draw.randrange(min(len(data), 300) + 1))


def _zip(data, draw):
    """One member of an archive damaged, its checksum and length right; or renamed, dropped, doubled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return None
    if not members:
        return None
    chosen, kind = draw.randrange(len(members)), draw.randrange(6)
    name, content = members[chosen]
    if kind == 0:
        members[chosen] = (name[: draw.randrange(len(name))] + draw.choice(["x", "7", "/data.pkl", ".npy"]), content)
    elif kind == 1:
        del members[chosen]
    elif kind == 2:
        members[chosen] = (name, draw.choice(members)[1])
    else:
        members[chosen] = (name, damaged(content, draw, [content for _, content in members]))
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", draw.choice(_WAYS)) as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def _safetensors(data, draw):
    """The header's JSON changed, its length right."""
    length = int.from_bytes(data[:8], "little")
    changed = _json(data[8 : 8 + length], draw)
    return None if changed is None else len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def _json(data, draw):
    """A value changed, dropped or moved; of lines of JSON, in one line."""
    try:
        value, lines, at = json.loads(data), None, 0
    except (ValueError, RecursionError):
        lines = data.split(b"\n")
        at = draw.randrange(len(lines))
        try:
            value = json.loads(lines[at])
        except (ValueError, RecursionError):
            return None
    value = _changed(copy.deepcopy(value), draw)
    try:
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None
    if lines is None:
        return text
    return b"\n".join([*lines[:at], text, *lines[at + 1 :]])


def _changed(value, draw):
    places = list(_places(value))
    if not places:
        return draw.choice(ODD_VALUES)
    where, key = draw.choice(places)
    kind = draw.randrange(5)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, list):
        where.insert(key, draw.choice(ODD_VALUES))
    elif kind == 1:
        where[draw.choice(["x", "question", "positive", "shape", "\ud800", ""])] = where.pop(key)
    elif kind == 2 and isinstance(where[key], str) and len(where[key]) > 30:
        where[key] = _packed_again(where[key], draw)
    else:
        where[key] = draw.choice(ODD_VALUES)
    return value


def _packed_again(text, draw):
    """Numbers in base64, damaged within; any other text, with a bit of it exchanged."""
    try:
        return base64.b64encode(_bytes(base64.b64decode(text, validate=True), draw, [b"\0" * 20])).decode()
    except ValueError:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice(["\0", "é", "\ud800", "\n(A) ", " "]) + text[at + 1 :]


def _places(value):
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)


_SHAPES = {"zip": _zip, "safetensors": _safetensors, "json": _json, "head": _head}
