"""Learning rate and Muon's momentum as pure functions of the step."""

import math

from gptlab.training.config import (
    ComponentScheduleConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    MuonConfig,
    ScheduleConfig,
    WSDConfig,
)


def learning_rate(step: int, schedule: ScheduleConfig, *, lr: float, max_steps: int) -> float:
    """Returns the learning rate of optimizer step ``step``, counted from 0, in a run of ``max_steps``."""
    if isinstance(schedule, ComponentScheduleConfig):
        return float(schedule.function(step, lr=lr, max_steps=schedule.max_steps or max_steps))
    if step < schedule.warmup_steps:
        return warmup(step, lr=lr, steps=schedule.warmup_steps)
    match schedule:
        case ConstantConfig():
            return lr
        case CosineConfig():
            span = (schedule.warmup_steps, schedule.decay_steps or max_steps)
            return cosine(step, *span, lr=lr, min_lr=schedule.min_lr_ratio * lr)
        case LinearConfig():
            span = (schedule.warmup_steps, schedule.decay_steps or max_steps)
            return linear(step, *span, lr=lr, min_lr=schedule.min_lr_ratio * lr)
        case WSDConfig():
            start = max(schedule.warmup_steps, round(max_steps * (1 - schedule.decay_fraction)))
            return linear(step, start, max_steps, lr=lr, min_lr=schedule.min_lr_ratio * lr)


def warmup(step: int, *, lr: float, steps: int) -> float:
    """Returns the learning rate of a linear warm-up, which is ``lr`` at ``steps`` and above 0 at step 0 (nanoGPT)."""
    return lr * (step + 1) / (steps + 1)


def cosine(step: int, start: int, end: int, *, lr: float, min_lr: float) -> float:
    """Returns the learning rate of a cosine decay from ``lr`` to ``min_lr`` (Loshchilov and Hutter 2017)."""
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * _progress(step, start, end))) * (lr - min_lr)


def linear(step: int, start: int, end: int, *, lr: float, min_lr: float) -> float:
    """Returns the learning rate of a linear decay from ``lr`` to ``min_lr``."""
    return lr + _progress(step, start, end) * (min_lr - lr)


def momentum(step: int, config: MuonConfig) -> float:
    """Returns Muon's momentum at optimizer step ``step``, counted from 0: a linear warm-up (modded-nanogpt)."""
    first = config.momentum_warmup_from
    return first + _progress(step, 0, config.momentum_warmup_steps) * (config.momentum - first)


def _progress(step: int, start: int, end: int) -> float:
    """Returns the elapsed fraction of [start, end]: 0 before ``start``, 1 from ``end`` on, even if they are equal."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / max(end - start, 1))
