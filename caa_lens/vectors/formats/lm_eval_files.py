"""The files of lm-evaluation-harness' model `steered`: a `.pt` that says what is added behind which module.

    {"layers.14": {"action": "add", "steering_vector": [d_model], "steering_coefficient": 2.0,
                   "bias": None, "head_index": None}, ...}

A hook point is the name of a module below Hugging Face's `model.base_model`: block 14 is `layers.14` in a Llama,
without `model.`, and `h.14` in a GPT-2. The vector times the coefficient is added to the output of that module, at
every position, the prompt's too. What lm-eval does beyond that (clamping, one attention head, another module than a
block) is not adding a vector to the residual stream and is refused.

Source: `lm_eval/models/hf_steered.py` of lm-eval 0.4.13.
"""

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caa_lens.arguments import as_float, as_multiplier
from caa_lens.atomic_files import write_atomically
from caa_lens.file_kinds import VectorFileError, contents, expanded, printable, some
from caa_lens.provenance import UNKNOWN, Provenance
from caa_lens.vectors.formats.tensor_files import check_alike, check_tensor, load
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

EXPECTED = "expected hook points of lm-eval's model 'steered', each with an action and a steering_vector"
ENDINGS = (".pt", ".pth")  # lm-eval goes by the ending
# Where a family of transformers has its list of blocks, below `model.base_model`.
BLOCKS = {
    "layers": (
        *("cohere", "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "mixtral"),
        *("olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "smollm3", "stablelm", "starcoder2"),
    ),
    "h": ("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"),
    "blocks": ("mpt",),
    "decoder.layers": ("opt",),
}
_BLOCK = re.compile(
    r"(?:(?:base_model|model|transformer|gpt_neox|decoder|language_model)\.)*(?:layers|h|blocks)\.(0|[1-9][0-9]{0,5})"
)
_KEYS = ("action", "steering_vector", "steering_coefficient", "bias", "head_index")


class AllPositionsWarning(UserWarning):
    """Another tool adds a vector at every position, where this library starts at the end of the instruction."""


def is_lm_eval(path: Path) -> bool:
    """Whether what `torch.save` pickled, of which nothing is packed, holds the words of lm-eval's entries.

    Not the whole file: its own name stands in the archive's.
    """
    data = contents(path)
    if zipfile.is_zipfile(io.BytesIO(data)):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                pickled = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
                data = b"".join(map(archive.read, pickled))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error):
            return False  # damaged, which whoever reads it tells
    return b"steering_vector" in data and b"action" in data


def read_lm_eval(path: str | Path) -> SteeringVectors:
    """Read a file of lm-eval's model `steered`; coefficients are multiplied in, in float32 unless all are 1.

    Raises:
        FileNotFoundError: if there is no such file.
        VectorFileError: if the file is damaged, or does anything but add one finite vector to the output of a block.
    """
    path = expanded(path)
    found = load(path, EXPECTED)
    try:
        rows, coefficients = _by_layer(found)
        behavior = printable(path.stem)
        told = ", ".join(f"{layer}: {coefficient:g}" for layer, coefficient in coefficients.items())
        provenance = Provenance(
            model=UNKNOWN,
            behavior=behavior,
            normalisation="unknown",
            expression=behavior,
            details={"source": f"lm-eval, coefficients by layer {told}"},
        )
        return SteeringVectors.from_vectors(
            SteeringVector(direction=row, layer=layer, provenance=provenance) for layer, row in rows.items()
        )
    except VectorFileError as error:
        raise VectorFileError(f"{path} {error}") from None
    except ValueError as error:  # a product that is not finite
        raise VectorFileError(f"{path}: {error}") from None


def write_lm_eval(
    vectors: SteeringVectors | SteeringVector,
    path: str | Path,
    *,
    multiplier: float | int = 1.0,
    model_type: str = "llama",
    blocks: str | None = None,
) -> Path:
    """Write a file for lm-eval's model `steered`, atomically: `layers.{L}` gets layer L's vector and the multiplier.

    The dtype is kept, but for 8-bit numbers, which become float32. A name that the model does not have is an error
    of lm-eval's.

    Args:
        multiplier: the coefficient, the same at every layer. All layers of the file act at once: `vectors[14]`, or
            `vectors.at([14])`, is one of them.
        model_type: of the model's `config.json`, which says what its list of blocks is called.
        blocks: that list's name below `model.base_model`, for a type that is not known here.

    Raises:
        ValueError: for a path that does not end in `.pt`, which lm-eval would not read, or an unknown model type.

    Warns:
        AllPositionsWarning: always; lm-eval has no other way to steer.
    """
    path = expanded(path)
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"lm-eval goes by the ending of its file: expected {path.stem}.pt, got {path.name!r}")
    multiplier = as_multiplier(multiplier)
    blocks = _blocks_of(model_type) if blocks is None else blocks
    if isinstance(vectors, SteeringVector):
        vectors = SteeringVectors.from_vectors([vectors])
    if vectors.directions.dtype.itemsize == 1:
        vectors = vectors.to(torch.float32)
    warnings.warn(
        f"lm-eval adds what is in {path.name} at every position, the prompt's too, and at "
        f"{'its layer' if len(vectors) == 1 else f'all {len(vectors)} layers at once'}; here steering starts at the "
        "end of the instruction: compare with positions='all'",
        AllPositionsWarning,
        stacklevel=2,
    )
    entries = {
        # A clone, because torch.save writes the whole storage that a row is a view of.
        f"{blocks}.{vector.layer}": {
            "action": "add",
            "steering_vector": vector.direction.detach().cpu().clone(),
            "steering_coefficient": multiplier,
            "bias": None,
            "head_index": None,
        }
        for vector in vectors
    }
    return write_atomically(path, lambda temporary: torch.save(entries, temporary))


def _blocks_of(model_type: str) -> str:
    for blocks, types in BLOCKS.items():
        if model_type in types:
            return blocks
    known = ", ".join(sorted(one for types in BLOCKS.values() for one in types))
    raise ValueError(
        f"where models of type {model_type!r} have their blocks is not known here: expected one of {known}; or say "
        "blocks=..., the list's name in model.base_model.named_modules(), such as 'layers'"
    )


def _by_layer(found: object) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Vectors with their coefficients multiplied in, and the coefficients, by layer."""
    if not isinstance(found, Mapping) or not found:
        raise VectorFileError(f"holds a {type(found).__name__} without entries: {EXPECTED}")
    directions: dict[int, Tensor] = {}
    coefficients: dict[int, float] = {}
    for hook_point, entry in found.items():
        at = f"'{printable(str(hook_point))}'"
        match = _BLOCK.fullmatch(hook_point) if isinstance(hook_point, str) else None
        if match is None:
            raise VectorFileError(
                f"steers at {at}, expected the outputs of blocks only, such as 'layers.14': other places of the model "
                "cannot be kept"
            )
        layer = int(match[1])
        if layer in directions:
            raise VectorFileError(f"steers block {layer} twice, the second time as {at}: leave one out")
        directions[layer], coefficients[layer] = _entry(entry, at)
    check_alike(directions)
    if any(coefficient != 1 for coefficient in coefficients.values()):
        # lm-eval multiplies in the model's dtype; a half's product would be rounded once more.
        directions = {
            layer: (direction if direction.dtype == torch.float64 else direction.float()) * coefficients[layer]
            for layer, direction in directions.items()
        }
    return dict(sorted(directions.items())), dict(sorted(coefficients.items()))


def _entry(entry: Any, at: str) -> tuple[Tensor, float]:
    if not isinstance(entry, Mapping) or "action" not in entry or "steering_vector" not in entry:
        raise VectorFileError(f"holds a {type(entry).__name__} at {at}: {EXPECTED}")
    if entry["action"] != "add":
        raise VectorFileError(
            f"says action '{printable(str(entry['action']))}' at {at}, expected 'add': clamping the stream along a "
            "direction is no vector that is added, and cannot be kept"
        )
    if entry.get("head_index") is not None:
        raise VectorFileError(f"steers one attention head at {at}, expected the residual stream: it cannot be kept")
    if entry.get("bias") is not None:
        raise VectorFileError(f"has a bias at {at}, which lm-eval refuses for the action 'add': leave it out")
    if more := [str(key) for key, value in entry.items() if key not in _KEYS and value is not None]:
        raise VectorFileError(
            f"says {some(more)} at {at}, expected {', '.join(_KEYS)} only: what more is meant cannot be kept"
        )
    given = entry.get("steering_coefficient", 1.0)
    try:
        coefficient = as_float("steering_coefficient", given)
    except (TypeError, ValueError) as error:
        raise VectorFileError(f"holds no coefficient at {at}: {printable(str(error))}") from None
    return check_tensor(entry["steering_vector"], dims=1, what=at), coefficient
