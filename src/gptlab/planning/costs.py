"""How long a run takes, what it sends over the network, and what it writes to disk. Imports no torch."""

from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.activations import NUMBER_SIZES
from gptlab.planning.calibration import Measurement
from gptlab.planning.memory import ParallelLayout, count_shares
from gptlab.training.config import MuonConfig
from gptlab.training.hardware import Hardware

FORWARD = 3  # an evaluated token costs a third of a trained one (Kaplan et al. 2020, section 2.1)


class RunLength(NamedTuple):
    """Length of a run.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens trained on.
        evaluations: Evaluations, with the one at the end.
        evaluated: Tokens of each evaluation; None if that is the whole val split, whose size is not known yet.
    """

    steps: int
    tokens: int
    evaluations: int
    evaluated: int | None


class TimeEstimate(NamedTuple):
    """Forecast of a run's duration.

    Attributes:
        what: The device.
        tokens_per_second: Training throughput of all devices together.
        seconds: Duration of the whole run.
        why: The source of the throughput.
    """

    what: str
    tokens_per_second: float
    seconds: float
    why: str


class DiskUsage(NamedTuple):
    """Bytes on disk.

    Attributes:
        data: The tokens.
        checkpoint: One checkpoint: weights and moments.
        kept: All checkpoints that exist at a time, including the one being written.
    """

    data: float
    checkpoint: float
    kept: float


def run_length(config: RunConfig, val_tokens: int | None) -> RunLength:
    """Returns the length of a run; ``val_tokens`` is the size of the val split, or None if it is not known."""
    block, steps, windows = config.model.block_size, config.steps, config.train.eval_windows
    whole = None if val_tokens is None else (val_tokens - 1) // block
    scored = whole if windows is None else min(windows, whole or windows)
    tokens = config.train.stages.first(steps) * block
    return RunLength(steps, tokens, -(-steps // config.train.eval_every), scored and scored * block)


def estimate_at_mfu(config: RunConfig, length: RunLength, hardware: Hardware, mfu: float) -> TimeEstimate:
    """Forecasts by MFU, the share of its peak that a GPU reaches in training (Chowdhery et al. 2022, appendix B)."""
    assert hardware.gpu is not None  # noqa: S101
    speed = mfu * hardware.gpu.flops * hardware.world_size / flops_per_token(config.model)
    evaluated = length.evaluations * (length.evaluated or 0) / FORWARD
    what = hardware.gpu.name if hardware.world_size == 1 else f"{hardware.world_size} x {hardware.gpu.name}"
    return TimeEstimate(
        what, speed, (length.tokens + evaluated) / speed, f"{mfu:.0%} of {hardware.gpu.flops / 1e12:g} TFLOP/s"
    )


def estimate_from_measurement(length: RunLength, hardware: Hardware, measured: Measurement) -> TimeEstimate:
    """Forecasts by what a run of this shape took on this machine."""
    seconds = measured.first_step_seconds
    seconds += length.tokens * (1 - 1 / length.steps) / measured.tokens_per_second
    speed = FORWARD * measured.tokens_per_second
    around = max(0.0, measured.evaluation_seconds - measured.evaluated / speed)  # the sample, the checkpoint
    seconds += length.evaluations * (around + (length.evaluated or measured.evaluated) / speed)
    return TimeEstimate(hardware.name, measured.tokens_per_second, seconds, f"measured here: {measured.source}")


def network_traffic(config: RunConfig, spread: ParallelLayout, precision: str, micro_batch: int) -> float:
    """Returns the bytes that a device sends in a step.

    With rings (Patarasuk and Yuan 2009), an all-reduce of a tensor sends 2 (n - 1) / n of its bytes, an all-gather or a
    reduce-scatter (n - 1) / n. FSDP gathers every block for the forward pass and, where it was freed, again for the
    backward pass (Zhao et al. 2023, section 3).
    """
    n, kinds = spread.copies, NUMBER_SIZES[precision]
    ring = (n - 1) / n
    if spread.strategy == "single":
        return 0.0
    parts = count_shares(config.model, spread.split)
    gradients = parts.all * kinds.weight
    if spread.strategy == "ddp":
        return 2 * ring * gradients
    accumulation = max(1, config.train.global_batch_size // (micro_batch * n))
    times = 2 if config.trainer.reshard_after_forward else 1
    gathered = (times * parts.blocks + parts.rest) * kinds.product
    sharing = 0.0
    if spread.split > 1:
        sharing = _within_blocks(config, spread, kinds.product, micro_batch)
    return ring * gradients + accumulation * (ring * gathered + sharing)


def _within_blocks(config: RunConfig, spread: ParallelLayout, size: int, micro_batch: int) -> float:
    """Returns the bytes that tensor-parallel devices send for one micro-batch.

    Attention and MLP each sum their output in the forward pass and their input's gradient in the backward pass
    (Shoeybi et al. 2019, section 3); queries, keys and values go over all devices to come by heads, and back.
    """
    model, ring = config.model, (spread.split - 1) / spread.split
    tensor = micro_batch * model.block_size * model.n_embd * size
    return model.n_layer * ring * tensor * (2 * 4 + 2 * 3)


def disk_usage(config: RunConfig, precision: str, tokens: int) -> DiskUsage:
    """Returns the bytes on disk of a run.

    Args:
        config: The configuration, with the vocabulary.
        precision: Lightning's name of the precision.
        tokens: Tokens of the corpus, or those that the run reads if the corpus is not known yet.
    """
    model, kept = config.model, 0
    numbers = 3 * parameter_count(model)
    if isinstance(config.optimizer, MuonConfig):
        numbers -= count_shares(model).matrices
    if config.train.ema_decay is not None:
        numbers += parameter_count(model)
    each = float(numbers * NUMBER_SIZES[precision].weight)
    if wanted := config.callbacks.checkpoint:
        kept = wanted.keep_last + wanted.keep_best + 1
    return DiskUsage(float(tokens * (2 if model.known_vocab_size <= 2**16 else 4)), each, kept * each)
