"""The facts about devices that only torch knows, and the libraries and memory of this process."""

import os
import resource
import sys
from pathlib import Path

import torch

from gptlab.errors import UserError
from gptlab.model.config import GPTConfig
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.distributed.processes import MAX_PROCESSES_PER_CORE, launched_externally
from gptlab.training.hardware import DeviceFacts, Hardware, has_compiler, processor_name, read_cpuinfo, resolve_hardware

MIN_CAPABILITY = (7, 0)  # compute capability that Triton needs, with which torch.compile writes GPU code


def choose_devices(trainer: TrainerConfig, train: TrainConfig, model: GPTConfig) -> Hardware:
    """Resolves every "auto" of a configuration on this machine.

    Raises:
        UserError: The configuration asks for more than this machine has.
    """
    cuda = torch.cuda.is_available()
    if trainer.accelerator == "gpu" and not cuda:
        raise UserError("trainer.accelerator=gpu: PyTorch sees no GPU on this machine; trainer=cpu trains without one.")
    if trainer.num_nodes > 1 and not launched_externally():
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: the processes of several machines are started by torchrun or srun."
        )
    facts = _gpu_facts() if cuda and trainer.accelerator != "cpu" else _cpu_facts()
    chosen = resolve_hardware(facts, trainer, train, model)
    _check_count(facts, chosen.devices)
    return chosen


def prepare_kernels(chosen: Hardware) -> None:
    """Selects the library that computes this process's float32 matrix products on a CPU."""
    _use_onednn("bf16" if chosen.float32_matmul == "onednn" else "none")


def use_best_matmul(device: torch.device) -> None:
    """Selects the fastest exact float32 matrix products for a device, outside of training."""
    if device.type == "cpu" and best_cpu_matmul() == "onednn":
        _use_onednn("bf16")


def best_cpu_matmul() -> str:
    """Returns "onednn" on AMD's processors, where MKL uses no AVX-512 and oneDNN is twice as fast in float32."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return "default"
    is_amd = read_cpuinfo().get("vendor_id") == "AuthenticAMD"
    return "onednn" if is_amd and _is_exact() else "default"


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that the device, or for a CPU this process, has had in use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's ru_maxrss begins with what the process had that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gpu_facts() -> DeviceFacts:
    return DeviceFacts(
        accelerator="cuda",
        name=torch.cuda.get_device_name(),
        available=torch.cuda.device_count(),
        has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        can_compile=torch.cuda.get_device_capability() >= MIN_CAPABILITY and has_compiler(),
    )


def _cpu_facts() -> DeviceFacts:
    return DeviceFacts(
        accelerator="cpu",
        name=processor_name(),
        available=1,
        has_bf16=torch.cpu.get_capabilities().get("avx512_bf16", False),
        can_compile=has_compiler(),
        float32_matmul=best_cpu_matmul(),
    )


def _check_count(facts: DeviceFacts, devices: int) -> None:
    """Raises UserError if this machine has too few GPUs or cores for so many processes."""
    if facts.accelerator == "cuda":
        if devices > facts.available:
            gpus = f"{facts.available} GPU{'s' if facts.available > 1 else ''}"
            raise UserError(f"trainer.devices={devices}: this machine has {gpus}.")
        return
    cores = os.cpu_count() or 1
    if devices > (most := MAX_PROCESSES_PER_CORE * cores):
        raise UserError(
            f"trainer.devices={devices}: this machine has no GPU and {cores} CPU cores, "
            f"on which at most {most} processes make sense."
        )


def _use_onednn(precision: str) -> str:
    """Gives float32 products to oneDNN ("bf16") or to MKL ("none"); returns what was set before.

    "bf16" allows oneDNN to round to bfloat16. It does so with AMX, and is exact otherwise.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before: str = matmul.fp32_precision
    matmul.fp32_precision = precision
    return before


def _is_exact() -> bool:
    """Returns whether oneDNN's float32 products are exact even if it is allowed to round to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator).unbind()
    before = _use_onednn("bf16")
    error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    _use_onednn(before)
    return error.item() < 1e-3  # float32 is off by 3e-5 here, bfloat16 by 1e-1
