"""Plan of a run: memory, time, network traffic and disk space. Imports no torch."""

from typing import Any, NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.data.shards.manifest import Manifest
from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.budget import TOKENS_PER_PARAMETER, ComputeOptimalChoice, choose_compute_optimal
from gptlab.planning.calibration import Measurement, find_measurement
from gptlab.planning.costs import (
    DiskUsage,
    RunLength,
    TimeEstimate,
    add_network,
    disk_usage,
    estimate_at_mfu,
    estimate_from_measurement,
    network_traffic,
    run_length,
)
from gptlab.planning.memory import (
    MemoryEstimate,
    ParallelLayout,
    count_by_part,
    estimate_memory,
    largest_micro_batch,
)
from gptlab.training.hardware import Hardware, gpu_from_name, gpu_hardware, local_hardware, resolve_padding

COMPARED = ("h100", "a100", "l4", "rtx4090")  # GPUs of the time forecast if none is given
OTHERS = 8  # devices of the alternative layouts of a run on one device


class LayoutAlternative(NamedTuple):
    """Alternative parallel layout, with the needs of each device.

    Attributes:
        spread: Parallel layout.
        batch: Micro-batch size.
        total: Peak memory of a device in bytes.
        checkpointed: Peak memory with activation checkpointing, in bytes.
        whole_logits: Peak memory if all logits of a micro-batch are computed at once, without chunks, in bytes.
        traffic: Number of bytes that a device sends per step.
        network: Time of the traffic per step in seconds, or None if the bandwidth is unknown.
    """

    spread: ParallelLayout
    batch: int
    total: float
    checkpointed: float
    whole_logits: float
    traffic: float
    network: float | None


class RunPlan(NamedTuple):
    """Forecast of everything that a run needs.

    Attributes:
        config: Configuration with the vocabulary size.
        hardware: Hardware that the memory is planned for.
        parameters: Number of parameters by part.
        length: Steps, tokens and evaluations.
        batch: Micro-batch size.
        spread: Parallel layout.
        traffic: Number of bytes that a device sends per step.
        bandwidth: Bytes per second that each device sends while all do, or None if it is unknown.
        memory: Peak memory of one device.
        largest: Largest micro-batch size that fits, or None if the memory of a device is unknown.
        alternatives: Alternative layouts.
        times: Forecast durations on this machine and on GPUs.
        disk: Disk space.
        manifest: Manifest of the data, or None if the data is not prepared.
        measured: Measurement of a similar run on this machine, or None.
    """

    config: RunConfig
    hardware: Hardware
    parameters: dict[str, int]
    length: RunLength
    batch: int
    spread: ParallelLayout
    traffic: float
    bandwidth: float | None
    memory: MemoryEstimate
    largest: int | None
    alternatives: list[LayoutAlternative]
    times: list[TimeEstimate]
    disk: DiskUsage
    manifest: Manifest | None
    measured: Measurement | None

    @property
    def flops(self) -> float:
        """FLOPs of the training run, forward and backward."""
        return float(flops_per_token(self.config.model, self.config.lora)) * self.length.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens per parameter."""
        return self.length.tokens / parameter_count(self.config.model)


def make_plan(
    config: RunConfig, manifest: Manifest | None, gpus: list[str], mfu: float, bandwidth: float | None
) -> RunPlan:
    """Plans a run.

    Args:
        config: Configuration with the vocabulary size.
        manifest: Manifest of the data, or None if the data is not prepared.
        gpus: Names of GPUs. The memory is planned for the first one, or for this machine if the list is empty.
        mfu: Assumed model FLOPs utilization of GPUs, between 0 and 1.
        bandwidth: Bytes per second that each device sends while all do. None: that of NVLink, if the run uses the GPUs
            of one node that NVSwitch connects, or else unknown.

    Raises:
        UserError: A GPU is not in the table, or the global batch size is not divisible by the devices.
    """
    hardware = plan_hardware(config, gpus)
    spread = plan_layout(config, hardware)
    batch = config.train.plan(spread.copies).micro_batch_size
    length = run_length(config, manifest.tokens("val") if manifest else None)
    chunk = config.loss_chunk(hardware)
    measured = find_measurement(config, hardware)
    times = [estimate_from_measurement(config, length, hardware, measured)] if measured else []
    for gpu in gpus or COMPARED:
        times += estimate_times(config, length, plan_hardware(config, [gpu]), mfu, bandwidth)
    return RunPlan(
        config=config,
        hardware=hardware,
        parameters=count_by_part(config.model, config.lora),
        length=length,
        batch=batch,
        spread=spread,
        traffic=network_traffic(config, spread, hardware.precision, batch),
        bandwidth=bandwidth or hardware.link_bandwidth,
        memory=estimate_memory(config, hardware, spread, batch, chunk),
        largest=largest_micro_batch(config, hardware, spread, chunk),
        alternatives=_alternatives(config, hardware, spread, bandwidth or hardware.link_bandwidth),
        times=times,
        disk=disk_usage(config, hardware.precision, _tokens(length, manifest)),
        manifest=manifest,
        measured=measured,
    )


def estimate_times(
    config: RunConfig, length: RunLength, hardware: Hardware, mfu: float, bandwidth: float | None
) -> list[TimeEstimate]:
    """Forecasts the duration on GPUs with known peak FLOP/s, with the network traffic; arguments as ``make_plan``."""
    spread = plan_layout(config, hardware)
    traffic = network_traffic(config, spread, hardware.precision, config.train.plan(spread.copies).micro_batch_size)
    computing = estimate_at_mfu(config, length, hardware, mfu)
    return add_network(computing, length, traffic, bandwidth or hardware.link_bandwidth)


def choose_run(config: RunConfig, budget: float, gpus: list[str]) -> ComputeOptimalChoice:
    """Chooses a compute-optimal run for a budget, with a micro-batch size that fits.

    Args:
        config: Configuration with the vocabulary size.
        budget: FLOPs of the training run, forward and backward.
        gpus: Names of GPUs. The run is chosen for the first one, or for this machine if the list is empty.

    Raises:
        UserError: The budget is too small or too large, or a GPU is not in the table.
    """
    choice = choose_compute_optimal(config, budget, plan_layout(config, plan_hardware(config, gpus)).copies)
    config = choice.config
    hardware = plan_hardware(config, gpus)
    spread = plan_layout(config, hardware)
    share = config.train.global_batch_size // spread.copies
    largest = largest_micro_batch(config, hardware, spread, config.loss_chunk(hardware))
    if largest is None or largest >= share:
        return choice
    fitting = max(size for size in range(1, max(1, largest) + 1) if share % size == 0)
    train = config.train.model_copy(update={"micro_batch_size": fitting})
    overrides = [*choice.overrides, f"train.micro_batch_size={fitting}"]
    return choice._replace(config=config.model_copy(update={"train": train}), overrides=overrides)


def plan_hardware(config: RunConfig, gpus: list[str]) -> Hardware:
    """Returns the hardware that a plan is for: the first of the given GPUs, or this machine.

    Raises:
        UserError: The GPU is not in the table, or this machine lacks the one that the configuration requires.
    """
    if gpus:
        return gpu_hardware(gpu_from_name(gpus[0]), config.trainer, config.train, config.model)
    return local_hardware(config.trainer, config.train, config.model)


def plan_padding(config: RunConfig, gpus: list[str]) -> RunConfig:
    """Resolves ``model.pad_vocab_to_multiple_of=auto`` for the hardware of a plan; arguments and errors as above."""
    model = resolve_padding(config.model, lambda: plan_hardware(config, gpus).accelerator == "cuda")
    return config.model_copy(update={"model": model})


def plan_layout(config: RunConfig, hardware: Hardware) -> ParallelLayout:
    """Returns the parallel layout of a run; raises UserError for an indivisible number of devices."""
    trainer = config.trainer
    trainer.data_parallel(hardware.devices, hardware.num_nodes)  # raises UserError
    return ParallelLayout(trainer.strategy, hardware.world_size, trainer.tensor_parallel)


def estimate_peak_memory(config: RunConfig, hardware: Hardware) -> MemoryEstimate:
    """Returns the peak memory of one device of a run."""
    spread = plan_layout(config, hardware)
    batch = config.train.plan(spread.copies).micro_batch_size
    return estimate_memory(config, hardware, spread, batch, config.loss_chunk(hardware))


PLAN_MARK = '"command": "gptlab.plan"'  # in the JSON of a plan


def plan_to_dict(plan: RunPlan) -> dict[str, Any]:
    """Returns a plan as plain data for JSON, with values in bytes, seconds and tokens per second."""
    model = plan.config.model
    return {
        "command": "gptlab.plan",
        "target": _hardware_to_dict(plan.hardware),
        "parameters": {"total": sum(plan.parameters.values()), **plan.parameters},
        "flops_per_token": flops_per_token(model, plan.config.lora),
        "flops": plan.flops,
        **plan.length._asdict(),
        "tokens_per_parameter": plan.tokens_per_parameter,
        "compute_optimal_tokens": TOKENS_PER_PARAMETER * parameter_count(model),
        "batch": {"global": plan.config.train.global_batch_size, "micro": plan.batch, "largest_micro": plan.largest},
        "memory": {**plan.memory._asdict(), "total": plan.memory.total},
        "measured": plan.measured and plan.measured.model_dump(),
        "network": {"traffic": plan.traffic, "bandwidth": plan.bandwidth},
        "spreads": [{**way._asdict(), "spread": way.spread._asdict()} for way in plan.alternatives],
        "times": [time._asdict() for time in plan.times],
        "disk": plan.disk._asdict(),
        "config": plan.config.model_dump(mode="json"),
    }


def _hardware_to_dict(hardware: Hardware) -> dict[str, Any]:
    return {
        "accelerator": hardware.accelerator,
        "name": hardware.name,
        "gpu": hardware.gpu and hardware.gpu._asdict(),
        "memory": hardware.memory,
        "devices": hardware.devices,
        "nodes": hardware.num_nodes,
        "precision": hardware.precision,
        "compile": hardware.compile,
        "is_here": hardware.is_local,
    }


def _alternatives(
    config: RunConfig, hardware: Hardware, own: ParallelLayout, bandwidth: float | None
) -> list[LayoutAlternative]:
    """Returns all layouts over the devices of the run, or over eight devices if it has one."""
    devices = own.devices if own.devices > 1 else OTHERS
    split = max(2, own.split)
    ways = [
        ParallelLayout("single", 1),
        ParallelLayout("ddp", devices),
        ParallelLayout("fsdp", devices),
        ParallelLayout("fsdp_tp", devices, split),
    ]
    if config.model.value_residual or config.model.value_embeddings or config.model.n_head % split or devices % split:
        ways = ways[:-1]  # tensor parallelism cannot split these models
    return [_alternative(config, hardware, way, bandwidth) for way in ways]


def _alternative(
    config: RunConfig, hardware: Hardware, way: ParallelLayout, bandwidth: float | None
) -> LayoutAlternative:
    batch = _share(config, way)
    model = config.model.model_copy(update={"activation_checkpointing": True})
    compiled = hardware._replace(compile=_compiled(hardware, way))
    chunk = config.loss_chunk(compiled)
    traffic = network_traffic(config, way, hardware.precision, batch)
    return LayoutAlternative(
        way,
        batch,
        estimate_memory(config, compiled, way, batch, chunk).total,
        estimate_memory(config.model_copy(update={"model": model}), compiled, way, batch, chunk).total,
        estimate_memory(config, compiled, way, batch, None).total,
        traffic,
        traffic / bandwidth if bandwidth else None,
    )


def _share(config: RunConfig, way: ParallelLayout) -> int:
    """Returns the micro-batch size of a layout: the configured one, or at most a device's share of the batch."""
    train = config.train
    return max(1, min(train.micro_batch_size or train.global_batch_size, train.global_batch_size // way.copies))


def _compiled(hardware: Hardware, way: ParallelLayout) -> Any:
    return "blocks" if hardware.compile and way.is_sharded else hardware.compile


def _tokens(length: RunLength, manifest: Manifest | None) -> int:
    """Returns the number of tokens on disk: those of the corpus or, if it is not prepared, those that the run reads."""
    if manifest is None:
        return length.tokens
    return manifest.tokens("train") + manifest.tokens("val")
