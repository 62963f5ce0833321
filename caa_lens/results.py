"""What every result is: a tidy frame, and the settings and provenance that its numbers depend on.

    result.frame        one row a measurement
    result.settings     what else the numbers depend on, as texts by name
    result.provenance   where vectors and activations came from, by what they are
    result.summary()    what to read first, as a small frame
    result.plot()       what to see first, as a figure; also what Jupyter shows
    result.save(path)   the frame as parquet and all else as JSON beside it; `load` gives the same back, to the bit

A kind of result is a frozen dataclass that adds what is special to it. Its own fields are saved by their annotations:
numbers, texts, tuples, mappings and dataclasses of them.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import pandas as pd

from caa_lens.arguments import describe
from caa_lens.atomic_files import write_atomically
from caa_lens.provenance import Provenance

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMAT = 1
Kind = TypeVar("Kind", bound="Result")  # `Self` is refused by the checks of types in tests


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """A finished measurement.

    Attributes:
        frame: one row a measurement; each kind of result says which columns.
        settings: what else the numbers depend on (model, dtype, data and its hash, ...).
        provenance: what the vectors and activations were computed from, by what they are: `{"vectors": ...}`.
    """

    frame: pd.DataFrame
    settings: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Provenance] = field(default_factory=dict)

    def summary(self) -> pd.DataFrame:
        """What to read first."""
        raise NotImplementedError

    def plot(self) -> "go.Figure":
        """What to see first."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the frame to a `.parquet` file and all else to a `.json` file beside it, each whole or not at all.

        Raises:
            ValueError: for another ending, or a frame that would not be read back as it is. Nothing is written then.
        """
        path = _parquet_path(path)
        data = _encoded(self.frame)
        about = {
            "caa_lens_result": FORMAT,
            "kind": type(self).__name__,
            "caa_lens": importlib.metadata.version("caa-lens"),
            "sha256": hashlib.sha256(data).hexdigest(),
            "settings": dict(self.settings),
            "provenance": {name: _plain(one, Provenance) for name, one in self.provenance.items()},
            "special": {name: _plain(getattr(self, name), hint) for name, hint in _special(type(self)).items()},
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        write_atomically(path, lambda file: file.write_bytes(data))
        write_atomically(path.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))
        return path

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if one of the two files is not there.
            ValueError: for another kind of result, a newer format, or a file that is damaged or not the other's.
        """
        path = _parquet_path(path)
        beside = path.with_suffix(".json")
        for file in (path, beside):
            if not file.is_file():
                raise FileNotFoundError(f"no file {file}: a saved result is two files, {path.name} and {beside.name}")
        data = path.read_bytes()
        about = _about(beside)
        if about["kind"] != cls.__name__:
            raise ValueError(
                f"{path} holds a {about['kind']}, expected a {cls.__name__}: {about['kind']}.load reads it"
            )
        if about["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError(
                f"{path} is not the frame that {beside.name} was written with, or is damaged: save it again"
            )
        try:
            special = {name: _of_plain(about["special"][name], hint) for name, hint in _special(cls).items()}
            provenance = {name: _of_plain(one, Provenance) for name, one in about["provenance"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{beside} is not what a {cls.__name__} was saved with ({error}): save it again") from None
        return cls(frame=_decoded(data), settings=dict(about["settings"]), provenance=provenance, **special)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter a result shows its figure."""
        return self.plot()._repr_mimebundle_(include, exclude)


def _special(kind: type[Result]) -> dict[str, Any]:
    """The fields that a kind of result adds, with their types."""
    shared = {one.name for one in dataclasses.fields(Result)}
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.name not in shared}


def _plain(value: Any, hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint).dump_python(value, mode="json", warnings="error")


def _of_plain(value: Any, hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint).validate_python(value)


def _encoded(frame: pd.DataFrame) -> bytes:
    """The frame as parquet; refused if it would be read back otherwise."""
    buffer = io.BytesIO()
    try:
        frame.to_parquet(buffer, index=False)
        pd.testing.assert_frame_equal(_decoded(buffer.getvalue()), frame, check_exact=True)
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"this frame cannot be saved as it is ({error}): keep to numbers and texts, and a plain index")
    return buffer.getvalue()


def _decoded(data: bytes) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(data))


def _about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}): save the result again") from None
    if not isinstance(about, dict) or "caa_lens_result" not in about:
        raise ValueError(f"{file} was not written by a result's save: it holds {describe(about)}")
    if about["caa_lens_result"] != FORMAT:
        raise ValueError(
            f"{file} has format {about['caa_lens_result']!r}, this version reads {FORMAT}: update caa_lens"
        )
    return about


def _parquet_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix.lower() != ".parquet":
        raise ValueError(f"results are saved as .parquet, got {path.name!r}")
    return path
