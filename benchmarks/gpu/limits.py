"""What a device can do at most, measured: its largest matrix product, and a copy of much memory."""

import torch
from timing import seconds


def matrix_limit(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a large square matrix product."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    seconds(lambda: a @ b)
    return 2 * size**3 * 10 / seconds(lambda: [a @ b for _ in range(10)], 3)


def copy_limit(device: torch.device, n_bytes: int) -> float:
    """Bytes a second of a large copy on the device, those that are read and those that are written."""
    a = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds(lambda: b.copy_(a))
    return 2 * n_bytes * 5 / seconds(lambda: [b.copy_(a) for _ in range(5)], 3)
