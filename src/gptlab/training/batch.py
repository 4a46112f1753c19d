"""How a global batch is dealt out to devices. Imports no torch."""

from typing import NamedTuple

from gptlab.errors import UserError


class BatchPlan(NamedTuple):
    """``world_size * accumulation * micro_batch_size`` sequences make one optimizer step.

    ``world_size`` counts the ranks that read data of their own: a group that shares one model is one of them.
    """

    world_size: int
    micro_batch_size: int
    accumulation: int


def plan_batch(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> BatchPlan:
    """Derive the accumulation from the global batch; UserError names the nearest batches that can be dealt out."""
    at_once = world_size * (micro_batch_size or 1)
    if global_batch_size % at_once:
        below = global_batch_size // at_once * at_once
        nearest = [str(size) for size in (below, below + at_once) if size]
        share = f"{world_size} device{'s' if world_size > 1 else ''}"
        if micro_batch_size:
            share += f" with {micro_batch_size} sequences each at once (train.micro_batch_size)"
        raise UserError(
            f"train.global_batch_size={global_batch_size} cannot be dealt out to {share}: "
            f"it is no multiple of {at_once}. The nearest: {' and '.join(nearest)}."
        )
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    return BatchPlan(world_size, micro_batch_size, global_batch_size // (world_size * micro_batch_size))
