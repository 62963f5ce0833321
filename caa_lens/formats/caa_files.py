"""The files of the CAA authors' repository: one bare tensor a layer, a folder a behavior.

    vectors/sycophancy/vec_layer_13_Llama-2-7b-chat-hf.pt             [d_model]
    activations/sycophancy/activations_pos_13_Llama-2-7b-chat-hf.pt   [pair d_model], and activations_neg_...

Layers are 0-based blocks and the tensors live at the block's output, so theirs is our layer. The model is the last part
of its name, and one folder usually holds several models. A `.pt` file is a pickle, which can run code when it is read;
only tensors are let in here. Source: nrimsky/CAA, behaviors.py and generate_vectors.py.
"""

import pickle
import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.atomic_files import write_atomically
from caa_lens.provenance import Provenance
from caa_lens.storage import VectorFileError
from caa_lens.vectors import SteeringVector, SteeringVectors

VECTOR_NAME = "vec_layer_{layer}_{model}.pt"
ACTIVATIONS_NAME = "activations_{side}_{layer}_{model}.pt"


def read_caa(path: str | Path, *, model: str | None = None) -> SteeringVectors:
    """One model's vectors from a folder of the authors' files, or the one layer of a single file.

    Args:
        path: the folder, whose name is taken for the behavior, or a file in it.
        model: which model of a folder that holds several, e.g. `meta-llama/Llama-2-7b-chat-hf`. Files are named after
            the last part; the vectors get the name that is given.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        VectorFileError: if there are no such files, several models and none chosen, or a file is damaged, holds
            anything but one finite 1-D floating-point tensor, or has another width or dtype than the others.
    """
    path = Path(path)
    folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
    if only is not None and not path.is_file():
        raise FileNotFoundError(f"nothing at {path}: expected a folder of {VECTOR_NAME} files, or one of them")
    found, files = _files_of(folder, VECTOR_NAME, model=model, only=only)
    behavior = folder.resolve().name
    provenance = Provenance(
        model=model or found,
        behavior=behavior,
        normalisation="unknown",
        expression=behavior,
        details={"source": f"CAA files, {path.name}"},
    )
    tensors = {layer: _load_tensor(file, dims=1) for layer, file in files.items()}
    _check_alike(folder, tensors)
    return SteeringVectors.from_vectors(
        SteeringVector(direction=tensor, layer=layer, provenance=provenance) for layer, tensor in tensors.items()
    )


def write_caa(vectors: SteeringVectors, folder: str | Path) -> Path:
    """Write one file a layer, as the authors' code reads them; name the folder after the behavior.

    float32 and float16 are kept, anything else becomes float32. Each file is written atomically.

    Raises:
        ValueError: if the folder already holds other layers of this model, which would look like one set with these.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: CAA files go into a folder, one file a layer")
    model = vectors.provenance.model.split("/")[-1]
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
    folder = Path(folder)
    sides = {}
    for side in ("pos", "neg"):
        model, files = _files_of(folder, ACTIVATIONS_NAME.replace("{side}", side), model=model)
        sides[side] = {layer: _load_tensor(file, dims=2) for layer, file in files.items()}
        _check_alike(folder, sides[side])
    shapes = [{layer: tuple(tensor.shape) for layer, tensor in side.items()} for side in sides.values()]
    if shapes[0] != shapes[1]:
        raise VectorFileError(f"{folder}: the positive activations have shapes {shapes[0]}, the negative {shapes[1]}")
    return {layer: (sides["pos"][layer], sides["neg"][layer]) for layer in sides["pos"]}


def _models_in(folder: Path, name: str, only: str | None = None) -> dict[str, dict[int, Path]]:
    """Files of a folder by model and layer, layers ascending."""
    pattern = re.compile(name.replace(".", r"\.").format(layer=r"(0|[1-9]\d*)", model="(.+)"))
    found: dict[str, dict[int, Path]] = {}
    for file in folder.glob("*.pt"):
        match = pattern.fullmatch(file.name)
        if match and only in (None, file.name):
            found.setdefault(match[2], {})[int(match[1])] = file
    return {model: dict(sorted(files.items())) for model, files in sorted(found.items())}


def _files_of(folder: Path, name: str, *, model: str | None, only: str | None = None) -> tuple[str, dict[int, Path]]:
    """The chosen model's name and its files by layer."""
    found = _models_in(folder, name, only)
    if not found and only is not None:
        raise VectorFileError(
            f"{folder / only} is not called {name}, which says its layer and model: "
            "rename it; or, if torch.save wrote this library's vectors, write them with vectors.save(...) instead"
        )
    if not found:
        behaviors = sorted({file.parent.name for file in folder.glob("*/*.pt")})
        raise VectorFileError(
            f"{folder} holds no {name}"
            + (f": choose one of the folders in it, {', '.join(behaviors)}" if behaviors else "")
        )
    if model is None and len(found) > 1:
        raise VectorFileError(f"{folder} holds several models, {', '.join(found)}: choose one with model=...")
    chosen = next(iter(found)) if model is None else model.split("/")[-1]
    if chosen not in found:
        raise VectorFileError(f"{folder} holds nothing of {chosen!r}: it has {', '.join(found)}")
    return chosen, found[chosen]


def _load_tensor(file: Path, *, dims: int) -> Tensor:
    expected = f"expected one bare tensor of finite numbers, {['[d_model]', '[pair, d_model]'][dims - 1]}"
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise VectorFileError(
            f"{file} is damaged, or holds objects whose reading could run code, so it was not read: {expected}"
        ) from None
    except Exception as error:  # a damaged archive fails in many ways
        raise VectorFileError(f"{file} is damaged or not a PyTorch file ({error}): {expected}") from None
    if not isinstance(tensor, Tensor):
        raise VectorFileError(f"{file} holds a {type(tensor).__name__}: {expected}")
    if tensor.ndim != dims or not tensor.is_floating_point():
        raise VectorFileError(f"{file} holds {list(tensor.shape)} numbers in {tensor.dtype}: {expected}")
    if not bool(torch.isfinite(tensor).all()):
        raise VectorFileError(f"{file} holds NaN or infinite numbers: {expected}")
    return tensor.detach()


def _check_alike(folder: Path, tensors: dict[int, Tensor]) -> None:
    kinds = {layer: f"d_model={t.shape[-1]} in {t.dtype}".replace("torch.", "") for layer, t in tensors.items()}
    first = next(iter(kinds))
    for layer, kind in kinds.items():
        if kind != kinds[first]:
            raise VectorFileError(
                f"{folder}: layer {first} has {kinds[first]}, but layer {layer} has {kind}: expected files of one run"
            )
