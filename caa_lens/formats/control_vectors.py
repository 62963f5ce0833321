"""GGUF control vectors, the files of llama.cpp, repeng and EasySteer.

Tensors `direction.{L}`, one-dimensional float32, are added at the output of block L, so L is our layer. llama.cpp knows
no layer 0 and refuses a file that has one; it ignores the metadata. repeng refuses a file without
`controlvector.model_hint`, a Hugging Face model type such as `llama`. The behavior and the model travel as GGUF's own
`general.name` and `general.base_model.0.name`, which these tools pass over.

llama.cpp's own `llama-cvector-generator` calls a direction that it reads at block L's output `direction.{L+1}`. Here a
layer is where a file is *applied*, by every tool that reads it.
"""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from caa_lens.atomic_files import write_atomically
from caa_lens.provenance import Provenance
from caa_lens.storage import VectorFileError
from caa_lens.vectors import SteeringVector, SteeringVectors

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "controlvector"
MODEL_HINT = f"{ARCHITECTURE}.model_hint"
BASE_MODEL = "general.base_model.0.name"


class DroppedLayerWarning(UserWarning):
    """A layer could not be written, because the format has no place for it."""


def read_control_vector(path: str | Path) -> SteeringVectors:
    """Read a control vector, as stored: `direction.{L}` becomes layer L.

    Raises:
        FileNotFoundError: if there is no such file.
        VectorFileError: if the file is damaged, big endian or no control vector, or its directions are not finite
            float vectors of one width.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: expected a GGUF control vector")
    reader = _open(path)
    behavior = _text(reader, "general.name") or path.stem
    provenance = Provenance(
        model=_text(reader, BASE_MODEL) or "unknown",
        behavior=behavior,
        normalisation="unknown",
        expression=behavior,
        details={"source": f"GGUF control vector, model_hint {_text(reader, MODEL_HINT)!r}"},
    )
    vectors = []
    for tensor in reader.tensors:
        match = re.fullmatch(r"direction\.(0|[1-9]\d*)", tensor.name)
        if match is None:
            raise VectorFileError(f"{path} holds a tensor {tensor.name!r}, expected direction.1, direction.2, ...")
        if tensor.data.dtype.kind != "f" or tensor.data.ndim != 1:
            raise VectorFileError(
                f"{path}: {tensor.name} has shape {tensor.shape.tolist()} and type {tensor.tensor_type.name}, expected "
                "one dimension and F32"
            )
        direction = torch.from_numpy(tensor.data.copy())  # the reader's array is a view of the file
        try:
            vectors.append(SteeringVector(direction=direction, layer=int(match[1]), provenance=provenance))
        except ValueError as error:
            raise VectorFileError(f"{path}: {tensor.name}: {error}") from None
    try:
        return SteeringVectors.from_vectors(vectors)
    except ValueError as error:  # of different width, or none at all
        raise VectorFileError(f"{path}: {error}") from None


def write_control_vector(vectors: SteeringVectors, path: str | Path, *, model_hint: str = "llama") -> Path:
    """Write a control vector in float32, atomically.

    Args:
        model_hint: the Hugging Face model type that repeng wants to know.

    Raises:
        ValueError: if there is nothing but layer 0, or a component is too large for float32.

    Warns:
        DroppedLayerWarning: layer 0 is left out, because llama.cpp refuses a file that has it.
    """
    path = Path(path)
    kept = [layer for layer in vectors.layers if layer != 0]
    if not kept:
        raise ValueError(f"llama.cpp's control vectors start at layer 1, got layers {vectors.layers}")
    if 0 in vectors:
        warnings.warn(
            f"{path.name} is written without layer 0: llama.cpp's control vectors start at layer 1",
            DroppedLayerWarning,
            stacklevel=2,
        )
    vectors = vectors.at(kept).to("cpu").to(torch.float32)
    return write_atomically(path, lambda temporary: _write(vectors, temporary, model_hint))


def _write(vectors: SteeringVectors, path: Path, model_hint: str) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(MODEL_HINT, model_hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
    writer.add_name(vectors.behavior)
    writer.add_string(BASE_MODEL, vectors.provenance.model)
    for vector in vectors:
        writer.add_tensor(f"direction.{vector.layer}", vector.direction.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _open(path: Path) -> "GGUFReader":
    from gguf import GGUFEndian, GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise VectorFileError(f"{path} is damaged or no GGUF file ({error}): write it again") from None
    if reader.endianess != GGUFEndian.LITTLE:
        raise VectorFileError(f"{path} is big endian, expected little endian: write it again on such a machine")
    architecture = _text(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise VectorFileError(f"{path} holds a {architecture!r}, expected {ARCHITECTURE!r}: load models by load_model")
    return reader


def _text(reader: "GGUFReader", key: str) -> str:
    field: Any = reader.fields.get(key)
    value = field.contents() if field is not None else ""
    return value if isinstance(value, str) else ""
