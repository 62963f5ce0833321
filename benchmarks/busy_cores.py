"""What threads and waiting cost beside neighbours that keep cores busy.

    python benchmarks/busy_cores.py                  # none, one, as many as cores; two minutes on free cores
    python benchmarks/busy_cores.py --neighbours 0 2 --pairs 1     # quicker

A neighbour is a process that does nothing but count. Ways to run are processes of their own, because what waits how is
decided when OpenMP is loaded. Each loads the demo model, does the job once unmeasured, and then takes turns with the
others, so that whatever else the machine does meets all of them; the table has the best round of each. The job is an
extraction of a few pairs and a sweep of a few others.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from timing import print_table

from caa_lens.models.cpu_threads import NUMBER, WAITING


def ways(cores: int) -> dict[str, dict[str, str]]:
    """Environments by what the table calls them; the first is what happens by itself."""
    every = {"OMP_NUM_THREADS": str(cores)}
    return {
        f"{cores} threads that spin as they wait (torch's own)": every,
        f"{cores} threads that sleep as they wait (`caa-lens`)": every | {"OMP_WAIT_POLICY": "passive"},
        "1 thread (`load_model` where no core is free)": {"OMP_NUM_THREADS": "1"},
    }


def work(pairs: int, layers: int) -> None:
    """One process: says when it is ready, and does the job at each line that it reads."""
    import caa_lens as cl

    model = cl.load_model("demo", device="cpu")
    train, test = cl.ContrastSet.load("sentiment").sample(2 * pairs, seed=0).split(test=pairs)
    chosen = list(range(0, model.cfg.n_layers, model.cfg.n_layers // layers))

    def job() -> None:
        vectors = cl.extract(model, train, progress=False)
        cl.sweep(model, test, vectors, layers=chosen, progress=False)

    job()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        job()
        print(time.perf_counter() - began, flush=True)


@contextmanager
def neighbours(n: int) -> Iterator[None]:
    """Processes that keep cores busy as long as the block lasts."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, cores])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.pairs, args.layers)
        return
    clean = {name: value for name, value in os.environ.items() if name not in (*NUMBER, *WAITING)}
    command = [sys.executable, __file__, "--work", "--pairs", str(args.pairs), "--layers", str(args.layers)]
    best: dict[str, list[float]] = {}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(
                subprocess.Popen(
                    command,
                    env=clean | environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for name, environment in ways(cores).items()
        }
        for process in running.values():
            process.stdout.readline()
        loads = []
        for n in args.neighbours:
            with neighbours(n):
                times: dict[str, list[float]] = {name: [] for name in running}
                for _ in range(args.rounds):
                    for name, process in running.items():
                        print("go", file=process.stdin, flush=True)
                        times[name].append(float(process.stdout.readline()))
            loads.append(os.getloadavg()[0])
            for name, some in times.items():
                best.setdefault(name, []).append(min(some))
    own = next(iter(best.values()))
    rows: list[list[object]] = [
        [name, *(f"{one:.1f} s ({one / first:.2f})" for one, first in zip(seconds, own, strict=True))]
        for name, seconds in best.items()
    ]
    print_table("Threads beside busy neighbours", ["threads", *(f"{n} neighbours" for n in args.neighbours)], rows)
    print(f"\nIn brackets the ratio to torch's own. Load averages at the end of each: {', '.join(map(str, loads))}.")


if __name__ == "__main__":
    main()
