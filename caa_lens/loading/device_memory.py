"""Which devices there are, and how much memory one has left."""

import psutil
import torch


def devices() -> dict[str, int]:
    """How many of each kind this machine has: `cpu`, `cuda`, `mps`."""
    return {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device. MPS shares the machine's memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
