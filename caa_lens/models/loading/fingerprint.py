"""What a model is, whatever it is called: one hash over the contents of all files that loading it reads."""

import hashlib
from functools import lru_cache
from pathlib import Path

from caa_lens.models.loading.checkpoints import INDEX_NAME
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.models.loading.hub import CONFIG_FILES, WEIGHT_FILES, download


def model_files(name_or_path: str | Path, revision: str | None = None) -> list[Path]:
    """The files that `load_model` reads of a model, by name in order; a hub model is downloaded, as for loading it.

    Raises:
        FileNotFoundError: there is no such folder or GGUF file, or it holds no weights.
        FileNotFoundError, PermissionError, ConnectionError: as `hub.download`, of a hub id.
    """
    path = Path(name_or_path).expanduser()
    if str(name_or_path) == "demo":
        folder = demo_model_path()
    elif path.is_file() and path.suffix == ".gguf":
        return [path]
    elif path.is_dir():
        folder = path
    elif str(name_or_path).count("/") == 1 and path.suffix != ".gguf" and not path.exists():
        folder = download(str(name_or_path), CONFIG_FILES + WEIGHT_FILES, revision)
    else:
        raise FileNotFoundError(
            f"there is no model {str(name_or_path)!r} here: expected 'demo', a hub id ('owner/name'), a folder with "
            "config.json and safetensors, or a .gguf file"
        )
    one_file = folder / "model.safetensors"  # goes before shards, as in loading
    patterns = [one_file.name] if one_file.is_file() else [INDEX_NAME, "model*.safetensors"]
    weights = {file for pattern in patterns for file in folder.glob(pattern)}
    if not weights:
        raise FileNotFoundError(f"{folder} holds no safetensors: expected a model's folder")
    texts = {file for pattern in CONFIG_FILES for file in folder.glob(pattern)}
    return sorted(weights | {file for file in texts if file.is_file()})


def model_fingerprint(name_or_path: str | Path, revision: str | None = None) -> str:
    """SHA-256 of a model: of the names and the whole contents of the files that `load_model` reads.

    So one changed weight shows, also in a file of the same size and date, and the same files under another folder's
    name, or from the hub, have the same fingerprint. It takes about as long as reading the weights (one to two seconds
    for 2 GB); in one process files that have not been touched since are not read again.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `model_files`.
    """
    whole = hashlib.sha256()
    for file in model_files(name_or_path, revision):
        about = file.stat()
        digest = _digest(file, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        # A GGUF file may be renamed; the names of a folder's files say what they are for.
        name = "gguf" if file.suffix == ".gguf" else file.name
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=256)
def _digest(path: Path, *_stamps: int) -> str:
    # The last stamp is the time of the file's last change of any kind, which cannot be set back as a date can.
    return file_digest(path)
