"""Units done by Ray's workers, on this machine or on a cluster's nodes (the extra `cluster`).

A worker is an actor that holds one model and does one unit at a time. To a worker go the settings, the experiments, and
what its units read of the run folder (once for each needed experiment, through the object store); from it come frames
and files, as bytes. The process that asks, the driver, alone writes the run folder, and alone knows what is done:

- a worker that is lost, with its node or alone, is replaced as soon as there is room, and the unit that it was at is
  given to another, `RETRIES` times; then the unit is reported as failed. Nothing that the lost one may still say is
  heard, as its answer is not waited for any more;
- a worker that has other libraries, sources, data, model or another kind of device than the first one, or the driver,
  is refused, and so the run: its numbers would be others.

Units that ask a judge are done by the driver, in a thread: one process keeps the limits, the key and the replies.
"""

import contextlib
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.running import ray_cluster
from experiments.running.context import Context
from experiments.running.engines import Ending, Job, attempt
from experiments.running.experiment import Experiment
from experiments.running.ray_cluster import ClusterError, Demand
from experiments.running.ray_worker import Worker, about_here
from experiments.running.run_folder import DiskFullError

RETRIES = 3  # of a unit whose worker was lost; of a worker that is lost before it is ready
PATIENCE = 600.0  # seconds without any worker, after which the run ends
FRESH = 5.0  # seconds that a worker is taken to live after its last word
TURN = 0.5  # seconds that are waited for an answer before the driver looks around


@dataclass(slots=True, eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    stage: str = "about"  # what it was asked last: about, begin, ping, do
    asked: Any = None  # the reference to its answer; None if it is idle
    job: Job | None = None
    heard: float = 0.0


class RayWorkers:
    """The engine; see `engines.Engine`.

    Args:
        n: workers; as many as the cluster has room for, if None, which may change while the run goes on.
        address: of a running cluster ("auto" for the one that this machine belongs to); None starts Ray here.
        demand: what a worker needs.
        say: is told what the user should know, such as a lost worker.
        retries: of a unit whose worker was lost.
    """

    def __init__(
        self,
        n: int | None = None,
        *,
        address: str | None = None,
        demand: Demand | None = None,
        device: str | None = None,
        say: Callable[[str], None] = lambda text: None,
        retries: int = RETRIES,
    ) -> None:
        self._n, self._address, self._demand = n, address, demand or Demand()
        self._device = "cpu" if device is None and not self._demand.gpus else device
        self._say, self._retries = say, retries
        self._hands: list[_Hand] = []
        self._again: deque[Job] = deque()
        self._lost: Counter[tuple[str, str]] = Counter()  # workers, by the unit that they were at
        self._lost_early = self._wanted = 0
        self._first: dict[str, str] = {}
        self._parcels: dict[str, Any] = {}
        self._own: queue.Queue[tuple[Job, Ending | BaseException]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RayWorkers":
        self._ray = ray_cluster.load(loopback=self._address is None)
        self._leave = contextlib.ExitStack()
        self._leave.enter_context(ray_cluster.joined(self._ray, self._address, self._n, self._demand))
        return self

    def __exit__(self, *_: object) -> None:
        idle = [hand.actor.close.remote() for hand in self._hands if hand.asked is None]
        with contextlib.suppress(Exception):
            self._ray.wait(idle, num_returns=len(idle), timeout=5.0) if idle else None
        for hand in self._hands:
            with contextlib.suppress(Exception):
                self._ray.kill(hand.actor)
        self._hands.clear()
        self._leave.close()

    def prepare(
        self, experiments: Sequence[Experiment], context: Context, identities: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._experiments = {one.name: one for one in experiments}
        self._context = context
        about = context.folder.about()
        held = {kind: about[kind] for kind in ("versions", "data", "model") if kind in about}
        by_workers = {one.name: identities[one.name] for one in experiments if not one.by_driver}
        files = {"run.json": (context.folder.path / "run.json").read_bytes()}
        data = ray_cluster.fetched_data() if self._address else {}  # here it is at hand
        words = (context.config, list(experiments), self._device, held, by_workers, files, data, os.getcwd())
        self._words = [self._ray.put(word) for word in words]
        own = about_here("the driver's may be another")
        self._first = {key: value for key, value in own.items() if key != "device"}
        self._actor = ray_cluster.actor(self._ray, Worker, self._demand)
        self._alive = time.monotonic()
        if not ray_cluster.capacity(self._ray, self._demand):
            self._say(
                f"Waiting for room: a worker asks for {self._demand}, and {ray_cluster.described(self._ray)}; "
                "see --num-gpus-per-worker, --num-cpus-per-worker, --accelerator"
            )

    # ---- taking units ------------------------------------------------------------------------------------------

    def room(self, experiment: Experiment) -> bool:
        if experiment.by_driver:
            return self._thread is None
        return not self._again and self._free() is not None

    def take(self, job: Job) -> None:
        if not job.experiment.by_driver:
            self._give(job)
            return
        self._thread = threading.Thread(target=self._do_here, args=(job,), daemon=True)
        self._thread.start()

    def endings(self) -> Iterable[tuple[Job, Ending]]:
        self._look_around()
        while not self._own.empty():
            job, ending = self._own.get()
            self._thread = None
            if isinstance(ending, BaseException):
                raise ending
            yield job, ending
        asked = {hand.asked: hand for hand in self._hands if hand.asked is not None}
        if not asked:
            time.sleep(TURN / 10)
            return
        answered, _ = self._ray.wait(list(asked), num_returns=1, timeout=TURN)
        for reference in answered:
            yield from self._hear(asked[reference])

    def _do_here(self, job: Job) -> None:
        ending: Ending | BaseException
        try:
            ending = attempt(job.experiment, job.unit, self._context)
        except BaseException as error:
            ending = error
        self._own.put((job, ending))

    def _give(self, job: Job) -> None:
        hand = self._free(fresh=float("inf"))
        assert hand is not None
        folder, name = self._context.folder, job.experiment.name
        needs = {needed: [self._parcel(needed)] for needed in self._needed(name)}
        hand.job, hand.stage = job, "do"
        hand.asked = hand.actor.do.remote(name, job.unit, needs, folder.files_of(name, job.unit))

    def _free(self, fresh: float = FRESH) -> _Hand | None:
        """The first idle worker that was heard of lately: the first ones have a model already."""
        now = time.monotonic()
        ready = (hand for hand in self._hands if hand.asked is None and now - hand.heard < fresh)
        return next(ready, None)

    def _needed(self, name: str) -> list[str]:
        """All experiments that one needs, and those that they need: their units have ended."""
        direct = [one for one in self._experiments[name].needs(self._context.config) if one in self._experiments]
        return list(dict.fromkeys(other for one in direct for other in (*self._needed(one), one)))

    def _parcel(self, name: str) -> Any:
        """A reference to all that an experiment's units have left, put into the object store once."""
        if name not in self._parcels:
            files: dict[str, bytes] = {}
            for unit in self._experiments[name].units(self._context.config):
                files |= self._context.folder.files_of(name, unit)
            self._parcels[name] = self._ray.put(files)
        return self._parcels[name]

    # ---- workers -----------------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Replace workers, ask idle ones whether they live, and give units again whose workers were lost."""
        self._wanted = self._n if self._n is not None else ray_cluster.capacity(self._ray, self._demand)
        for _ in range(self._wanted - len(self._hands)):
            hand = _Hand(self._actor.remote())
            hand.asked = hand.actor.about.remote(self._device)
            self._hands.append(hand)
        now = time.monotonic()
        for hand in self._hands:
            if hand.asked is None and now - hand.heard >= FRESH:
                hand.asked, hand.stage = hand.actor.ping.remote(), "ping"
        while self._again and self._free() is not None:
            self._give(self._again.popleft())
        if any(hand.heard for hand in self._hands):
            self._alive = now
        elif now - self._alive > PATIENCE:
            raise ClusterError(
                f"no worker has started for {PATIENCE / 60:.0f} minutes: each asks for {self._demand}, and "
                f"{ray_cluster.described(self._ray)}: ask for less, or add nodes. What is finished is kept"
            )

    def _hear(self, hand: _Hand) -> Iterable[tuple[Job, Ending]]:
        """Take a worker's answer, or the news that there will be none."""
        job = hand.job
        try:
            answer = self._ray.get(hand.asked)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DiskFullError):
                raise error.cause from None
            if job is None:
                raise ClusterError(f"a worker could not begin: {error.cause}") from error
            hand.asked, hand.job, hand.heard = None, None, time.monotonic()
            yield job, Ending(failed=f"{type(error.cause).__name__}: {error.cause}", traceback=str(error))
            return
        except self._ray.exceptions.RayError as error:
            yield from self._lose(hand, error)
            return
        hand.asked, hand.job, hand.heard = None, None, time.monotonic()
        if hand.stage == "about":
            hand.heard = 0.0
            self._compare(answer)
            hand.stage, hand.asked = "begin", hand.actor.begin.remote(*self._words)
        elif hand.stage == "begin":
            if answer:
                raise ClusterError(
                    "a worker has not what the run is held to:\n  " + "\n  ".join(answer) + "\n(there: the run, now: "
                    "the worker). Put the same model, data and libraries on every node"
                )
            self._lost_early = 0
        elif hand.stage == "do":
            assert job is not None
            key, ending = answer
            assert key == job.key, f"asked for {job.key}, got {key}"
            self._lost.pop(job.key, None)
            yield job, ending

    def _lose(self, hand: _Hand, error: Exception) -> Iterable[tuple[Job, Ending]]:
        """A worker is gone; its unit is given again, or given up."""
        self._hands.remove(hand)
        with contextlib.suppress(Exception):  # where only its answer was lost
            self._ray.kill(hand.actor)
        why = " ".join(str(error).split())
        if hand.job is None:
            if hand.stage in ("about", "begin"):
                self._lost_early += 1
                if self._lost_early > RETRIES * max(1, self._wanted):  # a node's workers are lost together
                    raise ClusterError(f"{self._lost_early} workers in turn were lost before they were ready: {why}")
            return
        name, unit = hand.job.key
        self._lost[hand.job.key] += 1
        n_lost = self._lost[hand.job.key]
        if n_lost <= self._retries:
            self._say(f"A worker was lost at {name} {unit} ({n_lost} of {self._retries + 1} tries): it is done again")
            self._again.append(hand.job)
            return
        failed = f"WorkerLostError: {n_lost} workers were lost, one after the other, at {unit}"
        yield hand.job, Ending(failed=failed, traceback=f"The last one:\n{error}")

    def _compare(self, about: dict[str, str]) -> None:
        """Raises `ClusterError` for a worker whose numbers might be others."""
        node = about.pop("node")
        self._first.setdefault("device", about["device"])
        different = [
            f"{key}: {about.get(key, 'none')}, expected {value}"
            for key, value in self._first.items()
            if about.get(key) != value
        ]
        if different:
            raise ClusterError(
                f"a worker on {node} would give other numbers:\n  " + "\n  ".join(different) + "\nInstall the same "
                "versions and sources on every node, and let workers run on one kind of device (--accelerator)"
            )
