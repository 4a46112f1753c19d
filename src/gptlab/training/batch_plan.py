"""Division of the global batch among devices and micro-batches. Imports no torch."""

from collections.abc import Sequence
from typing import NamedTuple

from gptlab.data.order import BatchSizeSchedule, BatchSizeStage
from gptlab.errors import UserError


class BatchPlan(NamedTuple):
    """Division of a global batch of ``world_size * accumulation * micro_batch_size`` sequences.

    Attributes:
        world_size: Number of data-parallel ranks; a tensor-parallel group counts once.
        micro_batch_size: Sequences per device and micro-batch in the last stage.
        accumulation: Gradient accumulation: micro-batches per step, the same in all stages.
        earlier: Earlier stages with smaller batches (train.batch_schedule).
        past: Stages before these that have ended (train.past_batches), which may have any batch size.
    """

    world_size: int
    micro_batch_size: int
    accumulation: int
    earlier: tuple[BatchSizeStage, ...] = ()
    past: tuple[BatchSizeStage, ...] = ()

    @property
    def stages(self) -> BatchSizeSchedule:
        """Batch size schedule, in sequences per step."""
        return BatchSizeSchedule(self.world_size * self.accumulation * self.micro_batch_size, self.earlier, self.past)


def plan_batch(
    global_batch_size: int,
    micro_batch_size: int | None,
    world_size: int,
    earlier: Sequence[BatchSizeStage] = (),
    past: Sequence[BatchSizeStage] = (),
) -> BatchPlan:
    """Derives gradient accumulation from the global batch size.

    Args:
        global_batch_size: Sequences per step in the last stage.
        micro_batch_size: Sequences per device and micro-batch; None is the device's full share of the batch.
        world_size: Number of data-parallel ranks.
        earlier: Earlier stages with smaller batches.
        past: Stages before these that have ended.

    Raises:
        UserError: A batch size is not divisible; the message has the nearest sizes that are.
    """
    devices = f"{world_size} device{'s' if world_size > 1 else ''}"
    factors = f"{devices} x train.micro_batch_size={micro_batch_size}" if micro_batch_size else devices
    _check_divisible("train.global_batch_size", global_batch_size, factors, world_size * (micro_batch_size or 1))
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    accumulation = global_batch_size // (world_size * micro_batch_size)
    for _, size in earlier:
        factors = f"{devices} x accumulation={accumulation}"
        _check_divisible("train.batch_schedule: batch size", size, factors, world_size * accumulation)
    return BatchPlan(world_size, micro_batch_size, accumulation, tuple(earlier), tuple(past))


def _check_divisible(name: str, batch: int, factors: str, divisor: int) -> None:
    """Raises UserError if a batch size is not divisible by ``divisor``, of which ``factors`` describes the factors."""
    if batch % divisor:
        below = batch // divisor * divisor
        nearest = [str(size) for size in (below, below + divisor) if size]
        raise UserError(
            f"{name}={batch} is not divisible by {divisor} ({factors}). Nearest valid values: {' and '.join(nearest)}."
        )
