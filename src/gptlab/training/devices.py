"""What this machine can do, asked once: devices, precision, compilation, peak speed."""

import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from gptlab.errors import UserError
from gptlab.model.config import GPTConfig
from gptlab.training.auto import WIDE, WIDER, is_for_speed, resolve_compile
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.distributed.processes import MAX_PROCESSES_PER_CORE, external_devices, launched_externally
from gptlab.training.gpu_specs import gpu_from_cuda_name

CPUINFO = Path("/proc/cpuinfo")


class Devices(NamedTuple):
    """What a run computes on, decided.

    Attributes:
        accelerator: "cuda" or "cpu".
        name: The device's name, as its maker gives it.
        devices: Processes of this node, one a device.
        num_nodes: Nodes.
        precision: A precision name of Lightning's.
        compile: False, or what is compiled: the loss as a "whole", or each of the "blocks" by itself.
        float32_matmul: "default", or "onednn" on a CPU for which that has faster kernels than MKL.
    """

    accelerator: str
    name: str
    devices: int
    num_nodes: int
    precision: str
    compile: Literal[False, "whole", "blocks"]
    float32_matmul: str = "default"

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self.devices * self.num_nodes

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of one device at this precision; None where it is not known for certain."""
        if self.accelerator != "cuda" or not self.precision.startswith("bf16"):
            return None
        gpu = gpu_from_cuda_name(self.name)
        return gpu.flops if gpu else None


def choose_devices(trainer: TrainerConfig, train: TrainConfig, model: GPTConfig) -> Devices:
    """Decide what "auto" means on this machine for a model; UserError where more is asked for than there is.

    Under torchrun the number of devices and nodes is torchrun's.
    """
    cuda = torch.cuda.is_available()
    if trainer.accelerator == "gpu" and not cuda:
        raise UserError("trainer.accelerator=gpu: PyTorch sees no GPU on this machine; trainer=cpu trains without one.")
    on_gpu = cuda and trainer.accelerator != "cpu"
    available = torch.cuda.device_count() if on_gpu else None
    devices, num_nodes = _requested(trainer, available or 1)
    if available is not None and devices > available:
        raise UserError(f"trainer.devices={devices}: this machine has {available} GPU{'s' if available > 1 else ''}.")
    most = MAX_PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if available is None and devices > most:
        raise UserError(
            f"trainer.devices={devices}: this machine has no GPU and {os.cpu_count()} CPU cores, "
            f"on which at most {most} processes make sense."
        )
    return Devices(
        accelerator="cuda" if on_gpu else "cpu",
        name=torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(),
        devices=devices,
        num_nodes=num_nodes,
        precision=_best_precision(trainer, model, on_gpu) if trainer.precision == "auto" else trainer.precision,
        compile=resolve_compile(trainer, train, gains=_gains_by_compiling(trainer, model, on_gpu)),
        float32_matmul=best_matmul(on_gpu) if trainer.float32_matmul == "auto" else trainer.float32_matmul,
    )


def prepare_kernels(devices: Devices) -> None:
    """Select the library that computes this process's float32 matrix products on a CPU."""
    _use_onednn("bf16" if devices.float32_matmul == "onednn" else "none")


def use_best_matmul(device: torch.device) -> None:
    """Let this process multiply in float32 as it is fastest on the device, and exact; for what is not a training."""
    if device.type == "cpu" and best_matmul(on_gpu=False) == "onednn":
        _use_onednn("bf16")


def peak_memory(device: torch.device) -> int:
    """Bytes that the device, or for the CPU this process, had in use at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's ru_maxrss begins with what the process had that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _requested(trainer: TrainerConfig, available: int) -> tuple[int, int]:
    if launched_externally():
        return external_devices()
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: the processes of several machines are started by torchrun or srun."
        )
    if trainer.strategy == "single":
        return 1, 1
    return (available if trainer.devices == "auto" else trainer.devices), trainer.num_nodes


def _best_precision(trainer: TrainerConfig, model: GPTConfig, on_gpu: bool) -> str:
    """bfloat16 where the device computes in it; on a CPU float32 for small models: exact, and nearly as fast."""
    if on_gpu:
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_it = torch.cpu.get_capabilities().get("avx512_bf16", False) and is_for_speed(trainer, model, WIDE)
    return "bf16-mixed" if has_it else "32-true"


def _gains_by_compiling(trainer: TrainerConfig, model: GPTConfig, on_gpu: bool) -> bool:
    """torch.compile needs a C compiler; Triton, with which it writes GPU code, compute capability 7.0 as well."""
    gains = torch.cuda.get_device_capability() >= (7, 0) if on_gpu else is_for_speed(trainer, model, WIDER)
    return gains and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def best_matmul(on_gpu: bool) -> str:
    """MKL uses no AVX-512 on AMD's processors, where oneDNN is twice as fast in float32."""
    if on_gpu or torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return "default"
    try:
        is_amd = "AuthenticAMD" in CPUINFO.read_text()
    except OSError:
        is_amd = False
    return "onednn" if is_amd and _is_exact() else "default"


def _use_onednn(precision: str) -> str:
    """Let oneDNN have float32 products, with "bf16", or MKL, with "none"; return what was set before.

    The word says that oneDNN may round to bfloat16. It does so with AMX, and else is exact.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before: str = matmul.fp32_precision
    matmul.fp32_precision = precision
    return before


def _is_exact() -> bool:
    """Whether oneDNN's float32 products are that, also where it is allowed to round to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator).unbind()
    before = _use_onednn("bf16")
    error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    _use_onednn(before)
    return error.item() < 1e-3  # float32 is off by 3e-5 here, bfloat16 by 1e-1
