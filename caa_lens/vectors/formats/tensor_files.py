"""Bare tensors in `.pt`, `.npy` and `.npz`: stacked, `[layer d_model]`, or by layer, `{layer: [d_model]}`.

Such a file says nothing about itself, so its layers are what the caller says, or what one can see: keys that name a
block (`10`, `"10"`, `"layer_10"`, `"model.layers.10"`), or else rows in order from block 0 on. Which of them it was
stands in `provenance.details["source"]`. A stack of `output_hidden_states` has the embedding as its first row, one row
more than the model has blocks; nothing in the file tells that, so it takes `layers=`, or `stack[1:]`.

A `.pt` file is a pickle, which can run code when it is read. The names in it are looked at first, and only what plain
tensors need is let through to `torch.load(weights_only=True)`. Objects in numpy's files are refused too.
"""

import io
import math
import operator
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from caa_lens.file_kinds import (
    MAX_BYTES,
    VectorFileError,
    are_weights,
    contents,
    expanded,
    printable,
    some,
    what_is,
)
from caa_lens.provenance import UNKNOWN, Provenance, layer_ranges
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

EXPECTED = "expected a tensor [layer, d_model], or one [d_model] for each layer by its number"
_REMEDY = "say which with read_vectors(..., layers=[13]), or --layers 13 of `caa-lens vectors convert`"
_KEY = re.compile(
    r"(?:(?:model|transformer|gpt_neox)\.)?(?:(?:layers?|blocks?|h|direction|vec_layer|vector)[._ -]?)?"
    r"([0-9]{1,6})(?:\.hook_resid_post)?"
)
_PLAIN = re.compile(
    r"torch (\w+Storage|b?float\w+|complex\w+|u?int\d+|bool)|torch\.storage (Typed|Untyped)Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|collections OrderedDict"
)
_N_PICKLES = 5  # that a file of PyTorch's early versions begins with; numbers follow


def read_tensors(
    path: str | Path, *, layers: SupportsIndex | Iterable[int] | None = None, model: str | None = None
) -> SteeringVectors:
    """Read bare tensors.

    Args:
        layers: the block of each row of a stack, in the order of the rows; by default rows are blocks 0, 1, ...
        model: whose vectors these are; the file does not say.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        VectorFileError: if it is another kind of file or damaged; holds anything but finite floating-point tensors of
            one of the two forms; or does not say the layer of the one vector in it.
    """
    path = expanded(path)
    found = load(path)
    try:
        rows, how = _by_layer(found, None if layers is None else as_layers(layers))
        behavior = printable(path.stem)
        provenance = Provenance(
            model=model or UNKNOWN,
            behavior=behavior,
            normalisation="unknown",
            expression=behavior,
            details={"source": f"bare tensors, {printable(path.name)}: {how}"},
        )
        check_alike(rows)
        return SteeringVectors.from_vectors(
            SteeringVector(direction=row, layer=layer, provenance=provenance) for layer, row in rows.items()
        )
    except VectorFileError as error:
        raise VectorFileError(f"{path} {error}") from None
    except ValueError as error:
        raise VectorFileError(f"{path}: {error}") from None


def as_layers(layers: SupportsIndex | Iterable[int]) -> tuple[int, ...]:
    """Block numbers in the order that was given.

    Raises:
        TypeError: for anything but whole numbers.
        ValueError: for a negative number, one given twice, or none at all.
    """
    given: list[Any] = list(layers) if isinstance(layers, Iterable) else [layers]
    if any(not hasattr(layer, "__index__") for layer in given):
        raise TypeError(f"layers must be whole numbers, 0-based blocks, got {given[:8]!r}")
    numbers = tuple(operator.index(layer) for layer in given)
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise ValueError(f"layers must be different 0-based block numbers, got {numbers[:8]}")
    return numbers


def load(path: Path, expected: str = EXPECTED) -> Any:
    """What a `.pt`, `.npy` or `.npz` file holds: a tensor, or a mapping; nothing but tensors is let in.

    Raises:
        FileNotFoundError, VectorFileError: as `read_tensors`.
    """
    data = contents(path, "a file of tensors")
    kind, words = what_is(data)
    readers = {"torch": _torch, "npy": _npy, "npz": _npz}
    if kind not in readers:
        raise VectorFileError(f"{path} is {words}; {expected}")
    try:
        with warnings.catch_warnings():  # about deprecated ways in which a file was written
            warnings.simplefilter("ignore")
            return readers[kind](data)
    except VectorFileError as error:
        raise VectorFileError(f"{path} {error}: {expected}") from None
    except Exception as error:  # a damaged file fails in many ways
        told = printable(str(error).partition("\n")[0] or type(error).__name__, 160)
        raise VectorFileError(f"{path} is damaged ({told}), get it again: {expected}") from None


def check_tensor(value: object, dims: int, what: str = "") -> Tensor:
    """A plain tensor of so many dimensions and finite floating-point numbers, detached.

    Raises:
        VectorFileError: worded to follow the name of the file.
    """
    expected = ("one finite vector, [d_model]", "finite vectors, [layer, d_model]")[dims - 1]
    at = f" at {what}" if what else ""
    if not isinstance(value, Tensor):
        raise VectorFileError(f"holds a {type(value).__name__}{at}: expected a tensor of {expected}")
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise VectorFileError(f"holds a tensor{at} that is no plain array of numbers: expected {expected}")
    if tensor.numel() * tensor.itemsize > max(tensor.untyped_storage().nbytes(), MAX_BYTES // 16):  # one row, expanded
        raise VectorFileError(f"claims {list(tensor.shape)} numbers{at}, which are no steering vectors")
    if tensor.ndim != dims or not tensor.is_floating_point() or not tensor.numel():
        dtype = str(tensor.dtype).removeprefix("torch.")
        remedy = "" if tensor.is_floating_point() else "; save it as tensor.float()"
        if tensor.ndim > dims:
            remedy = "; choose one position or head of each first, as in tensor[:, -1]"
        raise VectorFileError(f"holds {list(tensor.shape)} numbers in {dtype}{at}: expected {expected}{remedy}")
    n_bad = int((~torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float())).sum())  # float8 has no isfinite
    if n_bad:
        raise VectorFileError(f"holds {n_bad} NaN or infinite numbers{at}: expected {expected}; extract it in float32")
    return tensor.clone(memory_format=torch.contiguous_format)


def check_alike(rows: Mapping[int, Tensor]) -> None:
    """Refuse layers of different width or dtype, which are not of one run."""
    kinds = {layer: f"d_model={row.shape[-1]} in {row.dtype}".replace("torch.", "") for layer, row in rows.items()}
    first = next(iter(kinds))
    for layer, kind in kinds.items():
        if kind != kinds[first]:
            raise VectorFileError(
                f"mixes vectors: layer {first} has {kinds[first]}, but layer {layer} has {kind}: expected one run's"
            )


# ---- layers -------------------------------------------------------------------------------------------------------


def _by_layer(found: object, layers: tuple[int, ...] | None) -> tuple[dict[int, Tensor], str]:
    """A row for each layer, and in words how they were told."""
    if isinstance(found, Mapping):
        if len(found) == 1 and _layer_of(next(iter(found))) is None:  # a .npz has to give every array a name
            ((name, only),) = found.items()
            if isinstance(only, Tensor) and not are_weights([str(name)]):
                only_rows, how = _by_layer(only, layers)
                return only_rows, f"'{printable(str(name))}', {how}"
        return _by_key(found, layers)
    if isinstance(found, Tensor) and found.ndim == 1:
        found = found.unsqueeze(0)
    rows = check_tensor(found, dims=2)
    if layers is None and len(rows) == 1:
        raise VectorFileError(f"holds one vector of {rows.shape[1]} numbers and does not say its layer: {_REMEDY}")
    if layers is None and len(rows) > rows.shape[1]:
        raise VectorFileError(
            f"holds {len(rows)} rows of {rows.shape[1]} numbers, more layers than d_model: expected [layer, d_model]; "
            "save tensor.T, or give layers=range(...) if it is right"
        )
    if layers is not None and len(layers) != len(rows):
        raise VectorFileError(f"holds {len(rows)} rows, got {len(layers)} layers for them: give one for each row")
    if layers is None:
        return dict(enumerate(rows)), f"its {len(rows)} rows taken for blocks 0 to {len(rows) - 1}"
    return dict(zip(layers, rows, strict=True)), f"its rows taken for blocks {layer_ranges(layers)}, as told"


def _by_key(found: Mapping[Any, object], layers: tuple[int, ...] | None) -> tuple[dict[int, Tensor], str]:
    named = {key: _layer_of(key) for key in found}
    others = [str(key) for key, layer in named.items() if layer is None]
    if not found or others:
        if are_weights(others):
            raise VectorFileError(f"holds a model's weights, {some(others)}: models are loaded with load_model")
        raise VectorFileError(
            f"holds {some(others) or 'nothing'}, expected keys that are block numbers, as 10, 'layer_10' or "
            "'model.layers.10', each with a tensor [d_model]"
        )
    rows: dict[int, Tensor] = {}
    for key, layer in named.items():
        assert layer is not None
        if layer in rows:
            raise VectorFileError(f"holds layer {layer} twice, the second time as {key!r}: leave one out")
        rows[layer] = check_tensor(found[key], dims=1, what=repr(key))
    if layers is not None and set(layers) != set(rows):
        raise VectorFileError(
            f"says by its keys that its layers are {layer_ranges(sorted(rows))}, not {layer_ranges(sorted(layers))}: "
            "leave layers= out, and choose with .at([...])"
        )
    return dict(sorted(rows.items())), f"its keys taken for blocks, as {next(iter(found))!r}"


def _layer_of(key: object) -> int | None:
    """The block that a key names, or None."""
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    return int(match[1]) if match else None


# ---- files --------------------------------------------------------------------------------------------------------


def _torch(data: bytes) -> Any:
    pickles = [data]
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_size(archive)
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise VectorFileError("is a TorchScript program")
            pickles = [archive.read(name) for name in names if name.endswith(".pkl")]
    if foreign := sorted({name for pickled in pickles for name in _names_in(pickled)}):
        raise VectorFileError(
            f"is a pickle of objects, {some(foreign)}, whose reading could run code, so it was not read; save their "
            "tensors alone"
        )
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _names_in(pickled: bytes) -> set[str]:
    """The classes and functions that a pickle, or one of those that follow one another, names beside plain tensors'."""
    file, names = io.BytesIO(pickled), set()
    for _ in range(_N_PICKLES):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument))
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                names.add("an object")
        if not file.read(1):
            break
        file.seek(-1, io.SEEK_CUR)
    return {name.replace(" ", ".", 1) for name in names if not _PLAIN.fullmatch(name)}


def _npy(data: bytes) -> Tensor:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of numpy's format, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise VectorFileError("holds pickled objects, whose reading could run code, so it was not read")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise VectorFileError(f"holds {list(shape)} numbers in {dtype}; save it as array.astype('float32')")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes != len(data) - file.tell():
        raise ValueError(f"{list(shape)} numbers in {dtype} take {n_bytes} bytes, got {len(data) - file.tell()}")
    array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))  # a copy


def _npz(data: bytes) -> dict[str, Tensor]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _check_size(archive)
        return {name.removesuffix(".npy"): _npy(archive.read(name)) for name in archive.namelist()}


def _check_size(archive: zipfile.ZipFile) -> None:
    """Refuse an archive that unpacks to more than any vectors take."""
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_BYTES:
        raise VectorFileError(f"unpacks to {size} bytes: these are no steering vectors")
