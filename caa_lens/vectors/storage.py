"""Steering vectors on disk: one safetensors file that explains itself, and proves that it is what was written.

The tensor is called `directions`, `[layer d_model]`; everything else stands in the file's string metadata, so that a
file found years later still says which model, hook point, layer convention and data it belongs to. The metadata key
`checksum` is, in hexadecimal,

    sha256(json.dumps(all other metadata, sort_keys=True) as UTF-8, then the bytes of `directions`)

Version 1 had neither `checksum` nor `library_versions`; such files are read, unproven. Nothing is ever unpickled.
"""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.atomic_files import write_atomically
from caa_lens.file_kinds import VectorFileError, are_weights, contents, expanded, printable, some, what_is
from caa_lens.provenance import FORMER_NAMES, HOOK_POINT, Provenance
from caa_lens.vectors.algebra.rules import check_layers_of_rows

FORMAT_VERSION = 3
LAYER_CONVENTION = "0-based block; directions live at the block's output"
KEYS_1 = {"caa_lens_format", "hook_point", "layer_convention", "layers", "dtype", *(f.name for f in fields(Provenance))}
KEYS_2 = KEYS_1 | {"library_versions", "checksum"}
KEYS = {"1": KEYS_1, "2": KEYS_2, "3": KEYS_2}  # 3: models by the names that they have now
MAX_HEADER = 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


class Parts(NamedTuple):
    """What a file of vectors holds; see `SteeringVectors` for what each part means."""

    directions: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    provenance: Provenance


def save_parts(parts: Parts, path: str | Path) -> Path:
    """Write vectors to a `.safetensors` file, atomically; an existing file is replaced whole or not at all.

    Raises:
        ValueError: for another ending, or vectors that would not be read back as they are (a dtype that safetensors
            lacks, details that are not texts). Nothing is written then.
    """
    path = expanded(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"vectors are saved as .safetensors, got {path.name!r}")
    try:
        data = _encode(parts)
        again = _decode(data)
    except (VectorFileError, UnicodeError) as error:
        raise ValueError(f"these vectors cannot be saved, because the file {error}") from None
    if again.provenance != parts.provenance:
        raise ValueError(f"this provenance cannot be saved, because it holds more than texts: {parts.provenance}")
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


def load_parts(path: str | Path) -> Parts:
    """Read a file that `save_parts` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        VectorFileError: if the file is damaged, not one of ours, lacks metadata, or has a newer format version.
    """
    path = expanded(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"no vector file at {path}, which is a folder: caa_lens.read_vectors reads folders of other tools' files"
        )
    data = contents(path, "a .safetensors file written by SteeringVectors.save")
    try:
        return _decode(data)
    except VectorFileError as error:
        raise VectorFileError(f"{path} {error}") from None


def _encode(parts: Parts) -> bytes:
    from safetensors.torch import save

    directions = parts.directions.detach().cpu().contiguous()
    metadata = {
        "caa_lens_format": str(FORMAT_VERSION),
        "hook_point": HOOK_POINT,
        "layer_convention": LAYER_CONVENTION,
        "layers": json.dumps(list(parts.layers)),
        "dtype": str(directions.dtype).removeprefix("torch."),
        "library_versions": f"caa-lens {importlib.metadata.version('caa-lens')}, torch {torch.__version__}",
        **{key: _text(value) for key, value in asdict(parts.provenance).items()},
    }
    metadata["checksum"] = _checksum(metadata, directions.view(torch.uint8).numpy().tobytes())
    return sorted_metadata(save({"directions": directions}, metadata))


def _decode(data: bytes) -> Parts:
    """The parts from the bytes of a file.

    Raises:
        VectorFileError: whatever is wrong with them, worded to follow the name of the file.
    """
    from safetensors import SafetensorError, deserialize

    header = int.from_bytes(data[:8], "little")
    if MAX_HEADER < header <= len(data):
        raise VectorFileError(f"has a header of {header} bytes, expected at most {MAX_HEADER}: it is not one of ours")
    try:
        tensors = dict(deserialize(data))
        metadata = json.loads(data[8 : 8 + header]).get("__metadata__") or {}
        if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except (SafetensorError, ValueError, RecursionError) as error:
        kind, words = what_is(data)
        remedy = "it may be truncated; save it again" if kind == "safetensors" else f"it is {words}"
        if kind not in ("", "safetensors"):
            remedy += ", which caa_lens.read_vectors may read"
        raise VectorFileError(f"is not a readable safetensors file ({printable(str(error), 200)}): {remedy}") from None
    version = metadata.get("caa_lens_format")
    if version is None:
        whose = "a model's weights, which load_model reads" if are_weights(tensors) else "another tool's tensors"
        raise VectorFileError(
            f"has no 'caa_lens_format' metadata, so it was not written by this library: it holds {whose}, "
            f"{len(tensors)} of them, {some(sorted(tensors)) or 'none'}"
        )
    if version not in KEYS:
        *others, newest = KEYS
        readable = f"{', '.join(others)} and {newest}"
        raise VectorFileError(
            f"has format version '{printable(version)}', this library reads {readable}: update caa_lens"
        )
    if list(tensors) != ["directions"]:
        raise VectorFileError(
            f"has tensors {[printable(name) for name in list(tensors)[:8]]}, expected only 'directions'"
        )
    for key in sorted(KEYS[version] ^ metadata.keys()):
        trouble = "lacks the metadata" if key in KEYS[version] else "has the unknown metadata"
        raise VectorFileError(f"{trouble} '{printable(key)}': it was not written by this library, or is damaged")
    tensor = tensors["directions"]
    checksum = metadata.pop("checksum", None)
    if version != "1" and checksum != _checksum(metadata, tensor["data"]):
        raise VectorFileError("is damaged: its checksum is not that of its contents; save or copy it again")
    try:
        return _parts(metadata, tensor)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise VectorFileError(f"has unusable metadata or tensors: {printable(str(error), 400)}") from None


def _parts(metadata: dict[str, str], tensor: dict[str, Any]) -> Parts:
    for key, expected in {"hook_point": HOOK_POINT, "layer_convention": LAYER_CONVENTION}.items():
        if metadata[key] != expected:
            raise ValueError(f"{key} is {metadata[key]!r}, expected {expected!r}")
    dtype = _DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise ValueError(f"numbers are {tensor['dtype']}, expected one of {', '.join(_DTYPES)}: convert them first")
    if metadata["dtype"] != str(dtype).removeprefix("torch."):
        raise ValueError(f"numbers are {tensor['dtype']}, but said to be {metadata['dtype']!r}")
    layers, details = json.loads(metadata["layers"]), json.loads(metadata["details"])
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise ValueError(f"layers are {metadata['layers'][:80]!r}, expected a list of block numbers")
    if not isinstance(details, dict) or any(type(value) is not str for value in details.values()):
        raise ValueError(f"details are {metadata['details'][:80]!r}, expected texts by name")
    if not metadata["n_pairs"].isdecimal():
        raise ValueError(f"n_pairs is {metadata['n_pairs'][:80]!r}, expected a number")
    known: dict[str, Any] = {f.name: metadata[f.name] for f in fields(Provenance)}
    known |= {"n_pairs": int(metadata["n_pairs"]), "details": details}
    if metadata["caa_lens_format"] in ("1", "2"):
        known["model"] = FORMER_NAMES.get(known["model"], known["model"])
    # A bytearray, because torch wants memory that may be written to.
    directions = torch.frombuffer(bytearray(tensor["data"]), dtype=dtype).reshape(tensor["shape"])
    check_layers_of_rows(directions, layers)
    return Parts(directions=directions, layers=tuple(layers), provenance=Provenance(**known))


def _checksum(metadata: dict[str, str], tensor: bytes | bytearray) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() + tensor).hexdigest()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(dict(value) if hasattr(value, "keys") else value)


def sorted_metadata(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order, so that equal vectors make equal files.

    safetensors writes metadata in an order that differs from call to call. A file is the header's length in 8 bytes,
    the header as JSON padded with spaces, and the tensors.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padding = -len(text) % 8  # tensors start at a multiple of 8
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding + data[8 + length :]
