"""The folder of a run: what it was made with, and one file for every finished unit.

    run.json                                settings, data, versions, commit
    starts.json                             of every start: when, from what code, with what settings
    vectors/<behavior>.safetensors          steering vectors, before normalisation
    <experiment>/units/<unit>.parquet       one unit's frame
    <experiment>/unfinished/<unit>.parquet  what there is of a unit that has to be done again
    <experiment>/identity.json              settings and data that this experiment alone depends on
    <experiment>/section.json               text, figures and tables, for the report
    held.json                               the one process that writes here now; see `holder`

A unit is one file, and not one row group of a common file, because a file can appear whole or not at all: it is written
beside its place and renamed. So a run that is killed at any moment has lost only the unit it was at.
"""

import errno
import glob
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caa_lens.atomic_files import write_atomically
from experiments.running.holder import NAME, Holder
from experiments.running.units import Frames, Unit

if TYPE_CHECKING:
    import pandas as pd

FULL = (errno.ENOSPC, errno.EDQUOT)
FILE_HASH = "file_sha256"  # of the vectors that a unit has written, among its frame's attributes


class OtherRunError(ValueError):
    """The folder holds something else than this run."""


class DiskFullError(OSError):
    """There is no room for a result; everything finished before is there and readable."""


class RunFolder:
    """Reads and writes one run's files; one process at a time writes, see `held`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._holder: Holder | None = None

    @contextmanager
    def held(self, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Be the one process that writes here, as long as the block lasts; a block in a block is the same.

        Raises:
            HeldError: another process is that.
        """
        if self._holder is not None:
            yield
            return
        with ExitStack() as stack:
            with self.full_disk_said():
                self._holder = stack.enter_context(Holder(self.path, say=say))
            try:
                yield
            finally:
                self._holder = None

    # ---- the run -----------------------------------------------------------------------------------------------

    def claim(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
        """Say what the folder is for, or check that it is for just that; whether it was begun before.

        Args:
            identity: what the numbers depend on, by kind; nothing in it may differ.
            about: what is only written down when the run begins.

        Raises:
            OtherRunError: the folder holds a run with another identity, or files that are not a run's.
        """
        file = self.path / "run.json"
        wanted = json.loads(json.dumps(identity))
        self.check_ours()
        self.sweep_up(file)
        if not file.exists():
            text = json.dumps({**wanted, "about": about}, indent=2, ensure_ascii=False)
            self._write(file, text.encode())
            return False
        present = self.about()
        different = [line for kind, here in wanted.items() for line in differences(kind, present.get(kind, {}), here)]
        if different:
            listed = "\n  ".join(different)
            raise OtherRunError(
                f"{self.path} holds a run with other settings:\n  {listed}\nchoose another folder with --out, give the "
                "settings of that run, or delete it"
            )
        return True

    def check_ours(self) -> None:
        """Raises `OtherRunError` if the folder has files, and they are not a run's."""
        there = {file.name for file in self.path.iterdir()} if self.path.is_dir() else set()
        if any(not name.startswith(".") for name in there) and not {NAME, "run.json"} & there:
            raise OtherRunError(f"{self.path} is not empty and holds no run: choose another folder with --out")

    def about(self) -> dict[str, Any]:
        """The contents of `run.json`."""
        return json.loads((self.path / "run.json").read_text(encoding="utf-8"))

    def record_start(self, notes: Mapping[str, Any]) -> None:
        """Add a start of the run to `starts.json`."""
        file = self.path / "starts.json"
        self.sweep_up(file)
        starts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self._write(file, json.dumps([*starts, notes], indent=2, ensure_ascii=False).encode())

    def hold(self, experiment: str, identity: Mapping[str, Any]) -> list[str]:
        """Say what an experiment's results depend on, beside the run's identity; or what differs from what was said.

        As long as it has no finished unit, an experiment may change its mind.
        """
        file = self.path / experiment / "identity.json"
        if different := self.differs(experiment, identity):
            return different
        self.sweep_up(file)
        if self._other_identity(experiment, identity) or (identity and not file.exists()):
            self._write(file, json.dumps(identity, indent=2, ensure_ascii=False).encode())
            shutil.rmtree(self.path / experiment / "unfinished", ignore_errors=True)
        return []

    def differs(self, experiment: str, identity: Mapping[str, Any]) -> list[str]:
        """What `hold` would say, without a change to the folder."""
        finished = any(self.unit_file(experiment, Unit.of()).parent.glob("*.parquet"))
        return self._other_identity(experiment, identity) if finished else []

    def _other_identity(self, experiment: str, identity: Mapping[str, Any]) -> list[str]:
        file = self.path / experiment / "identity.json"
        there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else identity
        return differences(experiment, there, json.loads(json.dumps(identity)))

    # ---- units -------------------------------------------------------------------------------------------------

    def unit_file(self, experiment: str, unit: Unit) -> Path:
        return self.path / experiment / "units" / f"{unit.name}.parquet"

    def is_done(self, experiment: str, unit: Unit) -> bool:
        return self.unit_file(experiment, unit).exists()

    def save(self, experiment: str, unit: Unit, frame: "pd.DataFrame") -> None:
        """Write a unit's frame; the unit is done then.

        Raises:
            DiskFullError: the disk is full.
        """
        self.save_bytes(experiment, unit, parquet(frame))

    def save_bytes(self, experiment: str, unit: Unit, frame: bytes, files: Mapping[str, bytes] | None = None) -> None:
        """Write a unit's frame as `parquet` gives it, after the other `files` that it has left, by their places."""
        for place, data in (files or {}).items():
            self.put(self.path / place, data)
        self.put(self.unit_file(experiment, unit), frame)
        self.unfinished_file(experiment, unit).unlink(missing_ok=True)

    def files_of(self, experiment: str, unit: Unit) -> dict[str, bytes]:
        """All that a unit has left, by its place in the folder: the frame, vectors, and what its experiment keeps."""
        found = [self.unit_file(experiment, unit)]
        for which in ("", "base-"):
            if experiment == _experiment_of_vectors(which):
                found.append(self.vectors_file(unit["behavior"], which))
        artefacts = (self.path / experiment / "artefacts").rglob(f"*{glob.escape(unit.name)}*")
        files = sorted(file for file in (*found, *artefacts) if file.is_file())
        return {file.relative_to(self.path).as_posix(): file.read_bytes() for file in files}

    def unfinished_file(self, experiment: str, unit: Unit) -> Path:
        """Where the frame of a unit lies that has to be done again."""
        return self.path / experiment / "unfinished" / f"{unit.name}.parquet"

    def write_frame(self, file: Path, frame: "pd.DataFrame") -> None:
        """Write a frame that appears whole or not at all."""
        self.put(file, parquet(frame))

    def put(self, file: Path, data: bytes) -> None:
        """Write a file that appears whole or not at all."""
        self.sweep_up(file)
        self._write(file, data)

    def load(self, experiment: str, unit: Unit) -> "pd.DataFrame":
        import pandas as pd

        return pd.read_parquet(self.unit_file(experiment, unit))

    def frames(self, experiment: str, units: Iterable[Unit]) -> Frames:
        """The frames of an experiment's units, in the order of the units.

        Raises:
            FileNotFoundError: a unit is not finished.
        """
        return {unit: self.load(experiment, unit) for unit in units}

    def frames_so_far(self, experiment: str, units: Iterable[Unit]) -> Frames:
        """The frames of finished units and what there is of unfinished ones, in the order of the units."""
        import pandas as pd

        frames = {}
        for unit in units:
            files = (self.unit_file(experiment, unit), self.unfinished_file(experiment, unit))
            if file := next((file for file in files if file.exists()), None):
                frames[unit] = pd.read_parquet(file)
        return frames

    # ---- vectors -----------------------------------------------------------------------------------------------

    def vectors_file(self, behavior: str, which: str = "") -> Path:
        """`which` is "" for the model's vectors, "base-" for the base model's."""
        return self.path / "vectors" / f"{which}{behavior}.safetensors"

    def check_vectors(self, behavior: str, which: str = "") -> None:
        """Raises `OtherRunError` if a file of vectors is not the one that its unit of work has left there."""
        from caa_lens.models.loading.fingerprint import file_digest

        file, unit = self.vectors_file(behavior, which), Unit.of(behavior=behavior)
        experiment = _experiment_of_vectors(which)
        expected = self.load(experiment, unit).attrs.get(FILE_HASH)
        if (found := file_digest(file)) != expected:
            raise OtherRunError(
                f"{file} is not what {experiment} has written: its SHA-256 is {found}, expected {expected}: delete "
                f"{self.unit_file(experiment, unit)} to have the vectors extracted again"
            )

    # ---- other files -------------------------------------------------------------------------------------------

    def section_file(self, experiment: str) -> Path:
        return self.path / experiment / "section.json"

    def keep_error(self, experiment: str, text: str) -> None:
        """Write an experiment's traceback to `error.txt`; an empty one removes it."""
        file = self.path / experiment / "error.txt"
        if text:
            self._write(file, text.encode())
        else:
            file.unlink(missing_ok=True)

    def artefacts(self, experiment: str) -> Path:
        """A folder for an experiment's own files (adapters, checkpoints)."""
        folder = self.path / experiment / "artefacts"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def scratch(self, experiment: str, unit: Unit) -> Iterator[Path]:
        """An empty folder for what a unit needs while it is done."""
        folder = self.artefacts(experiment) / f"tmp-{unit.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep_scratch(self) -> None:
        """Remove the scratch folders of processes that were killed; the caller holds the folder."""
        for left in self.path.glob("*/artefacts/tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def full_disk_said(self) -> Iterator[None]:
        """Turn the system's "no space left" into an error that says what is safe and what to do."""
        try:
            yield
        except DiskFullError:
            raise
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFullError(
                error.errno,
                "the disk is full. Units finished so far are kept: free some space and start the same command again",
                str(self.path),
            ) from error

    def _write(self, file: Path, data: bytes) -> None:
        if self._holder is not None:
            self._holder.check()
        with self.full_disk_said():
            write_atomically(file, lambda temporary: temporary.write_bytes(data))

    def sweep_up(self, file: Path) -> None:
        """Remove what a killed process left beside a file; the caller holds the folder."""
        for leftover in file.parent.glob(f".{glob.escape(file.stem)}.????????{file.suffix}"):
            leftover.unlink(missing_ok=True)


def parquet(frame: "pd.DataFrame") -> bytes:
    """A frame as its file has it, attributes included.

    In memory, as an error while it is written to a disk is then the system's own, with its number.
    """
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _experiment_of_vectors(which: str) -> str:
    """The experiment that leaves vectors; `which` is that of `vectors_file`."""
    return f"{which}vectors".replace("-", "_")


def differences(kind: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for each name whose value is another there than here."""
    return [
        f"{kind}.{key}: {repr(there[key]) if key in there else 'not recorded'} there, "
        f"{repr(here[key]) if key in here else 'none'} now"
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]
