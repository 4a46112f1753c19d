"""All-reduce of a small vector per step, which returns its result one call later instead of blocking."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class DelayedAllReduce:
    """Sums a small vector over all ranks; each sum is returned one call later.

    A call starts the sum of its own values and returns that of the previous call, which has had a full step to finish.
    Thus no rank waits for the slowest one, and the host does not wait for its device. Every rank must make the same
    calls in the same order; all ranks then get the same sums at the same call. In a single process, the delay is the
    same, but there is no collective.
    """

    def __init__(self) -> None:
        self._pending: Callable[[], list[float]] | None = None

    def add(self, values: Tensor) -> list[float] | None:
        """Starts the sum of ``values`` (n,); returns the sums of the previous call, or None if none are pending."""
        earlier = self.collect()
        self._pending = _on_cuda(values) if values.device.type == "cuda" else _on_cpu(values)
        return earlier

    def collect(self) -> list[float] | None:
        """Waits for the pending sums and returns them, or None if none are pending."""
        if self._pending is None:
            return None
        sums, self._pending = self._pending(), None
        return sums


def _on_cpu(values: Tensor) -> Callable[[], list[float]]:
    """Starts a sum in float64, computed by Gloo's threads."""
    sums = values.detach().to(torch.float64, copy=True)
    work = dist.all_reduce(sums, async_op=True) if _is_distributed() else None

    def wait() -> list[float]:
        if work is not None:
            work.wait()
        return sums.tolist()

    return wait


def _on_cuda(values: Tensor) -> Callable[[], list[float]]:
    """Starts a sum in float32 and its copy to the host, both in stream order; only reading the result waits."""
    sums = values.detach().to(torch.float32, copy=True)
    if _is_distributed():
        dist.all_reduce(sums)  # the device waits, the host does not
    on_host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
    on_host.copy_(sums, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return on_host.tolist()

    return wait


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
