"""How a global batch is divided among devices and micro-batches. Imports no torch."""

from collections.abc import Sequence
from typing import NamedTuple

from gptlab.data.order import BatchSizeSchedule, BatchSizeStage
from gptlab.errors import UserError


class BatchPlan(NamedTuple):
    """``world_size * accumulation * micro_batch_size`` sequences make one optimizer step, or fewer in earlier stages.

    Attributes:
        world_size: Ranks that read data of their own: a group that shares one model counts once.
        micro_batch_size: Sequences that a device holds at once; in earlier stages, fewer.
        accumulation: Micro-batches of a step, the same in all stages.
        earlier: Stages before, of smaller batches.
    """

    world_size: int
    micro_batch_size: int
    accumulation: int
    earlier: tuple[BatchSizeStage, ...] = ()

    @property
    def stages(self) -> BatchSizeSchedule:
        """The number of sequences of each step."""
        return BatchSizeSchedule(self.world_size * self.accumulation * self.micro_batch_size, self.earlier)


def plan_batch(
    global_batch_size: int, micro_batch_size: int | None, world_size: int, earlier: Sequence[BatchSizeStage] = ()
) -> BatchPlan:
    """Derives the accumulation from the global batch.

    Args:
        global_batch_size: Sequences of a step in the last stage.
        micro_batch_size: Sequences that a device holds at once; None is its whole share of the batch.
        world_size: Ranks that read data of their own.
        earlier: Stages before, of smaller batches.

    Raises:
        UserError: A batch is not divisible; the message names the nearest batches that are.
    """
    devices = f"{world_size} device{'s' if world_size > 1 else ''}"
    factors = f"{devices} x train.micro_batch_size={micro_batch_size}" if micro_batch_size else devices
    _check_divisible("train.global_batch_size", global_batch_size, factors, world_size * (micro_batch_size or 1))
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    accumulation = global_batch_size // (world_size * micro_batch_size)
    for _, size in earlier:
        factors = f"{devices} x {accumulation} accumulated"
        _check_divisible("a batch of train.batch_schedule", size, factors, world_size * accumulation)
    return BatchPlan(world_size, micro_batch_size, accumulation, tuple(earlier))


def _check_divisible(name: str, batch: int, factors: str, divisor: int) -> None:
    """Raises UserError if a batch is not divisible by ``divisor``, which is the product of ``factors``."""
    if batch % divisor:
        below = batch // divisor * divisor
        nearest = [str(size) for size in (below, below + divisor) if size]
        raise UserError(
            f"{name}={batch} is not divisible by {divisor} ({factors}). The nearest: {' and '.join(nearest)}."
        )
