"""Which devices there are, and how much memory one has left."""

import gc

import psutil
import torch


def devices() -> dict[str, int]:
    """How many of each kind this machine has: `cpu`, `cuda`, `mps`."""
    return {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device: what it has free, and what torch holds there and does not use.

    A deleted model's memory stays with torch's allocator on an accelerator, for the next tensors. Some of it may lie in
    pieces between others that are in use, too small for a large tensor, which can then fail although the sum would be
    enough. MPS shares the machine's memory.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        return min(free + max(0, torch.cuda.memory_reserved(device) - used), total - used)
    free = psutil.virtual_memory().available
    if device.type == "mps":
        free += max(0, torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory())
    return free


def make_room(device: torch.device | str, n_bytes: float | int) -> None:
    """Give up what nobody uses any more, if the device has not `n_bytes` free without that.

    A deleted model whose hooks refer to it, or that an exception's frames hold, stays until Python's collector comes
    by. What an accelerator's allocator holds is cut to the sizes of old tensors: returned to the device it comes back
    whole.
    """
    device = torch.device(device)
    if free_memory(device) < n_bytes:
        gc.collect()
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < n_bytes:
        torch.cuda.empty_cache()
    elif device.type == "mps" and psutil.virtual_memory().available < n_bytes:
        torch.mps.empty_cache()
