"""Forecast of the time, network traffic and disk space of a run. Imports no torch."""

from typing import Literal, NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.model.config import flops_per_token, forward_flops_per_token
from gptlab.planning.activations import DTYPE_SIZES
from gptlab.planning.calibration import Measurement
from gptlab.planning.memory import ParallelLayout, count_shares, optimizer_state_size
from gptlab.training.config import MuonConfig
from gptlab.training.hardware import Hardware


class RunLength(NamedTuple):
    """Length of a run.

    Attributes:
        steps: Number of optimizer steps.
        tokens: Number of training tokens.
        evaluations: Number of evaluations, including the last one.
        evaluated: Number of tokens per evaluation, or None for the whole val split if its size is unknown.
    """

    steps: int
    tokens: int
    evaluations: int
    evaluated: int | None


class TimeEstimate(NamedTuple):
    """Forecast of the duration of a run.

    Attributes:
        what: Name of the device, with the number of devices if there are several.
        tokens_per_second: Training throughput of all devices.
        seconds: Duration of the whole run.
        why: Source of the throughput.
        network: How the time of the network traffic is counted: "included" in a measurement or not needed by a single
            device; "excluded", since the bandwidth is unknown; "overlapped" with computing, as far as possible; or
            "sequential", i.e. added to that of computing.
        step_computing: Time of computing per step in seconds, or None if the network is included.
        step_network: Time of the network traffic per step in seconds, or None if it is included or unknown.
    """

    what: str
    tokens_per_second: float
    seconds: float
    why: str
    network: Literal["included", "excluded", "overlapped", "sequential"] = "included"
    step_computing: float | None = None
    step_network: float | None = None


class DiskUsage(NamedTuple):
    """Disk space of a run in bytes.

    Attributes:
        data: Prepared tokens.
        checkpoint: One checkpoint: all weights, and the optimizer state of the trained ones.
        kept: All checkpoints that exist at the same time, including the one being written.
    """

    data: float
    checkpoint: float
    kept: float


def run_length(config: RunConfig, val_tokens: int | None) -> RunLength:
    """Returns the length of a run; ``val_tokens`` is the size of the val split, or None if it is unknown."""
    block, steps, windows = config.model.block_size, config.steps, config.train.eval_windows
    whole = None if val_tokens is None else (val_tokens - 1) // block
    scored = whole if windows is None else min(windows, whole or windows)
    tokens = config.train.stages.first(steps) * block
    return RunLength(steps, tokens, -(-steps // config.train.eval_every), scored and scored * block)


def estimate_at_mfu(config: RunConfig, length: RunLength, hardware: Hardware, mfu: float) -> TimeEstimate:
    """Forecasts the duration of computing from the model FLOPs utilization, MFU (Chowdhery et al. 2022, appendix B).

    Network traffic is not included; see ``add_network``.

    Args:
        config: Configuration with the vocabulary size.
        length: Length of the run.
        hardware: GPUs with known peak FLOP/s.
        mfu: MFU, between 0 and 1.
    """
    assert hardware.gpu is not None  # noqa: S101
    speed = mfu * hardware.gpu.flops * hardware.world_size / flops_per_token(config.model, config.lora)
    evaluated = length.evaluations * (length.evaluated or 0) * _evaluation_share(config)
    what = hardware.gpu.name if hardware.world_size == 1 else f"{hardware.world_size} x {hardware.gpu.name}"
    return TimeEstimate(
        what, speed, (length.tokens + evaluated) / speed, f"{mfu:.0%} of {hardware.gpu.flops / 1e12:g} TFLOP/s"
    )


def add_network(time: TimeEstimate, length: RunLength, traffic: float, bandwidth: float | None) -> list[TimeEstimate]:
    """Adds the time of the network traffic of the training steps to the time of computing.

    The time of a step is between the larger one of both, if all traffic overlaps with computing, and their sum.

    Args:
        time: Time of computing.
        length: Length of the run.
        traffic: Number of bytes that a device sends per step.
        bandwidth: Bytes per second that each device sends while all do, or None if it is unknown.

    Returns:
        The time with overlap and that without; or one time, if there is no traffic or the bandwidth is unknown.
    """
    if not traffic:
        return [time]
    tokens = length.tokens / length.steps
    computing = tokens / time.tokens_per_second
    if bandwidth is None:
        return [time._replace(network="excluded", step_computing=computing)]
    network = traffic / bandwidth

    def with_step(seconds: float, kind: Literal["overlapped", "sequential"]) -> TimeEstimate:
        whole = time.seconds + length.steps * (seconds - computing)
        return time._replace(
            tokens_per_second=tokens / seconds,
            seconds=whole,
            network=kind,
            step_computing=computing,
            step_network=network,
        )

    return [with_step(max(computing, network), "overlapped"), with_step(computing + network, "sequential")]


def estimate_from_measurement(
    config: RunConfig, length: RunLength, hardware: Hardware, measured: Measurement
) -> TimeEstimate:
    """Forecasts the duration from the measurement of a similar run on this machine."""
    seconds = measured.first_step_seconds
    seconds += length.tokens * (1 - 1 / length.steps) / measured.tokens_per_second
    speed = measured.tokens_per_second / _evaluation_share(config)
    overhead = max(0.0, measured.evaluation_seconds - measured.evaluated / speed)  # sample and checkpoint
    seconds += length.evaluations * (overhead + (length.evaluated or measured.evaluated) / speed)
    return TimeEstimate(
        hardware.name, measured.tokens_per_second, seconds, f"measured on this machine: {measured.source}"
    )


def _evaluation_share(config: RunConfig) -> float:
    """Returns the FLOPs of an evaluated token as a fraction of those of a training token: 1/3, or more with LoRA."""
    return forward_flops_per_token(config.model, config.lora) / flops_per_token(config.model, config.lora)


def network_traffic(config: RunConfig, spread: ParallelLayout, precision: str, micro_batch: int) -> float:
    """Returns the number of bytes that a device sends per step.

    Gradients of trained parameters are reduced once per step, also with gradient accumulation, and in the dtype of the
    weights. With ring algorithms (Patarasuk and Yuan 2009), an all-reduce sends 2 (n - 1) / n of the bytes of a tensor,
    an all-gather or a reduce-scatter (n - 1) / n. FSDP gathers every block in the dtype of the matmuls for the forward
    pass and, with ``reshard_after_forward``, again for the backward pass (Zhao et al. 2023, section 3), and the
    remaining parameters in the dtype of the weights.

    Args:
        config: Configuration with the vocabulary size.
        spread: Parallel layout.
        precision: Lightning's name of the precision.
        micro_batch: Micro-batch size.
    """
    n, sizes = spread.copies, DTYPE_SIZES[precision]
    ring = (n - 1) / n
    if spread.strategy == "single":
        return 0.0
    parts = count_shares(config.model, spread.split, config.lora)
    gradients = parts.trained * sizes.weight
    updates = _muon_traffic(config, spread, parts.matrices * spread.split)
    if spread.strategy == "ddp":
        return 2 * ring * gradients + updates
    accumulation = max(1, config.train.global_batch_size // (micro_batch * n))
    times = 2 if config.trainer.reshard_after_forward else 1
    gathered = times * parts.blocks * sizes.matmul + parts.rest * sizes.weight
    tensor_parallel = 0.0
    if spread.split > 1:
        tensor_parallel = _tensor_parallel_traffic(config, spread, sizes.matmul, micro_batch)
    return ring * gradients + accumulation * (ring * gathered + tensor_parallel) + updates


def _muon_traffic(config: RunConfig, spread: ParallelLayout, matrices: int) -> float:
    """Returns the number of bytes that a device sends per step to divide the orthogonalization of Muon.

    With DDP, the updates are gathered. With FSDP, an all-to-all sends the shards of the directions to the device that
    orthogonalizes a matrix, and another sends back those of the updates. With tensor parallelism, both are gathered.
    """
    if not isinstance(config.optimizer, MuonConfig):
        return 0.0
    sent = (spread.devices - 1) / spread.devices * matrices * (2 if config.optimizer.ns_dtype == "bfloat16" else 4)
    return {"ddp": sent, "fsdp": 2 * sent / spread.devices, "fsdp_tp": 2 * sent}[spread.strategy]


def _tensor_parallel_traffic(config: RunConfig, spread: ParallelLayout, size: int, micro_batch: int) -> float:
    """Returns the number of bytes that a tensor-parallel device sends per micro-batch.

    Attention and MLP each all-reduce their output in the forward pass and the gradient of their input in the backward
    pass (Shoeybi et al. 2019, section 3). Queries, keys and values, and their gradients, are redistributed by heads.
    """
    model, ring = config.model, (spread.split - 1) / spread.split
    tensor = micro_batch * model.block_size * model.n_embd * size
    return model.n_layer * ring * tensor * (2 * 4 + 2 * 3)


def disk_usage(config: RunConfig, precision: str, tokens: int) -> DiskUsage:
    """Returns the disk space of a run in bytes.

    Args:
        config: Configuration with the vocabulary size.
        precision: Lightning's name of the precision.
        tokens: Number of tokens of the corpus or, if it is not prepared, number of training tokens of the run.
    """
    model, kept = config.model, 0
    parts = count_shares(model, lora=config.lora)
    each = float((parts.all + optimizer_state_size(config, parts)) * DTYPE_SIZES[precision].weight)
    if wanted := config.callbacks.checkpoint:
        kept = wanted.keep_last + wanted.keep_best + 1
    return DiskUsage(float(tokens * (2 if model.known_vocab_size <= 2**16 else 4)), each, kept * each)
