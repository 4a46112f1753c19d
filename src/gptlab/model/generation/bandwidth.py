"""How fast memory is read: what bounds the writing of one text."""

import statistics
import time

import torch

READ = 2**28  # bytes, more than caches hold
TIMES = 7


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second at which the device, with all the threads that torch uses, sums up a large tensor."""
    numbers = torch.ones(READ // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(TIMES + 1):
        _wait(device)
        begun = time.perf_counter()
        numbers.sum()
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return READ / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
