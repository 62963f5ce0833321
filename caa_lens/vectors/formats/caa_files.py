"""The files of the CAA authors' repository: one bare tensor a layer, a folder a behavior.

    vectors/sycophancy/vec_layer_13_Llama-2-7b-chat-hf.pt             [d_model]
    activations/sycophancy/activations_pos_13_Llama-2-7b-chat-hf.pt   [pair d_model], and activations_neg_...

Layers are 0-based blocks and the tensors live at the block's output, so theirs is our layer. The model is the last part
of its name, and one folder usually holds several models. Their earlier files name no model: `vec_layer_13.pt`,
`activations_pos_13.pt`; the model is then "unknown" unless the caller knows it. Source: nrimsky/CAA, behaviors.py and
generate_vectors.py, and its first versions.
"""

import os
import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.atomic_files import write_atomically
from caa_lens.file_kinds import VectorFileError, contents, expanded, some, what_is, what_it_holds
from caa_lens.provenance import UNKNOWN, Provenance, last_part, one_model
from caa_lens.vectors.formats.tensor_files import check_alike, check_tensor, load
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

VECTOR_NAME = "vec_layer_{layer}_{model}.pt"
ACTIVATIONS_NAME = "activations_{side}_{layer}_{model}.pt"
_EARLIER = re.compile(r"vec_layer_[0-9]+\.pt", re.IGNORECASE)
_VECTOR = "one bare tensor [d_model] of finite numbers"
_ACTIVATIONS = "one bare tensor [pair, d_model] of finite numbers"


def read_caa(path: str | Path, *, model: str | None = None) -> SteeringVectors:
    """One model's vectors from a folder of the authors' files, or the one layer of a single file.

    Args:
        path: the folder, whose name is taken for the behavior, or a file in it.
        model: which model of a folder that holds several, e.g. `meta-llama/Llama-2-7b-chat-hf`. Files are named after
            the last part; the vectors get the fuller name. Files that name no model are this model's where there are
            no others; beside others they are chosen by model="unknown".

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        VectorFileError: if there are no such files, several models and none chosen, or a file is damaged, holds
            anything but one finite 1-D floating-point tensor, or has another width or dtype than the others.
    """
    path = expanded(path)
    folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
    if only is not None and not path.exists():
        raise FileNotFoundError(f"nothing at {path}: expected a folder of {VECTOR_NAME} files, or one of them")
    found, files = _files_of(folder, VECTOR_NAME, model=model, only=only)
    behavior = os.path.basename(os.path.abspath(folder))  # of a link to a folder, the link's name
    unnamed = [file for file in files.values() if _EARLIER.fullmatch(file.name)]
    provenance = Provenance(
        model=one_model((found, model or UNKNOWN)) or found,
        behavior=behavior,
        normalisation="unknown",
        expression=behavior,
        details={"source": f"CAA files, {path.name or behavior}" + (", which name no model" if unnamed else "")},
    )
    tensors = {layer: _tensor(file, 1, f"expected {_VECTOR}") for layer, file in files.items()}
    _check_alike(folder, tensors)
    return SteeringVectors.from_vectors(
        SteeringVector(direction=tensor, layer=layer, provenance=provenance) for layer, tensor in tensors.items()
    )


def is_caa_name(name: str) -> bool:
    """Whether a file is called as the authors call one layer's vector."""
    return _pattern(VECTOR_NAME).fullmatch(name) is not None


def write_caa(vectors: SteeringVectors, folder: str | Path) -> Path:
    """Write one file a layer, as the authors' code reads them; name the folder after the behavior.

    float32 and float16 are kept, anything else becomes float32. Each file is written atomically.

    Raises:
        ValueError: if the folder already holds other layers of this model, which would look like one set with these.
    """
    folder = expanded(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: CAA files go into a folder, one file a layer")
    model = last_part(vectors.provenance.model)
    present = set(_models_in(folder, VECTOR_NAME).get(model, {}))
    if left_over := sorted(present - set(vectors.layers)):
        raise ValueError(
            f"{folder} already holds layers {left_over} of {model}, which are not replaced and would be read together "
            "with these: choose another folder"
        )
    if vectors.directions.dtype not in (torch.float32, torch.float16):
        vectors = vectors.to(torch.float32)
    for vector in vectors:
        # A clone, because torch.save writes the whole storage that a row is a view of.
        direction = vector.direction.detach().cpu().clone()
        path = folder / VECTOR_NAME.format(layer=vector.layer, model=model)
        write_atomically(path, lambda temporary, direction=direction: torch.save(direction, temporary))  # type: ignore[misc]
    return folder


def read_caa_activations(
    folder: str | Path, *, model: str | None = None
) -> dict[int, tuple[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]]]:
    """The positive and the negative side's activations of each layer, as the estimators of `extraction` take them.

        directions = {layer: mean_difference(*sides) for layer, sides in read_caa_activations(folder).items()}

    Raises:
        VectorFileError: as `read_caa`, or if the sides differ in layers or in number of pairs.
    """
    folder = expanded(folder)
    sides = {}
    for side in ("pos", "neg"):
        model, files = _files_of(folder, ACTIVATIONS_NAME.replace("{side}", side), model=model)
        sides[side] = {layer: _tensor(file, 2, f"expected {_ACTIVATIONS}") for layer, file in files.items()}
        _check_alike(folder, sides[side])
    shapes = [{layer: tuple(tensor.shape) for layer, tensor in side.items()} for side in sides.values()]
    if shapes[0] != shapes[1]:
        raise VectorFileError(f"{folder}: the positive activations have shapes {shapes[0]}, the negative {shapes[1]}")
    return {layer: (sides["pos"][layer], sides["neg"][layer]) for layer in sides["pos"]}


def _pattern(name: str) -> re.Pattern[str]:
    """Names of files with their layer and, but for the earlier ones, their model; the ending in any case."""
    stem = name.removesuffix("_{model}.pt").format(layer="(?P<layer>0|[1-9][0-9]{0,5})")
    return re.compile(stem + r"(?:_(?P<model>.+))?\.[pP][tT]", re.DOTALL)


def _models_in(folder: Path, name: str, only: str | None = None) -> dict[str, dict[int, Path]]:
    """Files of a folder by model and layer, layers ascending; files that name no model are under "unknown".

    Raises:
        VectorFileError: if the folder cannot be read, or two files are of one model's one layer.
    """
    found: dict[str, dict[int, Path]] = {}
    try:
        names = [only] if only else sorted(os.listdir(folder)) if folder.exists() else []
    except OSError as error:
        raise VectorFileError(f"{folder} cannot be read ({error.strerror or error})") from None
    for each in names:
        if match := _pattern(name).fullmatch(each):
            files = found.setdefault(match["model"] or UNKNOWN, {})
            before = files.setdefault(int(match["layer"]), folder / each)
            if before.name != each:
                raise VectorFileError(
                    f"{folder} holds one layer twice, as {before.name} and {each}: move one of them away"
                )
    return {model: dict(sorted(files.items())) for model, files in sorted(found.items())}


def _files_of(folder: Path, name: str, *, model: str | None, only: str | None = None) -> tuple[str, dict[int, Path]]:
    """The chosen model's name and its files by layer."""
    found = _models_in(folder, name, only)
    earlier = name.replace("_{model}", "")
    if not found and only is not None:
        _, words = what_is(contents(folder / only))
        raise VectorFileError(
            f"{folder / only} is {words}, but is not called {name} or {earlier}, which says its layer: read it with "
            "read_vectors(..., layers=[13])"
        )
    if not found:
        behaviors = sorted({file.parent.name for file in folder.glob("*/*.[pP][tT]")})
        choose = f"; choose one of the folders in it, {some(behaviors, 8)}" if behaviors else ""
        raise VectorFileError(f"{folder} {what_it_holds(folder)}; expected files called {name} or {earlier}{choose}")
    chosen = next(iter(found)) if model is None else last_part(model)
    told = [
        f"files that name no model ({some(f.name for f in files.values())})" if m == UNKNOWN else m
        for m, files in found.items()
    ]
    if model is None and len(found) > 1:
        by = "model=..., or 'unknown' for those that name none" if UNKNOWN in found else "model=..."
        raise VectorFileError(f"{folder} holds several models, {', '.join(told)}: choose one with {by}")
    if list(found) == [UNKNOWN]:
        chosen = UNKNOWN
    if chosen not in found:
        raise VectorFileError(f"{folder} holds nothing of {chosen!r}: it has {', '.join(told)}")
    return chosen, found[chosen]


def _tensor(file: Path, dims: int, expected: str) -> Tensor:
    try:
        return check_tensor(load(file, expected), dims)
    except VectorFileError as error:
        named = str(error) if str(error).startswith(str(file)) else f"{file} {error}"
        raise VectorFileError(named) from None


def _check_alike(folder: Path, tensors: dict[int, Tensor]) -> None:
    try:
        check_alike(tensors)
    except VectorFileError as error:
        raise VectorFileError(f"{folder} {error}") from None
