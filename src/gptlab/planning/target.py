"""The machine that a plan is for: this one, or so many of a named GPU. Imports no torch."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.training.auto import WIDE, WIDER, is_for_speed, resolve_compile, resolve_loss_chunk
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.processes import external_devices, launched_externally
from gptlab.training.gpu_specs import GPU, gpu_from_cuda_name

CPUINFO = Path("/proc/cpuinfo")


class Hardware(NamedTuple):
    """What a run computes on.

    Attributes:
        accelerator: "cuda" or "cpu".
        name: Of the device, as its maker gives it.
        gpu: What is known of it; None for a CPU, or a GPU that is in no table.
        memory: Bytes of one device; of a CPU, the machine's. None where it is not known.
        devices: Processes of a node, one a device.
        nodes: Machines.
        precision: A precision name of Lightning's.
        compile: See ``gptlab.training.devices.Devices``.
        is_here: Whether it is this machine: what was measured here holds for it.
    """

    accelerator: Literal["cpu", "cuda"]
    name: str
    gpu: GPU | None
    memory: float | None
    devices: int
    nodes: int
    precision: str
    compile: Literal[False, "whole", "blocks"]
    is_here: bool

    @property
    def world_size(self) -> int:
        """Devices over all nodes."""
        return self.devices * self.nodes


def local_hardware(config: RunConfig) -> Hardware:
    """Say what this machine will compute on, as ``gptlab.training.devices.choose_devices`` will decide."""
    found = () if config.trainer.accelerator == "cpu" else list_gpus()
    if config.trainer.accelerator == "gpu" and not found:
        raise UserError(
            "trainer.accelerator=gpu: this machine has no GPU that nvidia-smi would name. gpu=<name> plans for one "
            "that is elsewhere."
        )
    if found:
        gpu = gpu_from_cuda_name(found[0])
        return _on_gpu(config, found[0], gpu, len(found), is_here=True)
    devices, nodes = _number(config.trainer, 1)
    speed = "avx512_bf16" in _cpu_flags() and is_for_speed(config.trainer, config.model, WIDE)
    gains = is_for_speed(config.trainer, config.model, WIDER) and _has_compiler()
    return Hardware(
        accelerator="cpu",
        name=processor_name(),
        gpu=None,
        memory=total_memory(),
        devices=devices,
        nodes=nodes,
        precision=_precision(config, "bf16-mixed" if speed else "32-true"),
        compile=resolve_compile(config.trainer, config.train, gains=gains),
        is_here=True,
    )


def gpu_hardware(config: RunConfig, gpu: GPU) -> Hardware:
    """Say what a machine with such GPUs would compute on; it has as many as the trainer names, one if it names none."""
    return _on_gpu(config, gpu.name, gpu, 1, is_here=False)


def logits_chunk(config: RunConfig) -> int | None:
    """Tokens whose logits are there at a time; None has those of a micro-batch at once."""
    return resolve_loss_chunk(config.train.loss_chunk, config.model)


@cache
def list_gpus() -> tuple[str, ...]:
    """Name the GPUs of this machine, as nvidia-smi does; none where there is no such program."""
    try:
        command = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in said.splitlines() if line.strip())


@cache
def processor_name() -> str:
    """Name this machine's processor, with its cores."""
    model = next((line for line in _cpuinfo() if line.startswith("model name")), "")
    name = model.partition(":")[2].strip() or os.uname().machine
    return f"{name}, {os.cpu_count()} cores"


def total_memory() -> float:
    """Bytes of memory that this machine has."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _on_gpu(config: RunConfig, name: str, gpu: GPU | None, available: int, *, is_here: bool) -> Hardware:
    devices, nodes = _number(config.trainer, available)
    return Hardware(
        accelerator="cuda",
        name=name,
        gpu=gpu,
        memory=gpu.memory if gpu else None,
        devices=devices,
        nodes=nodes,
        precision=_precision(config, "bf16-mixed"),
        compile=resolve_compile(config.trainer, config.train, gains=True),
        is_here=is_here,
    )


def _number(trainer: TrainerConfig, available: int) -> tuple[int, int]:
    """Count the processes of a node, and the nodes."""
    if launched_externally():
        return external_devices()
    if trainer.strategy == "single":
        return 1, 1
    devices = available if trainer.devices == "auto" else trainer.devices
    return max(devices, trainer.tensor_parallel), trainer.num_nodes


def _precision(config: RunConfig, best: str) -> str:
    return best if config.trainer.precision == "auto" else config.trainer.precision


def _has_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


@cache
def _cpuinfo() -> tuple[str, ...]:
    """Read what the kernel says of the first core."""
    try:
        text = CPUINFO.read_text() if sys.platform == "linux" else ""
    except OSError:
        text = ""
    return tuple(text.partition("\n\n")[0].splitlines())


def _cpu_flags() -> set[str]:
    return set(next((line for line in _cpuinfo() if line.startswith("flags")), "").split())
