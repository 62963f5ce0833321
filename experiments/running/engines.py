"""Who does units: this process, one after the other, or others (see `ray_workers`). Either way a unit ends alike.

An engine takes units and gives back how each has ended; it writes nothing into the run folder, and does not choose what
comes next. That is the runner's.
"""

import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from experiments.running.context import Context
from experiments.running.experiment import Experiment
from experiments.running.run_folder import DiskFullError, parquet
from experiments.running.units import Unfinished, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A unit of an experiment, to be done."""

    experiment: Experiment
    unit: Unit

    @property
    def key(self) -> tuple[str, str]:
        return self.experiment.name, self.unit.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a unit ended: with a frame; `failed`, with the reason; or `postponed`, perhaps with a part of its frame."""

    frame: bytes | None = None
    """As the run folder keeps it."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What else it has left, by place in the run folder; nothing where that lies there already."""
    failed: str = ""
    traceback: str = ""
    postponed: str = ""
    stop: bool = False
    """Whether no other unit of the experiment is to be tried."""


class Engine(Protocol):
    """Takes units and says how they ended. Use as a context manager."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def prepare(
        self, experiments: Sequence[Experiment], context: Context, identities: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Told once, before the first unit: all experiments of the run, and what each is held to."""
        ...

    def room(self, experiment: Experiment) -> bool:
        """Whether a unit of this experiment would be begun at once."""
        ...

    def take(self, job: Job) -> None: ...

    def endings(self) -> Iterable[tuple[Job, Ending]]:
        """Waits for a while, and gives the units that have ended; perhaps none."""
        ...


def attempt(experiment: Experiment, unit: Unit, context: Context) -> Ending:
    """Do a unit here and now.

    Raises:
        DiskFullError: the disk is full.
    """
    began = time.perf_counter()
    try:
        with context.folder.full_disk_said():
            frame = experiment.run(unit, context)
        frame.attrs["seconds"] = round(time.perf_counter() - began, 3)
        return Ending(frame=parquet(frame))
    except Unfinished as why:
        return Ending(postponed=str(why), stop=why.stop, frame=None if why.frame is None else parquet(why.frame))
    except DiskFullError:
        raise
    except Exception as error:
        return Ending(failed=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


class Here:
    """This process, a unit at a time, straight in the run folder."""

    def __init__(self) -> None:
        self._job: Job | None = None

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        self._job = None

    def prepare(
        self, experiments: Sequence[Experiment], context: Context, identities: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._context = context

    def room(self, experiment: Experiment) -> bool:
        return self._job is None

    def take(self, job: Job) -> None:
        self._job = job

    def endings(self) -> Iterable[tuple[Job, Ending]]:
        if self._job is not None:
            job, self._job = self._job, None
            yield job, attempt(job.experiment, job.unit, self._context)
