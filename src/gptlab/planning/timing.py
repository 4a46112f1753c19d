"""How long a run takes. Imports no torch."""

from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.model.config import flops_per_token
from gptlab.planning.calibration import Measurement
from gptlab.training.hardware import Hardware

FORWARD = 3  # an evaluated token costs a third of a trained one (Kaplan et al. 2020, section 2.1)


class RunLength(NamedTuple):
    """How much there is to do.

    Attributes:
        steps: Of the optimizer.
        tokens: That are trained on.
        evaluations: One at the end included.
        evaluated: Tokens of each; None where that is the whole val split, which is not known yet.
    """

    steps: int
    tokens: int
    evaluations: int
    evaluated: int | None


class TimeEstimate(NamedTuple):
    """How long a run takes on something.

    Attributes:
        what: It runs on.
        tokens_per_second: Of training, all devices together.
        seconds: Of the whole run.
        why: Where the speed is from.
    """

    what: str
    tokens_per_second: float
    seconds: float
    why: str


def run_length(config: RunConfig, val_tokens: int | None) -> RunLength:
    """Count what a run does; ``val_tokens`` are those of val, where they are known."""
    block, steps, windows = config.model.block_size, config.steps, config.train.eval_windows
    whole = None if val_tokens is None else (val_tokens - 1) // block
    scored = whole if windows is None else min(windows, whole or windows)
    tokens = config.train.stages.first(steps) * block
    return RunLength(steps, tokens, -(-steps // config.train.eval_every), scored and scored * block)


def estimate_at_mfu(config: RunConfig, length: RunLength, hardware: Hardware, mfu: float) -> TimeEstimate:
    """Forecast by the share of its peak that a GPU reaches in training (Chowdhery et al. 2022, appendix B)."""
    assert hardware.gpu is not None  # noqa: S101
    speed = mfu * hardware.gpu.flops * hardware.world_size / flops_per_token(config.model)
    evaluated = length.evaluations * (length.evaluated or 0) / FORWARD
    what = hardware.gpu.name if hardware.world_size == 1 else f"{hardware.world_size} x {hardware.gpu.name}"
    return TimeEstimate(
        what, speed, (length.tokens + evaluated) / speed, f"{mfu:.0%} of {hardware.gpu.flops / 1e12:g} TFLOP/s"
    )


def estimate_from_measurement(length: RunLength, hardware: Hardware, measured: Measurement) -> TimeEstimate:
    """Forecast by what a run of this shape took here."""
    seconds = measured.first_step_seconds
    seconds += length.tokens * (1 - 1 / length.steps) / measured.tokens_per_second
    speed = FORWARD * measured.tokens_per_second
    around = max(0.0, measured.evaluation_seconds - measured.evaluated / speed)  # the sample, the checkpoint
    seconds += length.evaluations * (around + (length.evaluated or measured.evaluated) / speed)
    return TimeEstimate(hardware.name, measured.tokens_per_second, seconds, f"measured here: {measured.source}")
