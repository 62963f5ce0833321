"""How many threads a model on the CPU computes with, and how they wait for each other.

OpenMP's threads spin as they wait for the slowest among them. On a core that a neighbour keeps busy, or under a
container's quota, that takes the very time that the slowest one needs: a job that should take twice as long takes ten
times as long or more (`benchmarks/busy_cores.py`). Two things help. Threads that sleep as they wait, which OpenMP is
told before it is loaded, so that only a program can do it that is ours (`sleep_while_waiting`, at the start of every
command). And no more threads than free cores, which `choose_threads` sees to when a model is loaded onto the CPU.

Whoever sets OMP_NUM_THREADS or MKL_NUM_THREADS, or gives torch another number than its own, has chosen.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LOOK = 0.2  # seconds to see how busy the cores are, which the system counts in hundredths


class CpuThreadsWarning(UserWarning):
    """Another number of CPU threads than torch's own was chosen, or another way to wait: which, and why."""


class _Chosen:
    """What this process was given: torch's own number, and ours."""

    own: int | None = None
    ours: int | None = None
    sleeping = False
    told: tuple[int, bool] | None = None


def choose_threads() -> int:
    """Give torch no more threads than the cores that this process may use and that are free; the number it has now.

    A user's choice is kept. A number that is torch's own cannot be told from none.

    Warns:
        CpuThreadsWarning: of what was changed and why, once as long as it is the same.
    """
    import torch  # not before `sleep_while_waiting`

    now = torch.get_num_threads()
    if any(os.environ.get(name) for name in NUMBER):
        return now
    if now == _Chosen.ours and _Chosen.own is not None:
        own = _Chosen.own
    elif now in _torchs_own():
        own = now
    else:
        return now
    may = usable_cores()
    number, why = own, ""
    if may < number:
        number = max(1, int(may))
        why = f"this process may use {_cores(may)}"
    if number > 1 and not any(os.environ.get(name) for name in WAITING):
        free = free_cores()
        if free is not None and round(free) < number:
            number = max(1, round(free))
            why = (
                f"others keep cores busy ({free:.1f} of {_cores(may)} free), where threads that wait for each other "
                "cost far more than the share; with OMP_WAIT_POLICY=passive set before Python starts, all can be used"
            )
    if number != now:
        torch.set_num_threads(number)
    _Chosen.own, _Chosen.ours = own, number
    _say(number, own, why)
    return number


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep as they wait, unless the user said how; for a program, before torch is imported."""
    if "torch" not in sys.modules and not any(os.environ.get(name) for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        _Chosen.sleeping = True


def usable_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use: those it may run on, or what its control groups allow, if that is less.

    Args:
        root: of the file system that says so.
    """
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        allowed = os.process_cpu_count() or 1
    else:
        allowed = len(_own_cores()) or os.cpu_count() or 1
    return min([float(allowed), *_quotas(root)])


def free_cores(root: Path = Path("/"), seconds: float = LOOK) -> float | None:
    """Cores that nobody else kept busy in a short time, among those that this process may run on; None if unknown.

    What this process used itself counts as free, and so does what runs with less priority.
    """
    before, began = _idle_ticks(root), time.process_time()
    time.sleep(seconds)
    after, own = _idle_ticks(root), time.process_time() - began
    if before is None or after is None or before.keys() != after.keys():
        return None
    shares = []
    for core, (free, total) in after.items():
        passed = total - before[core][1]
        shares.append((free - before[core][0]) / passed if passed > 0 else 1.0)
    return min(float(len(shares)), sum(shares) + own / seconds)


def _say(number: int, own: int, why: str) -> None:
    told = f"{number} CPU thread{'s' if number > 1 else ''}"
    if why:
        told += f" where torch would take {own}: {why}"
    if asleep := _Chosen.sleeping and number > 1:
        told += "; they sleep as they wait (OMP_WAIT_POLICY=passive), so that busy neighbours cost little"
    if (why or asleep) and _Chosen.told != (number, asleep):
        _Chosen.told = (number, asleep)
        warnings.warn(f"{told}; OMP_NUM_THREADS chooses another number", CpuThreadsWarning, stacklevel=4)


def _cores(n: float) -> str:
    return f"{n:g} core" + ("" if n == 1 else "s")


def _own_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _torchs_own(root: Path = Path("/")) -> set[int]:
    """What torch may have taken by itself: all cores, those it may run on, or (MKL's way) one of each two threads."""
    cores = _own_cores()
    numbers = {os.cpu_count() or 1, len(cores)}
    for some in (cores, range(os.cpu_count() or 1)):
        siblings = set()
        for core in some:
            file = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            siblings.add(_read(file) or str(core))
        numbers.add(len(siblings))
    return numbers


def _idle_ticks(root: Path) -> dict[int, tuple[int, int]] | None:
    """By core, ticks in which nobody with our priority ran, and all ticks."""
    own = {f"cpu{core}": core for core in _own_cores()}
    found = {}
    for line in (_read(root / "proc/stat") or "").splitlines():
        name, *numbers = line.split()
        if name in own:
            user, nice, system, idle, waiting, *others = map(int, numbers[:8])
            free = idle + waiting + (nice if os.nice(0) <= 0 else 0)
            found[own[name]] = (free, user + nice + system + idle + waiting + sum(others))
    return found if found and len(found) == len(own) else None


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each control group above this process allows, of either version."""
    for mount, folder in _groups(root):
        for place in (folder, *folder.parents):
            said = (_read(place / "cpu.max") or "").split()  # version 2: quota and period
            quota, period = (
                said
                if len(said) == 2
                else (
                    _read(place / "cpu.cfs_quota_us"),
                    _read(place / "cpu.cfs_period_us"),
                )
            )
            if quota and period and quota.isdecimal() and period.isdecimal() and int(quota) * int(period) > 0:
                yield int(quota) / int(period)  # "max", or -1, is no limit
            if place == mount:
                break


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Where the control groups of the CPU are mounted, and this process's own folder there."""
    mine = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        for kind in kinds.split(","):
            mine[kind] = path  # version 2 has no kind
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, *options) = left.split(), (right.split() or [""])
        if len(fields) < 5 or kind not in ("cgroup", "cgroup2"):
            continue
        own = mine.get("") if kind == "cgroup2" else mine.get("cpu")
        if own is None or (kind == "cgroup" and "cpu" not in options[-1].split(",")):
            continue
        mount = root / fields[4].lstrip("/")
        # In a container the mount may begin at this process's own group, whose path from outside is what is said.
        above = PurePosixPath(fields[3])
        outside = PurePosixPath(own)
        below = outside.relative_to(above) if outside.is_relative_to(above) else PurePosixPath()
        folder = mount / below
        yield mount, folder if ".." not in below.parts and folder.is_dir() else mount


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
