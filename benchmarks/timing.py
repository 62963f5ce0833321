"""What the benchmarks share: the clock, the machine's name, and the table."""

import platform
import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """The best of some runs, with the device's queue empty before and after."""
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def cpu_seconds(run: Callable[[], object]) -> float:
    """What one run takes of the processor, all threads of this process together; waiting for it is not counted."""
    began = time.process_time()
    run()
    return time.process_time() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """The processor or card that the numbers belong to."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def print_table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """A Markdown table, ready for the docs."""
    cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    print(f"\n### {title}\n\n{machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in cells:
        print("| " + " | ".join(row) + " |")


def as_transformer_lens_loads_it(model: object) -> object:
    """The same model with its weights as `HookedTransformer.from_pretrained` leaves them: plain contiguous tensors."""
    import copy

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():  # type: ignore[attr-defined]
        parameter.data = parameter.data.contiguous().clone(memory_format=torch.contiguous_format)
    return twin
