"""How a global batch is dealt out to devices. Imports no torch."""

from collections.abc import Sequence
from typing import NamedTuple

from gptlab.data.batch_size_schedule import BatchSizeSchedule, BatchSizeStage
from gptlab.errors import UserError


class BatchPlan(NamedTuple):
    """``world_size * accumulation * micro_batch_size`` sequences make one optimizer step, or fewer in earlier stages.

    The accumulation is the same in all stages: micro-batches are smaller in the earlier ones. ``world_size`` counts the
    ranks that read data of their own: a group that shares one model is one of them.
    """

    world_size: int
    micro_batch_size: int
    accumulation: int
    earlier: tuple[BatchSizeStage, ...] = ()

    @property
    def stages(self) -> BatchSizeSchedule:
        """How many sequences every step has."""
        return BatchSizeSchedule(self.world_size * self.accumulation * self.micro_batch_size, self.earlier)


def plan_batch(
    global_batch_size: int, micro_batch_size: int | None, world_size: int, earlier: Sequence[BatchSizeStage] = ()
) -> BatchPlan:
    """Derive the accumulation from the global batch.

    Args:
        global_batch_size: Sequences of a step.
        micro_batch_size: Sequences that a device holds at once; None is its whole share.
        world_size: Ranks that read data of their own.
        earlier: Stages before, of smaller batches.

    Raises:
        UserError: A batch cannot be dealt out; it names the nearest that can.
    """
    share = f"{world_size} device{'s' if world_size > 1 else ''}"
    held = f"{share} with {micro_batch_size} sequences each at once (train.micro_batch_size)"
    at_once = world_size * (micro_batch_size or 1)
    _check_multiple("train.global_batch_size", global_batch_size, held if micro_batch_size else share, at_once)
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    accumulation = global_batch_size // (world_size * micro_batch_size)
    for _, size in earlier:
        dealt = f"{share} x {accumulation} accumulated"
        _check_multiple("a batch of train.batch_schedule", size, dealt, world_size * accumulation)
    return BatchPlan(world_size, micro_batch_size, accumulation, tuple(earlier))


def _check_multiple(name: str, batch: int, share: str, parts: int) -> None:
    """See that a batch can be dealt out."""
    if batch % parts:
        below = batch // parts * parts
        nearest = [str(size) for size in (below, below + parts) if size]
        raise UserError(
            f"{name}={batch} cannot be dealt out to {share}: it is no multiple of {parts}. "
            f"The nearest: {' and '.join(nearest)}."
        )
