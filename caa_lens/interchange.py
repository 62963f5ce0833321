"""Steering vectors in other tools' files and objects: one function reads them all, one writes them.

| format | read and written by | what it is |
|---|---|---|
| `safetensors` | this library | one file that says everything about its vectors |
| `caa` | the CAA authors' code | a folder of `vec_layer_{L}_{model}.pt` |
| `gguf` | llama.cpp, repeng, EasySteer | a control vector; no layer 0 |
| `vllm-lens` | vllm-lens | JSON |

In all of them layer L is the output of the 0-based block L, so layers never shift. Only `safetensors` keeps how a
vector was made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from caa_lens.formats.caa_files import read_caa, write_caa
from caa_lens.formats.control_vectors import read_control_vector, write_control_vector
from caa_lens.formats.vllm_lens_files import read_vllm_lens, write_vllm_lens
from caa_lens.provenance import Provenance
from caa_lens.storage import VectorFileError, load_vectors, save_vectors
from caa_lens.vectors import SteeringVector, SteeringVectors

ENDINGS = {".safetensors": "safetensors", ".pt": "caa", ".gguf": "gguf", ".json": "vllm-lens"}
_READ: dict[str, Callable[[Path], SteeringVectors]] = {
    "safetensors": load_vectors,
    "gguf": read_control_vector,
    "vllm-lens": read_vllm_lens,
}
_WRITE: dict[str, Callable[[SteeringVectors, Path], Path]] = {
    "safetensors": save_vectors,
    "caa": write_caa,
    "gguf": write_control_vector,
    "vllm-lens": write_vllm_lens,
}
FORMATS = tuple(_WRITE)


def read_vectors(path: str | Path, *, model: str | None = None) -> SteeringVectors:
    """Read steering vectors from any of these files, told apart by what is in them rather than by their names.

    Args:
        path: a file, or a folder of the CAA authors' files.
        model: which model's, where a folder of CAA files holds several.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        VectorFileError: if it is none of these formats, or damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}: expected a file or folder of steering vectors")
    found = _format_of(path)
    return read_caa(path, model=model) if found == "caa" else _READ[found](path)


def write_vectors(vectors: SteeringVectors, path: str | Path, format: str | None = None) -> Path:
    """Write steering vectors for another tool.

    Args:
        format: `safetensors`, `caa`, `gguf` or `vllm-lens`. By default the ending says: `.safetensors`, `.gguf`,
            `.json`, and `caa` for a folder, which is a path without an ending or one that exists.

    Raises:
        ValueError: if the format is unknown or cannot be guessed, or cannot hold these vectors.

    Warns:
        DroppedLayerWarning: a control vector has no place for layer 0.
    """
    path = Path(path).expanduser()
    if format is None:
        format = "caa" if path.is_dir() or not path.suffix else ENDINGS.get(path.suffix, "")
        if not format or path.suffix == ".pt":
            raise ValueError(
                f"the format of {path.name!r} cannot be guessed: end it in .safetensors, .gguf or .json, name a folder "
                "for CAA files, or give format=... (--to on the command line)"
            )
    if format not in _WRITE:
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    return _WRITE[format](vectors, path)


def _format_of(path: Path) -> str:
    """What the first bytes say, or the ending where they say nothing."""
    if path.is_dir():
        return "caa"
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"GGUF"):
        return "gguf"
    if (
        start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    ):  # the header's length, maybe 0x80
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80")):  # PyTorch's archive, and the bare pickle of its early versions
        return "caa"
    if start.lstrip().startswith((b"{", b"[")) and b'"question"' in start:
        raise VectorFileError(
            f"{path} holds contrast pairs, expected steering vectors: pairs are loaded with ContrastSet.load; "
            "commands that take both take the pairs first"
        )
    if start.lstrip().startswith(b"{"):
        return "vllm-lens"
    if path.suffix in ENDINGS:
        return ENDINGS[path.suffix]
    raise VectorFileError(f"{path} is no file of steering vectors: expected one of {', '.join(FORMATS)}")


def to_steering_vectors(vectors: SteeringVectors) -> Any:
    """The object of the package `steering-vectors`, which steers Hugging Face models.

    Its `apply` adds at every position unless it is told `min_token_index`.
    """
    from steering_vectors import SteeringVector as PackageVector

    return PackageVector(
        layer_activations={vector.layer: vector.direction.clone() for vector in vectors}, layer_type="decoder_block"
    )


def from_steering_vectors(vector: Any, *, behavior: str = "unnamed", model: str = "unknown") -> SteeringVectors:
    """Vectors from an object of the package `steering-vectors`.

    Raises:
        ValueError: if it does not steer the blocks' outputs, or its layers count from the last block.
    """
    if vector.layer_type != "decoder_block":
        raise ValueError(f"the vector steers {vector.layer_type!r}, expected 'decoder_block': train it for the blocks")
    provenance = Provenance(
        model=model,
        behavior=behavior,
        normalisation="unknown",
        expression=behavior,
        details={"source": "steering-vectors"},
    )
    return SteeringVectors.from_vectors(
        SteeringVector(direction=activation.detach().flatten().clone(), layer=layer, provenance=provenance)
        for layer, activation in vector.layer_activations.items()
    )
