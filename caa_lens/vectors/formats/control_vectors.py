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

import torch

from caa_lens.atomic_files import write_atomically
from caa_lens.extras import needed_for
from caa_lens.file_kinds import VectorFileError, contents, expanded, printable, some, what_is
from caa_lens.provenance import UNKNOWN, Provenance
from caa_lens.vectors.formats.gguf_tensors import GgufContents, GgufError, parse_gguf
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

ARCHITECTURE = "controlvector"
MODEL_HINT = f"{ARCHITECTURE}.model_hint"
BASE_MODEL = "general.base_model.0.name"
_LAYER = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


class DroppedLayerWarning(UserWarning):
    """A layer could not be written, because the format has no place for it."""


class PassedOverWarning(UserWarning):
    """A file holds more than the vectors that were read from it."""


def read_control_vector(path: str | Path) -> SteeringVectors:
    """Read a control vector, as stored: `direction.{L}` becomes layer L.

    Raises:
        FileNotFoundError: if there is no such file.
        VectorFileError: if the file is damaged, big endian or no control vector, or its directions are not finite
            float vectors of one width.

    Warns:
        PassedOverWarning: the file holds other tensors beside the directions; they are named, and left out.
    """
    path = expanded(path)
    data = contents(path, "a GGUF control vector")
    kind, words = what_is(data)
    if kind != "gguf":
        raise VectorFileError(f"{path} is {words}; expected a GGUF control vector")
    try:
        return _as_vectors(path, parse_gguf(data))
    except GgufError as error:
        raise VectorFileError(f"{path} {error}") from None
    except ValueError as error:  # of different width or not finite
        raise VectorFileError(f"{path}: {error}") from None


def _as_vectors(path: Path, found: GgufContents) -> SteeringVectors:
    architecture = found.texts.get("general.architecture", "")
    if architecture != ARCHITECTURE:
        raise GgufError(
            f"holds a '{printable(architecture)}' with {len(found.tensors)} tensors, expected {ARCHITECTURE!r}: "
            "a model is loaded with load_model"
        )
    layers = {name: _LAYER.fullmatch(name) for name in found.tensors}
    others = [name for name, match in layers.items() if not match]
    if misnamed := [name for name in others if name.startswith("direction")]:
        raise GgufError(f"holds a tensor '{printable(misnamed[0])}', expected direction.1, direction.2, ...")
    if len(others) == len(layers):
        raise GgufError(
            f"holds no directions, but {some(others) or 'no tensors'}: expected direction.1, direction.2, ..."
        )
    if others:
        warnings.warn(
            f"{path.name} holds other tensors beside its directions, which are passed over: {some(others)}",
            PassedOverWarning,
            stacklevel=4,
        )
    behavior = found.texts.get("general.name") or printable(path.stem)
    source = f"GGUF control vector, model_hint {found.texts.get(MODEL_HINT, '')!r}"
    provenance = Provenance(
        model=found.texts.get(BASE_MODEL) or UNKNOWN,
        behavior=behavior,
        normalisation="unknown",
        expression=behavior,
        details={"source": source + (f"; passed over: {some(others)}" if others else "")},
    )
    vectors = []
    for name, match in layers.items():
        if match:
            direction = found.numbers(name)
            if direction.ndim != 1:
                raise GgufError(f"holds {name} of shape {list(direction.shape)}, expected one dimension, [d_model]")
            try:
                vectors.append(SteeringVector(direction=direction, layer=int(match[1]), provenance=provenance))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return SteeringVectors.from_vectors(vectors)


def write_control_vector(vectors: SteeringVectors, path: str | Path, *, model_hint: str = "llama") -> Path:
    """Write a control vector in float32, atomically.

    Args:
        model_hint: the Hugging Face model type that repeng wants to know.

    Raises:
        ValueError: if there is nothing but layer 0, or a component is too large for float32.

    Warns:
        DroppedLayerWarning: layer 0 is left out, because llama.cpp refuses a file that has it.
    """
    path = expanded(path)
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
    with needed_for("files in GGUF"):
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
