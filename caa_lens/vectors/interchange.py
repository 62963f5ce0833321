"""Steering vectors in other tools' files and objects: one function reads them all, one writes them.

| format | read and written by | what it is |
|---|---|---|
| `safetensors` | this library | one file that says everything about its vectors |
| `caa` | the CAA authors' code | a folder of `vec_layer_{L}_{model}.pt`, or of `vec_layer_{L}.pt` (read only) |
| `gguf` | llama.cpp, repeng, EasySteer | a control vector; no layer 0 |
| `vllm-lens` | vllm-lens | JSON |
| `lm-eval` | lm-evaluation-harness' model `steered` | a `.pt` of hook points, vectors and coefficients |
| bare tensors | anybody (read only) | `.pt`, `.npy`, `.npz`: `[layer d_model]`, or one `[d_model]` a layer |

In all of them layer L is the output of the 0-based block L, so layers never shift. Only `safetensors` keeps how a
vector was made.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

from caa_lens.file_kinds import VectorFileError as VectorFileError
from caa_lens.file_kinds import expanded, look
from caa_lens.provenance import UNKNOWN, Provenance, layer_ranges, one_model
from caa_lens.vectors.formats.bipo_files import is_bipo_name, read_bipo
from caa_lens.vectors.formats.caa_files import is_caa_name, read_caa, write_caa
from caa_lens.vectors.formats.control_vectors import read_control_vector, write_control_vector
from caa_lens.vectors.formats.lm_eval_files import is_lm_eval, read_lm_eval, write_lm_eval
from caa_lens.vectors.formats.tensor_files import as_layers, read_tensors
from caa_lens.vectors.formats.vllm_lens_files import read_vllm_lens, write_vllm_lens
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

ENDINGS = {".safetensors": "safetensors", ".gguf": "gguf", ".json": "vllm-lens"}
_READ: dict[str, Callable[[Path], SteeringVectors]] = {
    "safetensors": SteeringVectors.load,
    "gguf": read_control_vector,
    "json": read_vllm_lens,
    "lm-eval": read_lm_eval,
}
_WRITE: dict[str, Callable[[SteeringVectors, Path], Path]] = {
    "safetensors": SteeringVectors.save,
    "caa": write_caa,
    "gguf": write_control_vector,
    "vllm-lens": write_vllm_lens,
    "lm-eval": write_lm_eval,
}
FORMATS = tuple(_WRITE)


def read_vectors(
    path: str | Path, *, model: str | None = None, layers: SupportsIndex | Iterable[int] | None = None
) -> SteeringVectors:
    """Read steering vectors from any of these files, told apart by what is in them rather than by their names.

    Args:
        path: a file, or a folder of the CAA authors' files.
        model: whose vectors these are, where a file does not say; which model's, where a folder holds several.
        layers: the 0-based block of each row of a bare tensor `[layer d_model]`, in the order of the rows, or of a
            single vector. By default the rows of a tensor are blocks 0, 1, ..., and a single vector is refused.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        VectorFileError: if it is none of these formats, or damaged; if the file says another model or other layers than
            the caller. The error says what the file is, or what the folder holds.

    Warns:
        PassedOverWarning: a GGUF file holds other tensors beside the vectors.
    """
    path = expanded(path)
    told = None if layers is None else as_layers(layers)
    kind, words = look(path, "a file or folder of steering vectors")
    if kind == "torch" and is_lm_eval(path):
        kind = "lm-eval"
    bipo = kind == "torch" and is_bipo_name(path.name) and told is None
    if not bipo and kind in ("torch", "npy", "npz") and not (kind == "torch" and is_caa_name(path.name)):
        return read_tensors(path, layers=told, model=model)
    if kind in ("folder", "torch"):
        vectors = (read_bipo if bipo else read_caa)(path, model=model)
    elif kind in _READ:
        vectors = _READ[kind](path)
    else:
        raise VectorFileError(
            f"{path} is {words}; expected steering vectors, in one of {', '.join(FORMATS)}, .npy, .npz"
        )
    if told is not None and set(told) != set(vectors.layers):
        raise VectorFileError(
            f"{path} says that its layers are {layer_ranges(vectors.layers)}, not {layer_ranges(sorted(told))}: leave "
            "layers= out, and choose with .at([...])"
        )
    both = one_model((vectors.provenance.model, model or UNKNOWN))
    if both is None:
        raise VectorFileError(f"{path} says that its vectors are of {vectors.provenance.model}, not of {model}")
    if both == vectors.provenance.model:
        return vectors
    return replace(vectors, provenance=replace(vectors.provenance, model=both))


def write_vectors(vectors: SteeringVectors, path: str | Path, format: str | None = None) -> Path:
    """Write steering vectors for another tool.

    Args:
        format: `safetensors`, `caa`, `gguf`, `vllm-lens` or `lm-eval`. By default the ending says: `.safetensors`,
            `.gguf`, `.json`, and `caa` for a folder, which is a path without an ending or one that exists. A `.pt`
            has to be asked for: `lm-eval`, for a model of Llama's layout and with the coefficient 1; others through
            `lm_eval_files.write_lm_eval`.

    Raises:
        ValueError: if the format is unknown or cannot be guessed, or cannot hold these vectors.

    Warns:
        DroppedLayerWarning: a control vector has no place for layer 0.
        AllPositionsWarning: lm-eval adds at every position.
    """
    path = expanded(path)
    if format is None:
        ending = path.suffix.lower()
        format = "caa" if path.is_dir() or not ending else ENDINGS.get(ending, "")
        if not format:
            raise ValueError(
                f"the format of {path.name!r} cannot be guessed: end it in .safetensors, .gguf or .json, name a folder "
                "for CAA files, or give format=... (--to on the command line)"
            )
    if format not in _WRITE:
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    return _WRITE[format](vectors, path)


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
