"""Do a run's units: one at a time, each result written before the next begins.

Every process on a folder walks through the same list and takes what nobody else has taken: a unit is taken by holding
its lock, which goes with the process. So there is no queue to corrupt; several workers, a second run on the same
folder, and a run started again after a crash are all the same case. Units are deterministic and do not see each other,
so who does one, and when, does not change its frame.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.context import Context
from experiments.experiment import Experiment, Unit
from experiments.run_folder import DiskFullError, RunFolder
from experiments.settings import RunConfig
from experiments.workers import stop_if_orphaned


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an experiment ended: `skipped` and `failed` give the reason."""

    experiment: Experiment
    skipped: str = ""
    failed: str = ""


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
    """
    skipped = skip_reasons(experiments, config)
    for experiment in experiments:
        if experiment.name in skipped:
            _write_skipped(experiment, skipped[experiment.name], folder)
    able = [experiment for experiment in experiments if experiment.name not in skipped]
    failed = _Worker(able, Context(config, folder, device=device), progress).work()
    return [
        Outcome(experiment=one, skipped=skipped.get(one.name, ""), failed=failed.get(one.name, ""))
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
    progress: Any = None
    left: dict[str, list[Unit]] = field(default_factory=dict)  # taken by others when we came by
    failed: dict[str, str] = field(default_factory=dict)

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
            self._guarded(experiment, lambda one=experiment: write_section(one, self.context))
        return self.failed

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
        if not folder.is_done(name, unit):
            stop_if_orphaned()
            with folder.lock(name, unit.name, wait=wait) as got:
                if not got:
                    return False
                if not folder.is_done(name, unit):  # else somebody finished it in between
                    self._do(experiment, unit)
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
        self.context.folder.save(experiment.name, unit, frame)

    def _guarded(self, experiment: Experiment, do: Callable[[], None]) -> None:
        """One experiment's mistake does not stop the others; a full disk does."""
        if experiment.name in self.failed:
            return
        lost = [other.name for other in self._needs(experiment) if other.name in self.failed]
        if lost:
            self.failed[experiment.name] = f"needs {lost[0]}, which failed"
            return
        try:
            do()
        except DiskFullError:
            raise
        except Exception as error:
            self.failed[experiment.name] = f"{type(error).__name__}: {error}"
            self.context.folder.keep_error(experiment.name, traceback.format_exc())


def write_section(experiment: Experiment, context: Context) -> None:
    """Make the section of a finished experiment from its frames, and keep it for the report."""
    from caa_lens.run_report import save_section

    folder = context.folder
    section = experiment.section(folder.frames(experiment, context.config), context.config)
    with folder.lock(experiment.name, "section"), folder.full_disk_said():
        save_section(section, folder.section_file(experiment.name))
        folder.keep_error(experiment.name, "")


def _write_skipped(experiment: Experiment, reason: str, folder: RunFolder) -> None:
    from caa_lens.report import Section
    from caa_lens.run_report import save_section

    if folder.section_file(experiment.name).exists():
        return
    with folder.lock(experiment.name, "section"), folder.full_disk_said():
        section = Section(title=experiment.title, source=experiment.source, skipped=reason)
        save_section(section, folder.section_file(experiment.name))
