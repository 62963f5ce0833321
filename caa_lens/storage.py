"""Steering vectors on disk: one safetensors file that explains itself.

The tensor is called `directions`, `[layer d_model]`; everything else stands in the file's string metadata, so that a
file found years later still says which model, hook point, layer convention and data it belongs to.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from caa_lens.vectors import HOOK_POINT, Provenance, SteeringVectors

FORMAT_VERSION = 1
LAYER_CONVENTION = "0-based block; directions live at the block's output"


class VectorFileError(ValueError):
    """A file that is not a readable set of steering vectors."""


def save_vectors(vectors: SteeringVectors, path: str | Path) -> Path:
    """Write vectors to a `.safetensors` file, atomically; an existing file is replaced whole or not at all."""
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"vectors are saved as .safetensors, got {path.name!r}")
    metadata = {
        "caa_lens_format": str(FORMAT_VERSION),
        "hook_point": HOOK_POINT,
        "layer_convention": LAYER_CONVENTION,
        "layers": json.dumps(list(vectors.layers)),
        "dtype": str(vectors.directions.dtype).removeprefix("torch."),
        **{key: _text(value) for key, value in asdict(vectors.provenance).items()},
    }
    data = _sorted_metadata(save({"directions": vectors.directions.detach().cpu().contiguous()}, metadata))
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


def load_vectors(path: str | Path) -> SteeringVectors:
    """Read a file that `save_vectors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        VectorFileError: if the file is damaged, not one of ours, lacks metadata, or has a newer format version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no vector file at {path}: expected a .safetensors file written by SteeringVectors.save"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = list(file.keys())
            _check_version(path, metadata)
            if names != ["directions"]:
                raise VectorFileError(f"{path} has tensors {names}, expected only 'directions'")
            directions = file.get_tensor("directions").clone()
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise VectorFileError(
            f"{path} is not a readable safetensors file ({error}): it may be truncated; save it again"
        ) from None
    try:
        layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
        fields: dict[str, Any] = {key: metadata[key] for key in Provenance.__dataclass_fields__}
        fields["n_pairs"] = int(fields["n_pairs"])
        fields["details"] = json.loads(fields["details"])
        if metadata["hook_point"] != HOOK_POINT:
            raise VectorFileError(f"{path} holds vectors at {metadata['hook_point']!r}, expected {HOOK_POINT!r}")
        return SteeringVectors(directions=directions, layers=layers, provenance=Provenance(**fields))
    except VectorFileError:
        raise
    except KeyError as error:
        raise VectorFileError(f"{path} lacks the metadata {error}: it was not written by this library") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise VectorFileError(f"{path} has unusable metadata or tensors: {error}") from None


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    version = metadata.get("caa_lens_format")
    if version is None:
        raise VectorFileError(f"{path} has no 'caa_lens_format' metadata: it was not written by this library")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise VectorFileError(
            f"{path} has format version {version!r}, this library reads up to {FORMAT_VERSION}: update caa_lens"
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(dict(value) if hasattr(value, "keys") else value)


def _sorted_metadata(data: bytes) -> bytes:
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


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp, which makes files that only their owner can read; vectors are shared.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
