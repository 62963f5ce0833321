"""Do a run's units: one at a time, each result written before the next begins.

Every process on a folder walks through the same list and takes what nobody else has taken: a unit is taken by holding
its lock, which goes with the process. So there is no queue to corrupt; several workers, a second run on the same
folder, and a run started again after a crash are all the same case. Units are deterministic and do not see each other,
so who does one, and when, does not change its frame.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.running.context import Context
from experiments.running.experiment import Experiment
from experiments.running.identity import hold
from experiments.running.run_folder import DiskFullError, RunFolder
from experiments.running.settings import RunConfig
from experiments.running.units import Unfinished, Unit
from experiments.running.workers import stop_if_orphaned


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
) -> list[Outcome]:
    """Finish every unit of the experiments and write their sections.

    Args:
        experiments: in an order in which needs come first, see `with_needs`.
        progress: told of each unit `at` its begin and when it is `done`; see `progress.UnitProgress`.

    Raises:
        DiskFullError: the disk is full; everything finished is kept.
        OtherRunError: the folder has some of the experiments' results with other settings or data.
    """
    skipped = skip_reasons(experiments, config)
    able = [experiment for experiment in experiments if experiment.name not in skipped]
    identities = hold(able, config, folder)
    folder.sweep_scratch()
    for experiment in experiments:
        if experiment.name in skipped:
            _write_skipped(experiment, skipped[experiment.name], folder)
    worker = _Worker(able, Context(config, folder, device=device), identities, progress)
    failed = worker.work()
    return [
        Outcome(
            experiment=one,
            skipped=skipped.get(one.name, ""),
            failed=failed.get(one.name, ""),
            unfinished="" if one.name in failed else worker.unfinished(one),
            traceback=worker.tracebacks.get(one.name),
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
class _Worker:
    """One process' way through the list."""

    experiments: Sequence[Experiment]
    context: Context
    identities: Mapping[str, Mapping[str, Any]]
    progress: Any = None
    left: dict[str, list[Unit]] = field(default_factory=dict)  # taken by others when we came by
    failed: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, Path] = field(default_factory=dict)
    postponed: dict[str, str] = field(default_factory=dict)  # why units are left undone; the first reason of each
    stopped: set[str] = field(default_factory=set)  # experiments that nothing more is tried of at this start

    def work(self) -> dict[str, str]:
        """Until all is done, by whomever; the experiments that failed, and why."""
        for experiment in self.experiments:
            for needed in self._needs(experiment):
                self._settle(needed)
            self._guarded(
                experiment, lambda one=experiment: self._pass(one, one.units(self.context.config), wait=False)
            )
        for experiment in self.experiments:
            self._settle(experiment)
        for experiment in self.experiments:
            whole = experiment.name not in self.postponed
            self._guarded(experiment, lambda one=experiment, whole=whole: write_section(one, self.context, whole=whole))
        return self.failed

    def unfinished(self, experiment: Experiment) -> str:
        """How many of an experiment's units are left for the next start, and why; "" if none."""
        if experiment.name not in self.postponed:
            return ""
        units = experiment.units(self.context.config)
        n_undone = sum(not self.context.folder.is_done(experiment.name, unit) for unit in units)
        reason = f"{n_undone} of {len(units)} units are left undone ({self.postponed[experiment.name]})"
        return f"{reason}: start the same command again to have them done" if n_undone else ""

    def _needs(self, experiment: Experiment) -> list[Experiment]:
        names = experiment.needs(self.context.config)
        return [other for other in self.experiments if other.name in names]

    def _settle(self, experiment: Experiment) -> None:
        """Wait for the units that others are at, and do those that they leave undone."""
        units = self.left.pop(experiment.name, [])
        self._guarded(experiment, lambda: self._pass(experiment, units, wait=True))

    def _pass(self, experiment: Experiment, units: Sequence[Unit], *, wait: bool) -> None:
        for unit in units:
            if not self._attempt(experiment, unit, wait):
                self.left.setdefault(experiment.name, []).append(unit)

    def _attempt(self, experiment: Experiment, unit: Unit, wait: bool) -> bool:
        """Whether the unit is done now."""
        folder, name = self.context.folder, experiment.name
        if name in self.stopped:
            return True
        if not folder.is_done(name, unit):
            stop_if_orphaned()
            with folder.lock(name, unit.name, wait=wait) as got:
                if not got:
                    return False
                if not folder.is_done(name, unit):  # else somebody finished it in between
                    try:
                        self._do(experiment, unit)
                    except Unfinished as why:
                        self._postpone(experiment, unit, why)
                        return True
        if self.progress:
            self.progress.done(experiment, unit)
        return True

    def _do(self, experiment: Experiment, unit: Unit) -> None:
        if self.progress:
            self.progress.at(experiment, unit)
        began = time.perf_counter()
        with self.context.folder.full_disk_said():
            frame = experiment.run(unit, self.context)
        frame.attrs["seconds"] = round(time.perf_counter() - began, 3)
        self.context.folder.save(experiment.name, unit, frame, self.identities[experiment.name])

    def _postpone(self, experiment: Experiment, unit: Unit, why: Unfinished) -> None:
        self.postponed.setdefault(experiment.name, str(why))
        if why.stop:
            self.stopped.add(experiment.name)
        if why.frame is not None:
            folder = self.context.folder
            folder.write_frame(folder.unfinished_file(experiment.name, unit), why.frame)

    def _guarded(self, experiment: Experiment, do: Callable[[], None]) -> None:
        """One experiment's mistake does not stop the others; a full disk does."""
        if experiment.name in self.failed:
            return
        lost = [other.name for other in self._needs(experiment) if other.name in self.failed]
        if lost:
            self.failed[experiment.name] = f"needs {lost[0]}, which failed"
            self.context.folder.keep_error(experiment.name, self.failed[experiment.name] + "\n")
            return
        try:
            do()
        except DiskFullError:
            raise
        except Exception as error:
            self.failed[experiment.name] = f"{type(error).__name__}: {error}"
            text = f"{self.failed[experiment.name]}\n\n{traceback.format_exc()}"  # the report shows the first line
            self.context.folder.keep_error(experiment.name, text)
            self.tracebacks[experiment.name] = self.context.folder.path / experiment.name / "error.txt"


def write_section(experiment: Experiment, context: Context, *, whole: bool = True) -> None:
    """Make an experiment's section from its frames and keep it for the report; if not `whole`, of those there are."""
    from caa_lens.report.runs import save_section

    folder = context.folder
    units = experiment.units(context.config)
    frames = (folder.frames if whole else folder.frames_so_far)(experiment.name, units)
    section = experiment.section(frames, context.config)
    with folder.lock(experiment.name, "section"), folder.full_disk_said():
        folder.sweep_up(folder.section_file(experiment.name))
        save_section(section, folder.section_file(experiment.name))
        folder.keep_error(experiment.name, "")


def _write_skipped(experiment: Experiment, reason: str, folder: RunFolder) -> None:
    from caa_lens.report.page import Section
    from caa_lens.report.runs import save_section

    if folder.section_file(experiment.name).exists():
        return
    with folder.lock(experiment.name, "section"), folder.full_disk_said():
        folder.sweep_up(folder.section_file(experiment.name))
        section = Section(title=experiment.title, source=experiment.source, skipped=reason)
        save_section(section, folder.section_file(experiment.name))
