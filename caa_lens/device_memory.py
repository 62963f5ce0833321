"""How much memory a device has left."""

import psutil
import torch


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device. MPS shares the machine's memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
