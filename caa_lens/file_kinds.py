"""What a file is, told by what is in it: a file of the wrong kind is called by its name, with what helps.

A reader asks `look(path)` for the kind, and gives what it cannot read to `what_is`. Nothing is unpickled or unpacked
here, and of a large file only the beginning is read.
"""

import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path

MAX_BYTES = 2**30  # a hundred layers of a width of ten thousand in float64 take 8 MB
_START = 2**20
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
_OTHER = {
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"%PDF": "a PDF",
    b"PAR1": "a parquet table",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "a SQLite database",
    b"\x7fELF": "a program",
}
_UTF16 = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_WEIGHTS = re.compile(
    r"^(weight|bias)$|(^|\.)(lm_head|wte|embed\w*|tok_embeddings|\w*proj|\w*norm|ln_\w+|attn|mlp)\b.*\.(weight|bias)$"
)


class VectorFileError(ValueError):
    """A file that is not a readable set of steering vectors."""


def expanded(path: str | Path) -> Path:
    """The path with `~` as the home folder; a `~name` that is nobody's home is the name of a file."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def contents(path: Path, expected: str = "a file of steering vectors") -> bytes:
    """All bytes of a file.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        VectorFileError: if it is no plain file, larger than any steering vectors, or may not be read.
    """
    size = _size(path, expected)
    if size > MAX_BYTES:
        kind, words = what_is(_read(path, _START), size)
        remedy = "; a model is loaded with load_model" if kind else ""
        raise VectorFileError(
            f"{path} is larger than {MAX_BYTES} bytes, so these are no steering vectors: it is {words}{remedy}"
        )
    return _read(path, size)


def look(path: Path, expected: str = "a file of steering vectors") -> tuple[str, str]:
    """The kind of what is at a path, as `what_is`, or "folder"; raises as `contents`."""
    if path.is_dir():
        return "folder", f"a folder, which {what_it_holds(path)}"
    size = _size(path, expected)
    start = _read(path, size if size <= MAX_BYTES else _START)
    return what_is(start, size)


def what_is(data: bytes, size: int | None = None) -> tuple[str, str]:
    """The kind of a file, "" if no reader of vectors takes it, and the words to follow `it is`, with what helps.

    Kinds are "safetensors", "gguf", "torch", "npy", "npz" and "json" (an object that may be vllm-lens').

    Args:
        data: all of the file, or the beginning of a large one.
        size: of the whole file in bytes.
    """
    size = len(data) if size is None else size
    for told in (*_NO_TEXT, _text):
        if found := told(data, size):
            return found
    return "", f"of a kind that is not known here: it begins with the bytes {data[:8].hex(' ')}"


def other_than_text(data: bytes) -> str:
    """The words of `what_is` for all of a file that is no text in UTF-8; "" for one that may be."""
    for told in _NO_TEXT:
        if found := told(data, len(data)):
            return found[1]
    return ""


def what_it_holds(folder: Path) -> str:
    """`holds 3 files: a, b, c`, for an error that says what is in a folder."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not names:
        return "holds nothing"
    n_folders = sum(name.endswith("/") for name in names)
    counts = [_n(n, what) for n, what in ((len(names) - n_folders, "file"), (n_folders, "folder")) if n]
    return f"holds {' and '.join(counts)}: {some(names)}"


def some(names: Iterable[str], shown: int = 4) -> str:
    """The first names of many, with how many more there are."""
    every = [printable(name) for name in names]
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


def printable(text: str, most: int = 80) -> str:
    """A text of somebody else's file on one line, without codes that a terminal obeys."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _n(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def are_weights(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of a model's weights."""
    return any(_WEIGHTS.search(name) for name in names)


# ---- reading ------------------------------------------------------------------------------------------------------


def _size(path: Path, expected: str) -> int:
    try:
        status = path.stat()  # of what a link leads to
    except (FileNotFoundError, NotADirectoryError, ValueError):
        to = f": it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        raise FileNotFoundError(f"nothing at {path}{to}: expected {expected}") from None
    except OSError as error:
        raise VectorFileError(f"{path} cannot be read ({error.strerror or error}): expected {expected}") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise VectorFileError(f"{path} is {what}: expected {expected}")
    return status.st_size


def _read(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise VectorFileError(f"{path} cannot be read ({error.strerror or error})") from None


# ---- one kind after another ---------------------------------------------------------------------------------------


def _nothing(data: bytes, size: int) -> tuple[str, str] | None:
    if not data:
        return "", "empty, cut off or damaged when it was written or downloaded: get it again"
    if not data.strip(b"\0"):
        return "", f"{size} zero bytes, damaged when it was written or downloaded: get it again"
    return None


def _download(data: bytes, size: int) -> tuple[str, str] | None:
    if data.startswith(b"version https://git-lfs"):
        return "", (
            "a git-lfs pointer, a few lines of text in the place of a file that was not downloaded: run `git lfs pull` "
            "where it was cloned, or download the file itself"
        )
    start = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")):
        title = re.search(rb"<title[^>]*>([^<]*)", data[:_START], re.IGNORECASE)
        called = f" called '{printable(title[1].decode(errors='replace').strip())}'" if title else ""
        return "", f"an HTML page{called}, saved in the place of a file: download the file itself, by its 'raw' link"
    return None


def _packed(data: bytes, size: int) -> tuple[str, str] | None:
    for magic, name in _PACKED.items():
        if data.startswith(magic):
            return "", f"packed by {name}: unpack it first"
    if data[257:262] == b"ustar":
        return "", "a tar archive: unpack it first, and give the file or folder in it"
    return None


def _archive(data: bytes, size: int) -> tuple[str, str] | None:
    if not data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return None
    if len(data) < size:
        return "torch", "a zip archive, maybe of a model's weights in PyTorch's format"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except Exception as error:  # a damaged archive fails in many ways
        return "", f"a damaged zip archive ({error}), as PyTorch's and numpy's files are: get it again"
    if any(re.fullmatch(r"([^/]+/)?data\.pkl", name) for name in names):
        return "torch", "a file of torch.save"
    if names and all(name.endswith(".npy") for name in names):
        return "npz", "a file of numpy.savez"
    if "[Content_Types].xml" in names:
        return "", "an Office document"
    return "", f"a zip archive of {_n(len(names), 'file')} ({some(names)}): unpack it first, and give what is in it"


def _binary(data: bytes, size: int) -> tuple[str, str] | None:
    if data.startswith(b"GGUF"):
        return "gguf", "a GGUF file"
    if data.startswith(b"\x93NUMPY"):
        return "npy", "a file of numpy.save"
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < max(size, 2**32):
        return "safetensors", "a safetensors file"  # it begins with the header's length, maybe 0x80 as pickles do
    if data[:1] == b"\x80" and data[1:2] <= b"\5":
        return "torch", "a pickle, as PyTorch's early versions wrote"
    for magic, name in _OTHER.items():
        if data.startswith(magic):
            return "", name
    return None


def _wide_text(data: bytes, size: int) -> tuple[str, str] | None:
    for mark, name in _UTF16.items():
        if data.startswith(mark):
            return "", f"text in {name}: save it as UTF-8"
    if len(data) > 1 and b"\0" in data[:2] and 2 * data[:256].count(b"\0") == len(data[:256]):
        return "", "text in UTF-16: save it as UTF-8"
    return None


def _text(data: bytes, size: int) -> tuple[str, str] | None:
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # of a large file there is the beginning only
            return None
        text = data[: error.start].decode("utf-8")
    if text.lstrip().startswith(("{", "[")):
        return _json(text)
    if "\0" in text[:1024]:
        return None
    return "", f"text that begins with '{printable(text.strip(), 60)}'"


def _json(text: str) -> tuple[str, str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = json.loads(text.lstrip().partition("\n")[0])  # maybe one object a line
        except (ValueError, RecursionError):
            if '"activations"' in text or '"layer_indices"' in text:
                return "json", "damaged JSON of vllm-lens"
            value = {"question": ""} if '"question"' in text[:200] else None
    row = value[0] if isinstance(value, list) and value else value
    if isinstance(row, dict) and "question" in row:
        return "", (
            "a file of contrast pairs, expected steering vectors: pairs are loaded with ContrastSet.load; commands "
            "that take both take the pairs first"
        )
    if value is None:
        return "", "damaged JSON, cut off when it was written or downloaded: get it again"
    if not isinstance(value, dict):
        return "", f"JSON, a list of {len(value)} and no object of vllm-lens" if isinstance(value, list) else "JSON"
    if "activations" in value or "layer_indices" in value:
        return "json", "JSON of vllm-lens"
    if "weight_map" in value or "model_type" in value:
        return "", "the JSON of a model's configuration or weights: models are loaded with load_model, by their folder"
    return "", f"JSON with the keys {some(value) or '(none)'}, expected activations and layer_indices of vllm-lens"


_NO_TEXT = (_nothing, _download, _packed, _archive, _binary, _wide_text)
