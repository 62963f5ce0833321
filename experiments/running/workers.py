"""Several processes on one run: the same command, started once for every worker, each on a GPU of its own.

They share the work through the run folder, as any two runs on one folder do (see `runner`), so starting and watching
them is all there is to do. Whatever they leave undone, the process that started them does itself.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

PARENT = "CAA_LENS_EXPERIMENTS_PARENT"  # process id, in a worker's environment


def work_together(command: Sequence[str], n: int, *, device: str | None, watch: Callable[[], None]) -> None:
    """Run a command `n` times at once and wait until all have ended; `watch` is called several times a second.

    Raises:
        ValueError: for fewer than one worker.
    """
    if n < 1:
        raise ValueError(f"workers must be at least 1, got {n}")
    processes = []
    try:
        for environment in _environments(n, device):
            full = {**os.environ, **environment, PARENT: str(os.getpid())}
            processes.append(subprocess.Popen(command, env=full, stdout=subprocess.DEVNULL))
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            watch()
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def is_worker() -> bool:
    return PARENT in os.environ


def stop_if_orphaned() -> None:
    """End a worker whose run is gone, so that killing the run frees the GPUs; called between units."""
    if is_worker() and os.getppid() != int(os.environ[PARENT]):
        sys.exit("the run that started this worker is gone")


def _environments(n: int, device: str | None) -> list[dict[str, str]]:
    """Each worker's own: its GPU, or else its share of the cores."""
    gpus = _visible_gpus() if device in (None, "cuda") else []
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(n)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // n))
    return [{"OMP_NUM_THREADS": threads}] * n


def _visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
