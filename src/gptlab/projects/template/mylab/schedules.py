"""Schedules: functions of the step, counted from 0, that return its learning rate."""


def inverse_sqrt(step: int, *, lr: float, max_steps: int, warmup_steps: int) -> float:
    """Returns a rate that increases linearly, then decreases with 1 / sqrt(step) (Vaswani et al. 2017, section 5.3)."""
    return lr * min((step + 1) / warmup_steps, (warmup_steps / (step + 1)) ** 0.5)
