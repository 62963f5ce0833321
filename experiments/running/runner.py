"""Do a run's units and write what comes of them: whoever does them, this process alone writes the run folder.

Units of an experiment are given to the engine when all units of the experiments that it needs have ended, so that they
see the same frames whoever does them, and when. They are deterministic and do not see each other. A run that is started
again, with whatever engine, does what has no frame yet.
"""

import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.running.context import Context
from experiments.running.engines import Ending, Engine, Here, Job
from experiments.running.experiment import Experiment
from experiments.running.holder import HeldError
from experiments.running.identity import hold
from experiments.running.run_folder import DiskFullError, RunFolder
from experiments.running.settings import RunConfig
from experiments.running.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an experiment ended.

    `skipped`, `failed` and `unfinished` (units are left for the next start) give the reason, `traceback` the file with
    more, if any.
    """

    experiment: Experiment
    skipped: str = ""
    failed: str = ""
    unfinished: str = ""
    traceback: Path | None = None


def with_needs(wanted: Sequence[Experiment], catalogue: Sequence[Experiment], config: RunConfig) -> list[Experiment]:
    """The experiments and all they need, in the catalogue's order, in which needs come first."""
    names = {experiment.name for experiment in wanted}
    for experiment in reversed(catalogue):
        if experiment.name in names:
            names.update(experiment.needs(config))
    return [experiment for experiment in catalogue if experiment.name in names]


def run(
    experiments: Sequence[Experiment],
    config: RunConfig,
    folder: RunFolder,
    *,
    device: str | None = None,
    progress: Any = None,
    engine: Engine | None = None,
) -> list[Outcome]:
    """Finish every unit of the experiments and write their sections.

    Args:
        experiments: in an order in which needs come first, see `with_needs`.
        progress: told of each unit `at` its begin and when it is `done`; see `terminal.UnitProgress`.
        engine: who does the units; this process, by default.

    Raises:
        DiskFullError: the disk is full; everything finished is kept.
        HeldError: another process writes into the folder.
        OtherRunError: the folder has some of the experiments' results with other settings or data.
    """
    with folder.held():
        skipped = skip_reasons(experiments, config)
        able = [experiment for experiment in experiments if experiment.name not in skipped]
        identities = hold(able, config, folder)
        folder.sweep_scratch()
        for experiment in experiments:
            if experiment.name in skipped:
                _write_skipped(experiment, skipped[experiment.name], folder)
        context = Context(config, folder, device=device)
        with engine or Here() as doing:
            doing.prepare(able, context, identities)
            work = _Work(able, context, doing, progress)
            work.do()
        return [
            Outcome(
                experiment=one,
                skipped=skipped.get(one.name, ""),
                failed=work.failed.get(one.name, ""),
                unfinished="" if one.name in work.failed else work.unfinished(one),
                traceback=work.tracebacks.get(one.name),
            )
            for one in experiments
        ]


def skip_reasons(experiments: Sequence[Experiment], config: RunConfig) -> dict[str, str]:
    """Why some cannot run with these settings; what needs one of them cannot either."""
    reasons: dict[str, str] = {}
    for experiment in experiments:
        blocked = [name for name in experiment.needs(config) if name in reasons]
        reason = reasons[blocked[0]] if blocked else experiment.skip(config)
        if reason:
            reasons[experiment.name] = reason
    return reasons


@dataclass(slots=True)
class _Work:
    """One start's way through the units."""

    experiments: Sequence[Experiment]
    context: Context
    engine: Engine
    progress: Any = None
    waiting: dict[str, deque[Unit]] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, Path] = field(default_factory=dict)
    postponed: dict[str, str] = field(default_factory=dict)  # why units are left undone; the first reason of each

    def do(self) -> None:
        """Until all that can be done now is done."""
        for experiment in self.experiments:
            self._guarded(experiment, lambda one=experiment: self._list(one))
        while any(self.waiting.values()) or self.running.total():
            for experiment in self.experiments:
                self._begin(experiment)
            for job, ending in self.engine.endings():
                self.running[job.experiment.name] -= 1
                self._end(job, ending)
        for experiment in self.experiments:
            whole = experiment.name not in self.postponed
            self._guarded(experiment, lambda one=experiment, whole=whole: write_section(one, self.context, whole=whole))

    def unfinished(self, experiment: Experiment) -> str:
        """How many of an experiment's units are left for the next start, and why; "" if none."""
        if experiment.name not in self.postponed:
            return ""
        units = experiment.units(self.context.config)
        n_undone = sum(not self.context.folder.is_done(experiment.name, unit) for unit in units)
        reason = f"{n_undone} of {len(units)} units are left undone ({self.postponed[experiment.name]})"
        return f"{reason}: start the same command again to have them done" if n_undone else ""

    def _list(self, experiment: Experiment) -> None:
        """The units that are not done; those that are, are told."""
        left = self.waiting[experiment.name] = deque()
        for unit in experiment.units(self.context.config):
            if not self.context.folder.is_done(experiment.name, unit):
                left.append(unit)
            elif self.progress:
                self.progress.done(experiment, unit)

    def _begin(self, experiment: Experiment) -> None:
        """Give units to the engine, as many as it has room for, if what they need is there."""
        needs, units = self._needs(experiment), self.waiting.get(experiment.name)
        if not units or any(self.waiting.get(one.name) or self.running[one.name] for one in needs):
            return
        self._guarded(experiment, lambda: None)  # what it needs may have failed
        while units and self.engine.room(experiment):
            unit = units.popleft()
            if self.progress:
                self.progress.at(experiment, unit)
            self.running[experiment.name] += 1
            self.engine.take(Job(experiment=experiment, unit=unit))

    def _end(self, job: Job, ending: Ending) -> None:
        """Write what came of a unit."""
        folder, name = self.context.folder, job.experiment.name
        if ending.failed:
            self._fail(job.experiment, ending.failed, ending.traceback)
        elif ending.postponed:
            self.postponed.setdefault(name, ending.postponed)
            if ending.stop:
                self.waiting[name].clear()
            if ending.frame is not None:
                folder.put(folder.unfinished_file(name, job.unit), ending.frame)
        else:
            assert ending.frame is not None
            folder.save_bytes(name, job.unit, ending.frame, ending.files)
            if self.progress:
                self.progress.done(job.experiment, job.unit)

    def _needs(self, experiment: Experiment) -> list[Experiment]:
        names = experiment.needs(self.context.config)
        return [other for other in self.experiments if other.name in names]

    def _guarded(self, experiment: Experiment, do: Callable[[], None]) -> None:
        """One experiment's mistake does not stop the others; a full disk, or another holder of the folder, does."""
        if experiment.name in self.failed:
            return
        if lost := [other.name for other in self._needs(experiment) if other.name in self.failed]:
            self._fail(experiment, f"needs {lost[0]}, which failed")
            return
        try:
            do()
        except (DiskFullError, HeldError):
            raise
        except Exception as error:
            self._fail(experiment, f"{type(error).__name__}: {error}", traceback.format_exc())

    def _fail(self, experiment: Experiment, reason: str, trace: str = "") -> None:
        """Nothing more of the experiment is begun; the first reason is told, and kept for the report."""
        name = experiment.name
        if name in self.waiting:
            self.waiting[name].clear()
        if name in self.failed:
            return
        self.failed[name] = reason
        self.context.folder.keep_error(name, f"{reason}\n\n{trace}" if trace else f"{reason}\n")
        if trace:
            self.tracebacks[name] = self.context.folder.path / name / "error.txt"


def write_section(experiment: Experiment, context: Context, *, whole: bool = True) -> None:
    """Make an experiment's section from its frames and keep it for the report; if not `whole`, of those there are."""
    from caa_lens.report.runs import save_section

    folder = context.folder
    units = experiment.units(context.config)
    frames = (folder.frames if whole else folder.frames_so_far)(experiment.name, units)
    section = experiment.section(frames, context.config)
    with folder.full_disk_said():
        folder.sweep_up(folder.section_file(experiment.name))
        save_section(section, folder.section_file(experiment.name))
        folder.keep_error(experiment.name, "")


def _write_skipped(experiment: Experiment, reason: str, folder: RunFolder) -> None:
    from caa_lens.report.page import Section
    from caa_lens.report.runs import save_section

    if folder.section_file(experiment.name).exists():
        return
    with folder.full_disk_said():
        folder.sweep_up(folder.section_file(experiment.name))
        section = Section(title=experiment.title, source=experiment.source, skipped=reason)
        save_section(section, folder.section_file(experiment.name))
