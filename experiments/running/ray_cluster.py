"""Ray itself: imported quietly, started on this machine or joined, and asked what room it has."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that asks for no card sees none; unset, Ray warns
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's own name for: every address is 127.0.0.1
MOST_DATA = 100 * 2**20  # bytes of fetched sets that are sent to nodes


class ClusterError(ValueError):
    """Ray is not here, or its workers cannot do this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a worker needs of its node."""

    cpus: float = 1
    gpus: float = 0
    memory: float = 0
    """Bytes."""
    accelerator: str | None = None
    """Ray's name of a kind of card, such as "A100"."""

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.memory / 1e9:.1f} GB of memory"] if self.memory else []
        return ", ".join([*parts, *([f"a card {self.accelerator}"] if self.accelerator else [])])

    @property
    def by_name(self) -> dict[str, float]:
        """In the names of Ray's resources."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        if self.accelerator:
            asked[f"accelerator_type:{self.accelerator}"] = 0.001
        return {name: amount for name, amount in asked.items() if amount}


def load(*, loopback: bool) -> Any:
    """Import Ray without its statistics and warnings.

    Args:
        loopback: let everything that is started here listen on this machine's own address only.

    Raises:
        ClusterError: it is not installed.
    """
    os.environ.update(QUIET | LOOPBACK if loopback else QUIET)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError:
        raise ClusterError(
            "several workers need Ray, which is not installed: pip install 'caa-lens[cluster]', or do without "
            "--workers, --engine and --address"
        ) from None
    return ray


@contextlib.contextmanager
def joined(ray: Any, address: str | None, n: int | None, demand: Demand) -> Iterator[None]:
    """Be connected to a cluster, or to one that is started here and ends with the block.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    if ray.is_initialized():  # by the caller, who ends it
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            cpus = max(os.cpu_count() or 1, round((n or 1) * demand.cpus))
            with same_imports():
                ray.init("local", include_dashboard=False, num_cpus=cpus, _node_ip_address="127.0.0.1", **quiet)
        else:
            # The experiments are not installed: their sources are sent to the nodes.
            sources = {"py_modules": [str(Path(__file__).resolve().parents[1])], "excludes": ["results", "__pycache__"]}
            ray.init(address=address, runtime_env=sources, **quiet)
    except ConnectionError as error:
        raise ClusterError(
            f"there is no cluster at address {address!r}: `ray start --head` begins one, and `ray start --address "
            f"HOST:PORT` on every other node joins it ({' '.join(str(error).split())})"
        ) from None
    with contextlib.suppress(AttributeError):  # what a lost worker has to say goes to Ray's logs, not to the terminal
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def same_imports() -> Iterator[None]:
    """Processes that are started inside find modules where this one does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def actor(ray: Any, kind: type, demand: Demand) -> Any:
    """A class as an actor with these resources, which is not started again by Ray: the driver sees to that."""
    options: dict[str, Any] = {"num_cpus": demand.cpus, "num_gpus": demand.gpus, "max_restarts": 0}
    if demand.memory:
        options["memory"] = int(demand.memory)
    if demand.accelerator:
        options["accelerator_type"] = demand.accelerator
    return ray.remote(kind).options(**options)


def visible_gpus() -> int:
    """Cards that this process may use."""
    import torch

    return torch.cuda.device_count()


def demanded(
    workers: int | None,
    address: str | None,
    device: str | None,
    *,
    memory: float,
    gpus: float | None = None,
    cpus: float | None = None,
    accelerator: str | None = None,
) -> tuple[int | None, Demand]:
    """How many workers, None for as many as there is room for, and what each needs, where it is not said.

    On this machine workers share its cards and cores; on a cluster each asks for a card, or without cards for `memory`.
    """
    on_cards = device in (None, "auto") or str(device).startswith("cuda")
    if address is not None:
        gpus = float(on_cards) if gpus is None else gpus
        return workers, Demand(cpus=cpus or 1, gpus=gpus, memory=0 if gpus else memory, accelerator=accelerator)
    n_cards = visible_gpus() if on_cards else 0
    if workers is None:
        workers = max(1, int(n_cards / (gpus or 1)))
    if gpus is None:
        gpus = 1 / -(-workers // n_cards) if n_cards else 0
    cpus = cpus or max(1, (os.cpu_count() or 1) // workers)
    return workers, Demand(cpus=cpus, gpus=gpus, accelerator=accelerator)


def capacity(ray: Any, demand: Demand) -> int:
    """How many workers all living nodes have room for."""
    return sum(
        int(min(node["Resources"].get(name, 0.0) / amount for name, amount in demand.by_name.items()))
        for node in ray.nodes()
        if node["Alive"]
    )


def described(ray: Any) -> str:
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    return f"the cluster's {len(alive)} node(s) have {has}, {resources.get('memory', 0) / 1e9:.1f} GB of memory"


def fetched_data() -> dict[str, bytes]:
    """Fetched sets, by place in the data folder, for nodes that lack them.

    Raises:
        ClusterError: they are too much to be sent.
    """
    from caa_lens.paper.questions import data_folder

    root = data_folder()
    files = [file for file in sorted(root.rglob("*")) if file.is_file()] if root.is_dir() else []
    if (size := sum(file.stat().st_size for file in files)) > MOST_DATA:
        raise ClusterError(
            f"{root} holds {size / 1e6:.0f} MB, expected at most {MOST_DATA / 1e6:.0f} MB of fetched sets: take out "
            "what is not of the paper"
        )
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
