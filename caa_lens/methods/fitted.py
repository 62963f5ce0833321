"""What every fitted method is: layers, tensors, provenance and settings, and the interventions that they make.

    fitted.interventions(strength)     what is done to the stream, for generate, steer, score_answers, ...
    fitted.at([14])                    the same at some of its layers
    fitted.save(path)                  one safetensors file; load gives the same back, to the bit

The file holds the tensors; its metadata holds all else as JSON, and under `checksum`, in hexadecimal,

    sha256(the other metadata as JSON with sorted keys, then each tensor's bytes, sorted by name)
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter
from torch import Tensor

from caa_lens.arguments import check_list
from caa_lens.atomic_files import write_atomically
from caa_lens.engine.positions import Positions
from caa_lens.provenance import HOOK_POINT, Provenance, layer_ranges
from caa_lens.steering.interventions import FITTED_AT, POSITIONS, Intervention, place_of
from caa_lens.vectors.storage import sorted_metadata

FORMAT = "1"
_F = TypeVar("_F", bound="Fitted")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A fitted method.

    Attributes:
        layers: the 0-based blocks that it acts at, together, ascending; tensors by layer are in this order.
        provenance: model, data and their hash, behavior.
        settings: all settings of the fit, as texts by name.
    """

    layers: tuple[int, ...]
    provenance: Provenance = field(default_factory=Provenance)
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be some, distinct and ascending, got {self.layers}")
        for name in self._by_layer():
            if len(getattr(self, name)) != len(self.layers):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} rows for {len(self.layers)} layers, "
                    f"{layer_ranges(self.layers)}: give a row for each"
                )

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "caa"
    ) -> tuple[Intervention, ...]:
        """What is done to the stream at a strength.

        Args:
            positions: "caa" (from the end of the instruction on), "original" (the method's own), any name of
                `caa_lens.steering.placing`, a span or a mask.

        Raises:
            ValueError: for positions that the method cannot have.
        """
        raise NotImplementedError

    def at(self: _F, layers: Sequence[int]) -> _F:  # not Self, which beartype takes in no method
        """The same at some of its layers only.

        Raises:
            IndexError: for a layer that it was not fitted at.
        """
        chosen = tuple(sorted(set(check_list("layers", layers, int))))
        if missing := [layer for layer in chosen if layer not in self.layers]:
            raise IndexError(
                f"{type(self).__name__} was not fitted at layer {missing[0]}: it has layers {layer_ranges(self.layers)}"
                " (0-based blocks); fit it there"
            )
        if not chosen:
            raise ValueError("no layers given: expected at least one")
        rows = [self.layers.index(layer) for layer in chosen]
        parts: dict[str, Any] = {name: getattr(self, name)[rows] for name in self._by_layer()}
        return dataclasses.replace(self, layers=chosen, **parts)

    @property
    def behavior(self) -> str:
        return self.provenance.behavior

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all.

        Raises:
            ValueError: for another ending, or what would not be read back as it is.
        """
        from safetensors.torch import save

        path = _fitted_path(path)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _tensors(type(self))}
        about = {name: _plain(name, getattr(self, name), hint) for name, hint in _others(type(self)).items()}
        metadata = {
            "caa_lens_method": FORMAT,
            "kind": type(self).__name__,
            "library_versions": f"caa-lens {importlib.metadata.version('caa-lens')}, torch {torch.__version__}",
            "about": json.dumps(about, sort_keys=True),
        }
        metadata["checksum"] = _checksum(metadata, tensors)
        data = sorted_metadata(save(tensors, metadata))
        return write_atomically(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls: type[_F], path: str | Path) -> _F:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for another method's file, a newer format, or a damaged file.
        """
        kind, about, tensors = read_fitted(path)
        if kind != cls.__name__:
            raise ValueError(f"{path} holds a {kind}, expected a {cls.__name__}: {kind}.load reads it")
        try:
            hints = _others(cls)
            parts: dict[str, Any] = {name: tensors[name] for name in _tensors(cls)}
            parts |= {name: TypeAdapter(hint).validate_json(json.dumps(about[name])) for name, hint in hints.items()}
            return cls(**parts)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not what a {cls.__name__} is saved with: {str(error)[:200]}") from None

    def _by_layer(self) -> list[str]:
        """Names of the tensors whose first axis is the layer."""
        return _tensors(type(self))

    def _place(self, positions: str | Positions, *, original: str, cannot: Mapping[str, str] = {}) -> Any:
        """Positions as an intervention takes them; `cannot` says why some names are refused."""
        if not isinstance(positions, str):
            return positions
        name = original if positions == "original" else positions
        if name not in POSITIONS:
            expected = ", ".join(("original", *POSITIONS))
            raise ValueError(f"unknown positions {positions!r}: expected one of {expected}, or a span (first, stop)")
        if name == "front" != original:
            cannot = {**cannot, "front": "it has nothing that differs by position; take 'prompt', or a span (0, n)"}
        if name in cannot:
            raise ValueError(f"{type(self).__name__} cannot act at positions={positions!r}: {cannot[name]}")
        return name

    def _fitted_at(self, layer: int, site: str = HOOK_POINT) -> Provenance:
        """What its parameters of one layer were computed from: they are refused anywhere else."""
        details = {**self.provenance.details, FITTED_AT: place_of(layer, site)}
        return dataclasses.replace(self.provenance, details=details)

    def __repr__(self) -> str:
        about = self.provenance
        layers = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {layer_ranges(self.layers)}"
        return f"{type(self).__name__}({about.behavior}, {layers}, {self._in_words()}model={about.model!r})"

    def _in_words(self) -> str:
        """What is special to it, for its one line; ends with a comma."""
        return ""


def load_fitted(path: str | Path) -> Fitted:
    """Read a file that any fitted method's `save` wrote; errors as those of `Fitted.load`."""
    kind = read_fitted(path)[0]
    for one in _kinds():
        if one.__name__ == kind:
            return one.load(path)
    raise ValueError(f"{path} holds a {kind}, which this version does not know: update caa_lens")


def _kinds() -> list[type[Fitted]]:
    import caa_lens.methods as room

    found = [getattr(room, name) for name in dir(room)]
    return [one for one in found if isinstance(one, type) and issubclass(one, Fitted)]


def read_fitted(path: str | Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Kind, plain parts and tensors of a file that `Fitted.save` wrote; errors as those of `Fitted.load`."""
    from safetensors import SafetensorError, safe_open

    path = _fitted_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: a fitted method is saved with .save({path.name!r})")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({str(error)[:100]}): save it again") from None
    version = metadata.get("caa_lens_method")
    if version is None:
        raise ValueError(f"{path} holds no fitted method: read_vectors reads vectors, and load_model models")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, this version reads {FORMAT}: update caa_lens")
    if metadata.pop("checksum", None) != _checksum(metadata, tensors):
        raise ValueError(f"{path} is damaged, or was edited: its checksum is not that of its contents; save it again")
    return metadata["kind"], json.loads(metadata["about"]), tensors


def _fitted_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"fitted methods are saved as .safetensors, got {path.name!r}")
    return path


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hints(kind: type[Fitted]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def _tensors(kind: type[Fitted]) -> list[str]:
    """The names of those that jaxtyping says are tensors."""
    return [name for name, hint in _hints(kind).items() if hasattr(hint, "array_type")]


def _others(kind: type[Fitted]) -> dict[str, Any]:
    return {name: hint for name, hint in _hints(kind).items() if not hasattr(hint, "array_type")}


def _plain(name: str, value: Any, hint: Any) -> Any:
    try:
        return TypeAdapter(hint).dump_python(value, mode="json", warnings="error")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} cannot be saved: {str(error)[:200]}") from None
