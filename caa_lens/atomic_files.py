"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    The file reaches the disk before it is renamed, and the rename before this returns, so that not even a machine that
    crashes leaves an empty file under the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp, which makes files that only their owner can read; vectors are shared.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        write(temporary)
        _to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        with contextlib.suppress(OSError):  # some network file systems refuse; what is written is written
            _to_disk(path.parent)
    return path


def check_writable(path: Path) -> None:
    """Raises an `OSError` that says why if a file could not be made at `path`; makes nothing."""
    path = path.expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: there is a folder of that name")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: there is no permission to write in {folder}")


def _to_disk(path: Path) -> None:
    """Return when what the system holds of a file, or of a folder's list of names, is on the disk."""
    writable = os.name != "posix"  # Windows asks for that, and POSIX has no such handle of a folder
    handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
