"""The steering vectors of vllm-lens: its objects, and the JSON that it sends to a server.

    {"activations": {"data": base64 of zstd, "dtype": ..., "original_dtype": ..., "shape": ..., "compression": "zstd"},
     "layer_indices": [13, 14], "scale": 1.0, "norm_match": false, "position_indices": null}

`activations` is `[layer d_model]`, added at the output of those 0-based blocks, at every position, the prompt's too.
numpy knows no bfloat16, so such a tensor travels as int16 with its `original_dtype`. What vllm-lens does beyond adding
one vector a layer (a vector a position, or a norm that follows the stream's) has no counterpart here and is refused.

zstd is part of Python from 3.14 on; before, it takes the package zstandard.
"""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, ValidationError
from torch import Tensor

from caa_lens.atomic_files import write_atomically
from caa_lens.extras import needed_for
from caa_lens.file_kinds import MAX_BYTES, VectorFileError, contents, expanded, printable
from caa_lens.provenance import UNKNOWN, Provenance
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors


class _WireTensor(BaseModel):
    data: str
    dtype: Literal["float16", "float32", "float64", "int16"]
    original_dtype: str | None = None
    shape: list[NonNegativeInt]
    compression: Literal["zstd"] | None = None


class _WireVector(BaseModel):
    activations: _WireTensor
    layer_indices: list[NonNegativeInt]
    scale: FiniteFloat = 1.0
    norm_match: bool = False


def read_vllm_lens(path: str | Path) -> SteeringVectors:
    """Read the JSON of one vllm-lens vector; its `scale` is multiplied in.

    Raises:
        FileNotFoundError: if there is no such file.
        VectorFileError: if the file is damaged, not of this form, or steers in a way that adding a vector cannot.
        ImportError: if the file is compressed and there is no zstd.
    """
    path = expanded(path)
    data = contents(path, "the JSON of a vllm-lens steering vector").removeprefix(b"\xef\xbb\xbf")
    try:
        wire = _WireVector.model_validate_json(data)
        activations = _decode(wire.activations)
        behavior = printable(path.stem)
        return _as_vectors(activations, wire.layer_indices, wire.scale, wire.norm_match, behavior, UNKNOWN)
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(map(str, first["loc"]))) or "the file"
        raise VectorFileError(
            f"{path} is not a vllm-lens steering vector: {where}: {printable(first['msg'], 200)}"
        ) from None
    except ValueError as error:
        raise VectorFileError(f"{path}: {printable(str(error), 400)}") from None


def write_vllm_lens(vectors: SteeringVectors, path: str | Path) -> Path:
    """Write the JSON of a vllm-lens vector with scale 1, atomically.

    The dtype is kept, but for 8-bit numbers, which become float32.

    Raises:
        ImportError: if there is no zstd.
    """
    if vectors.directions.dtype.itemsize == 1:
        vectors = vectors.to(torch.float32)
    payload = {
        "activations": _encode(vectors.directions),
        "layer_indices": list(vectors.layers),
        "scale": 1.0,
        "norm_match": False,
        "position_indices": None,
    }
    text = json.dumps(payload)
    return write_atomically(expanded(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_vllm_lens(vectors: SteeringVectors) -> Any:
    """The `vllm_lens.SteeringVector` of the same layers, for its `steering_vectors=[...]`.

    vllm-lens adds it at every position; steering here starts at the end of the prompt.
    """
    from vllm_lens import SteeringVector as VllmLensVector

    return VllmLensVector(activations=vectors.directions.clone(), layer_indices=list(vectors.layers))


def from_vllm_lens(vector: Any, *, behavior: str = "unnamed", model: str = "unknown") -> SteeringVectors:
    """Vectors from a `vllm_lens.SteeringVector`; its `scale` is multiplied in.

    Raises:
        ValueError: if it has a vector a position, follows the stream's norm, or names a layer twice.
    """
    return _as_vectors(
        vector.activations, vector.layer_indices, vector.scale, vector.norm_match, behavior=behavior, model=model
    )


def _as_vectors(
    activations: Tensor, layers: list[int], scale: float, norm_match: bool, behavior: str, model: str
) -> SteeringVectors:
    if activations.ndim != 2:
        raise ValueError(
            f"activations have shape {list(activations.shape)}, expected [layer, d_model]: a vector a position cannot "
            "be kept"
        )
    if len(layers) != len(activations) or len(set(layers)) != len(layers):
        raise ValueError(f"{len(activations)} activations for layers {layers}, expected one for each, none twice")
    if norm_match:
        raise ValueError("norm_match scales the vector at every token, which no fixed vector does: it cannot be kept")
    provenance = Provenance(
        model=model,
        behavior=behavior,
        normalisation="unknown",
        expression=behavior,
        details={"source": f"vllm-lens, scale {scale:g}"},
    )
    return SteeringVectors.from_vectors(
        SteeringVector(direction=direction * scale, layer=layer, provenance=provenance)
        for layer, direction in zip(layers, activations.detach().cpu(), strict=True)
    )


def _encode(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.detach().cpu().contiguous()
    stored = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    array = stored.numpy()
    return {
        "data": base64.b64encode(_zstd().compress(array.tobytes())).decode("ascii"),
        "dtype": str(array.dtype),
        "original_dtype": str(tensor.dtype),
        "shape": list(array.shape),
        "compression": "zstd",
    }


def _decode(wire: _WireTensor) -> Tensor:
    dtype = np.dtype(wire.dtype).newbyteorder("<")
    n_bytes = math.prod(wire.shape) * dtype.itemsize
    if n_bytes > MAX_BYTES:
        raise ValueError(f"activations of shape {wire.shape} take {n_bytes} bytes: these are no steering vectors")
    raw = base64.b64decode(wire.data, validate=True)
    if wire.compression == "zstd":
        zstd = _zstd()
        try:
            with zstd.open(io.BytesIO(raw), "rb") as file:
                raw = file.read(n_bytes + 1)  # never more than the shape promises
        except (zstd.ZstdError, EOFError, MemoryError, OverflowError) as error:
            raise ValueError(f"activations are damaged: {error}") from None
    if len(raw) != n_bytes:
        raise ValueError(f"activations of shape {wire.shape} in {wire.dtype} take {n_bytes} bytes, got {len(raw)}")
    tensor = torch.from_numpy(np.frombuffer(raw, dtype).reshape(wire.shape).copy())
    if (wire.dtype == "int16") != (wire.original_dtype == "torch.bfloat16"):
        raise ValueError(f"activations in {wire.dtype} of {wire.original_dtype}: expected int16 for bfloat16 only")
    return tensor.view(torch.bfloat16) if wire.dtype == "int16" else tensor


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        with needed_for("vllm-lens' vectors, compressed by zstd, which Python has from 3.14 on"):
            import zstandard as zstd
    return zstd
