"""One of Ray's workers: it holds a model, and does units in a folder of its own.

The folder is a copy of those parts of the run folder that its units read: `run.json`, and all that the units of needed
experiments have left. What a unit adds to it goes back with the unit's frame. So a worker needs no file system in
common with the process that writes the run folder, and experiments see a run folder as ever.
"""

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments.running.context import Context
from experiments.running.engines import Ending, attempt
from experiments.running.experiment import Experiment
from experiments.running.holder import machine
from experiments.running.identity import LIBRARIES, lacking_here
from experiments.running.run_folder import RunFolder
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

Files = Mapping[str, bytes]
MORE_LIBRARIES = ("pyarrow", "safetensors", "tokenizers")  # not held to by a run, but the same everywhere in one
PREFIX = "caa-lens-worker-"


def about_here(device: str | None) -> dict[str, str]:
    """What must be the same of all workers, so that numbers are: libraries, sources, the kind of device."""
    versions = {f"version of {name}": _version(name) for name in (*LIBRARIES, *MORE_LIBRARIES)}
    return {
        **versions,
        "python": platform.python_version(),
        "sources": sources_hash(),
        "device": kind_of_device(device),
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def sources_hash() -> str:
    """SHA-256 of the package's sources and the experiments': a version says nothing of a checkout."""
    import caa_lens

    whole = hashlib.sha256()
    for folder in (Path(caa_lens.__file__).parent, Path(__file__).resolve().parents[1]):
        for file in sorted(folder.rglob("*.py")):
            whole.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def kind_of_device(device: str | None) -> str:
    """The card's name, or the processor's with its vector instructions and the threads that share a product."""
    kind = (device or "auto").partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        return kind
    import torch

    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA card"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


class Worker:
    """What Ray makes an actor of. One unit at a time; the model stays from unit to unit."""

    def about(self, device: str | None) -> dict[str, str]:
        return {"node": platform.node(), **about_here(device)}

    def begin(
        self,
        config: RunConfig,
        experiments: Sequence[Experiment],
        device: str | None,
        held: Mapping[str, Any],
        identities: Mapping[str, Mapping[str, Any]],
        files: Files,
        data: Files,
        cwd: str,
    ) -> list[str]:
        """Get ready; what this machine has otherwise than the run is held to, which is nothing if all is well.

        Args:
            files: of the run folder, for the start.
            data: fetched sets, by place in the data folder: those that are not here are put there.
            cwd: paths are relative to it, if there is such a folder here.
        """
        if Path(cwd).is_dir():
            os.chdir(cwd)
        _put_missing(data)
        self._experiments = {one.name: one for one in experiments}
        _sweep_up()
        self._folder = RunFolder(tempfile.mkdtemp(prefix=_prefix(os.getpid())))
        self._seen: set[str] = set()
        self._unpack(files)
        self._context = Context(config, self._folder, device=device)
        return lacking_here(held, identities, experiments, config)

    def ping(self) -> None:
        """Answered, the worker is alive."""

    def do(
        self, name: str, unit: Unit, needs: Mapping[str, Sequence[Any]], own: Files
    ) -> tuple[tuple[str, str], Ending]:
        """Do a unit; its name, and how it ended.

        Args:
            needs: of every needed experiment, by name, a reference to all files of its units.
            own: what the unit itself has left before.

        Raises:
            DiskFullError: this machine's disk is full.
        """
        import ray

        for needed, (reference,) in needs.items():
            if needed not in self._seen:
                self._unpack(ray.get(reference))
                self._seen.add(needed)
        self._unpack(own)
        before = self._stamps()
        ending = attempt(self._experiments[name], unit, self._context)
        if not (ending.failed or ending.postponed):
            left = [place for place, stamp in self._stamps().items() if before.get(place) != stamp]
            ending = replace(ending, files={place: (self._folder.path / place).read_bytes() for place in left})
        return (name, unit.name), ending

    def close(self) -> None:
        shutil.rmtree(self._folder.path, ignore_errors=True)

    def _unpack(self, files: Files) -> None:
        for place, data in files.items():
            self._folder.put(self._folder.path / place, data)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        root = self._folder.path
        found = {file.relative_to(root).as_posix(): file.stat() for file in root.rglob("*") if file.is_file()}
        return {place: (stat.st_mtime_ns, stat.st_size) for place, stat in found.items()}


def _put_missing(data: Files) -> None:
    from caa_lens.atomic_files import write_atomically
    from caa_lens.paper.questions import data_folder

    for place, content in data.items():
        if not (data_folder() / place).exists():
            write_atomically(data_folder() / place, lambda file, content=content: file.write_bytes(content))


def _prefix(process: int) -> str:
    here = hashlib.sha256(machine().encode()).hexdigest()[:8]
    return f"{PREFIX}{here}-{process}-"


def _sweep_up() -> None:
    """Remove the folders of this machine's workers that were killed."""
    import psutil

    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(0).removesuffix('0-')}*"):
        process = folder.name.rsplit("-", 2)[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
