"""What this machine can do, asked once: devices, precision, compilation, peak speed."""

import os
import shutil
from typing import NamedTuple

import torch

from gptlab.errors import UserError
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.processes import MOST_PROCESSES_PER_CORE, devices_from_outside, started_from_outside

# Dense bfloat16 tensor-core FLOP/s with float32 accumulation, from NVIDIA's data sheets and architecture white papers
# (H100, A100, L4, L40S, A10, A30, A40 data sheets; Blackwell, Ada and Ampere GA102 white papers, appendix A).
# By the name that CUDA gives the device, whole: an RTX A1000 is no A100, and a MIG slice no whole GPU.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 3090": 71e12,
}


class Devices(NamedTuple):
    """What a run computes on, decided.

    Attributes:
        accelerator: "cuda" or "cpu".
        name: The device's name, as its maker gives it.
        devices: Processes of this node, one a device.
        num_nodes: Nodes.
        precision: A precision name of Lightning's.
        compile: Whether the network is compiled.
    """

    accelerator: str
    name: str
    devices: int
    num_nodes: int
    precision: str
    compile: bool

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self.devices * self.num_nodes

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of one device at this precision; None where it is not known for certain."""
        if self.accelerator != "cuda" or not self.precision.startswith("bf16"):
            return None
        return PEAK_BF16_FLOPS.get(self.name.removeprefix("NVIDIA "))


def choose_devices(trainer: TrainerConfig, train: TrainConfig) -> Devices:
    """Decide what "auto" means on this machine; UserError where more is asked for than there is.

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
    most = MOST_PROCESSES_PER_CORE * (os.cpu_count() or 1)
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
        precision=_best_precision(on_gpu) if trainer.precision == "auto" else trainer.precision,
        compile=_gains_by_compiling(on_gpu) if train.compile == "auto" else train.compile,
    )


def _requested(trainer: TrainerConfig, available: int) -> tuple[int, int]:
    if started_from_outside():
        return devices_from_outside()
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: the processes of several machines are started by torchrun or srun."
        )
    if trainer.strategy == "single":
        return 1, 1
    return (available if trainer.devices == "auto" else trainer.devices), trainer.num_nodes


def _best_precision(on_gpu: bool) -> str:
    """bfloat16 where the GPU computes in it; on a CPU float32, which is exact and at small sizes as fast."""
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _gains_by_compiling(on_gpu: bool) -> bool:
    """Triton, which torch.compile writes GPU code with, needs compute capability 7.0 and a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return on_gpu and torch.cuda.get_device_capability() >= (7, 0) and compiler is not None
