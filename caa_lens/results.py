"""What every result is: a tidy frame, and the settings and provenance that its numbers depend on.

    result.frame        one row a measurement
    result.settings     what else the numbers depend on, as texts by name
    result.provenance   where vectors and activations came from, by what they are
    result.summary()    what to read first, as a small frame
    result.plot()       what to see first, as a figure; also what Jupyter shows
    result.save(path)   the frame as parquet and all else as JSON beside it; `load` gives the same back, to the bit

A kind of result is a frozen dataclass that adds what is special to it. Its own fields are saved by their annotations:
numbers, texts, paths, tuples, mappings and dataclasses of them in the JSON, tensors in a safetensors file beside it.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pandas as pd
import plotly.graph_objects as go
from pydantic import TypeAdapter
from safetensors import SafetensorError

from caa_lens.arguments import describe
from caa_lens.atomic_files import check_writable, write_atomically
from caa_lens.extras import needed_for
from caa_lens.provenance import Provenance

FORMAT = 1
R = TypeVar("R", bound="Result")
FRAME, ABOUT, TENSORS = ".parquet", ".json", ".safetensors"
# What pandas, pyarrow, pydantic and safetensors raise of data that they cannot hold or read.
_UNFIT = (AssertionError, ValueError, TypeError, OverflowError, NotImplementedError, RecursionError, SafetensorError)


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

    def plot(self) -> go.Figure:
        """What to see first."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the frame to a `.parquet` file and all else beside it, each file whole or not at all.

        Raises:
            ValueError: for another ending, what would not be read back as it is, or a file of that name beside it that
                is no result's. Nothing is written then.
            OSError: if a file cannot be made there.
        """
        path = check_result_path(path)
        files = {FRAME: _encoded(self.frame)}
        if tensors := {name: getattr(self, name) for name in _tensors(type(self))}:
            from safetensors.torch import save  # torch, for the few that have tensors

            files[TENSORS] = save({name: each.detach().cpu().contiguous() for name, each in tensors.items()})
            _refuse_others(path, TENSORS)
        about = {
            "caa_lens_result": FORMAT,
            "kind": type(self).__name__,
            "caa_lens": importlib.metadata.version("caa-lens"),
            "sha256": {ending: hashlib.sha256(data).hexdigest() for ending, data in files.items()},
            "settings": _plain("settings", self.settings, Mapping[str, str]),
            "provenance": _plain("provenance", self.provenance, Mapping[str, Provenance]),
            "special": {name: _plain(name, getattr(self, name), hint) for name, hint in _special(type(self)).items()},
        }
        about["checksum"] = _checksum(about)
        try:
            text = json.dumps(about, indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text of this result is not valid Unicode ({error}): mend it, then save") from None
        # The JSON first: whatever breaks off then, the other files are not those that it speaks of.
        for ending, data in {ABOUT: text, **files}.items():
            write_atomically(path.with_suffix(ending), partial(Path.write_bytes, data=data))
        return path

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:  # not Self, which beartype takes in no method
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if one of the files is not there.
            ValueError: for another kind of result, a newer format, or a file that is damaged or not the others'.
        """
        path = _parquet_path(path)
        beside, names, endings = path.with_suffix(ABOUT), _tensors(cls), cls.endings()
        for file in map(path.with_suffix, endings):
            if not file.is_file():
                every = " and ".join(path.with_suffix(ending).name for ending in endings)
                raise FileNotFoundError(f"no file {file}: a saved {cls.__name__} is {every}")
        about = _about(beside)
        if (kind := about.get("kind")) != cls.__name__:
            raise ValueError(f"{path} holds a {kind}, expected a {cls.__name__}: {kind}.load reads it")
        files = {ending: path.with_suffix(ending).read_bytes() for ending in endings if ending != ABOUT}
        try:
            for ending, data in files.items():
                if about["sha256"][ending] != hashlib.sha256(data).hexdigest():
                    raise ValueError(f"{path.with_suffix(ending).name} is not the one it was written with, or damaged")
            parts = {
                "frame": _decoded(files[FRAME]),
                "settings": _of_plain(about["settings"], Mapping[str, str]),
                "provenance": _of_plain(about["provenance"], Mapping[str, Provenance]),
                **{name: _of_plain(_saved(cls, about, name), hint) for name, hint in _special(cls).items()},
            }
            if names:
                from safetensors.torch import load

                tensors = load(files[TENSORS])
                parts |= {name: tensors[name] for name in names}
        except KeyError as error:
            raise ValueError(f"{beside} is not what a {cls.__name__} is saved with: {error} is missing") from None
        except (*_UNFIT, AttributeError) as error:
            raise ValueError(f"{beside} is not what a {cls.__name__} is saved with: {_one_line(error)}") from None
        if about.pop("checksum", None) != _checksum(about):
            raise ValueError(
                f"{beside} is damaged, or was edited: its checksum is not that of its contents; save it again"
            )
        return cls(**parts)

    @classmethod
    def endings(cls) -> tuple[str, ...]:
        """Of the files that a saved result of this kind is."""
        return FRAME, ABOUT, *([TENSORS] if _tensors(cls) else [])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter a result shows its figure."""
        return self.plot()._repr_mimebundle_(include, exclude)


def check_result_path(path: str | Path) -> Path:
    """Where a result is to be saved, looked at before the work is done.

    Raises:
        ValueError: for another ending than `.parquet`, or files of these names that are no result's.
        OSError: if a file cannot be made there.
    """
    path = _parquet_path(path)
    check_writable(path)
    check_writable(path.with_suffix(ABOUT))
    _refuse_others(path, ABOUT)
    _refuse_others(path, FRAME)
    return path


def _refuse_others(path: Path, ending: str) -> None:
    """A saved result takes the place of a saved result only: what lies beside may be somebody's pairs or vectors."""
    file = path.with_suffix(ending)
    try:
        ours = not file.exists() or ending in {ABOUT, *_about(path.with_suffix(ABOUT))["sha256"]}
    except (ValueError, KeyError, TypeError, OSError):
        ours = False
    if not ours:
        raise ValueError(
            f"{file} was not written by a result's save, and stays as it is: choose another name than {path.name}, or "
            "delete it"
        )


def _checksum(about: Mapping[str, Any]) -> str:
    """Of all that the JSON says beside it, so that a number that was changed there is told of."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _fields(kind: type[Result]) -> dict[str, Any]:
    """The fields that a kind of result adds, with their types."""
    shared = {one.name for one in dataclasses.fields(Result)}
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.name not in shared}


def _tensors(kind: type[Result]) -> list[str]:
    """The names of those that jaxtyping says are tensors."""
    return [name for name, hint in _fields(kind).items() if hasattr(hint, "array_type")]


def _special(kind: type[Result]) -> dict[str, Any]:
    """All others."""
    return {name: hint for name, hint in _fields(kind).items() if not hasattr(hint, "array_type")}


def _saved(kind: type[Result], about: Mapping[str, Any], name: str) -> Any:
    """A saved field; a file from before there was that field has its default."""
    default = next(one.default for one in dataclasses.fields(kind) if one.name == name)
    return about["special"][name] if default is dataclasses.MISSING else about["special"].get(name, default)


def _plain(name: str, value: Any, hint: Any) -> Any:
    """A value as JSON holds it; refused if it is not of its annotated type."""
    try:
        return TypeAdapter(hint).dump_python(value, mode="json", warnings="error")
    except (ValueError, TypeError) as error:
        expected = hint.__name__ if isinstance(hint, type) else hint
        raise ValueError(f"{name} cannot be saved, expected {expected}: {_one_line(error)}") from None


def _of_plain(value: Any, hint: Any) -> Any:
    return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)


def _encoded(frame: pd.DataFrame) -> bytes:
    """The frame as parquet; refused if it would be read back otherwise."""
    _check_pyarrow()
    buffer = io.BytesIO()
    try:
        if json.loads(json.dumps(frame.attrs)) != frame.attrs:
            raise ValueError("its attrs are not plain")
        frame.to_parquet(buffer, index=False)
        pd.testing.assert_frame_equal(_decoded(buffer.getvalue()), frame, check_exact=True)
    except _UNFIT as error:
        raise ValueError(
            f"this frame would not be read back as it is ({_one_line(error)}): keep to numbers and texts, columns "
            "called by texts, and a plain index (frame.reset_index(drop=True))"
        ) from None
    return buffer.getvalue()


def _decoded(data: bytes) -> pd.DataFrame:
    _check_pyarrow()
    return pd.read_parquet(io.BytesIO(data))


def _check_pyarrow() -> None:
    with needed_for("results' files"):
        import pyarrow  # noqa: F401  # pandas writes and reads parquet with it


def _about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}): delete it and save the result again") from None
    if not isinstance(about, dict) or "caa_lens_result" not in about:
        raise ValueError(f"{file} was not written by a result's save: it holds {describe(about)}")
    if about["caa_lens_result"] != FORMAT:
        raise ValueError(
            f"{file} has format {about['caa_lens_result']!r}, this version reads {FORMAT}: update caa_lens"
        )
    return about


def _parquet_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != FRAME:
        raise ValueError(
            f"results are saved as {FRAME}, got {path.name!r}; a table is written by .frame.to_csv(...), a page "
            "by .plot().write_html(...)"
        )
    return path


def _one_line(error: BaseException) -> str:
    """What pandas, pyarrow and pydantic say in many lines, without the web addresses."""
    lines = (line.strip() for line in str(error).splitlines())
    return "; ".join(line for line in lines if line and not line.startswith("For further information"))[:300]
