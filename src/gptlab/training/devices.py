"""Device detection with torch, selection of the CPU's matmul library, and peak memory."""

import os
import resource
import sys
from pathlib import Path

import torch

from gptlab.errors import UserError
from gptlab.model.config import GPTConfig
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.distributed.processes import (
    check_cpu_processes,
    external_devices,
    launched_by_srun,
    launched_externally,
)
from gptlab.training.hardware import DeviceFacts, Hardware, has_compiler, processor_name, read_cpuinfo, resolve_hardware

STATUS = Path("/proc/self/status")  # of this process, proc_pid_status(5)
CUBLAS_WORKSPACES = ":4096:8"  # with which cuBLAS is deterministic (its manual, results reproducibility)
# in the messages of RuntimeErrors of CUDA's driver, cuBLAS and torch's CPU allocator
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
MIN_CAPABILITY = (7, 0)  # compute capability required by Triton, which torch.compile uses on GPUs


def choose_devices(trainer: TrainerConfig, train: TrainConfig, model: GPTConfig) -> Hardware:
    """Resolves every "auto" of a configuration on this machine.

    Raises:
        UserError: The configuration requires devices or a launcher that are not available.
    """
    cuda = torch.cuda.is_available()
    if trainer.accelerator == "gpu" and not cuda:
        raise UserError(
            "trainer.accelerator=gpu: PyTorch finds no GPU on this machine. Use trainer=cpu to run on the CPU."
        )
    if trainer.num_nodes > 1 and not launched_externally():
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: gptlab starts processes only on this machine. "
            "Start multi-node runs with torchrun or srun."
        )
    facts = _gpu_facts() if cuda and trainer.accelerator != "cpu" else _cpu_facts()
    chosen = resolve_hardware(facts, trainer, train, model)
    _check_count(facts, chosen.devices)
    return chosen


def prepare_kernels(chosen: Hardware) -> None:
    """Selects the library for this process's float32 matmuls on the CPU, and their precision on a GPU."""
    if chosen.accelerator == "cuda":
        torch.set_float32_matmul_precision("high" if chosen.float32_matmul == "tf32" else "highest")
    _use_onednn("bf16" if chosen.float32_matmul == "onednn" else "none")


def sees_one_gpu() -> bool:
    """Returns whether srun shows every task only its own GPU, as with ``--gpus-per-task=1``.

    Otherwise, tasks that see one GPU share it, as the processes of torchrun do.
    """
    if not launched_by_srun() or "CUDA_VISIBLE_DEVICES" not in os.environ or torch.cuda.device_count() != 1:
        return False
    tasks, _ = external_devices()
    return int(os.environ.get("SLURM_GPUS_ON_NODE", tasks)) >= tasks


def use_deterministic_algorithms() -> None:
    """Makes the operations of this process deterministic, on every device, and those of the code that it compiles.

    Operations without a deterministic algorithm raise an error. Of the kernels of scaled_dot_product_attention, cuDNN's
    has no deterministic backward pass; the others have one in this mode (not with ``warn_only``).
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_best_matmul(device: torch.device) -> None:
    """Selects the fastest library with full float32 precision for matmuls on a CPU; for use outside of training."""
    if device.type == "cpu" and best_cpu_matmul() == "onednn":
        _use_onednn("bf16")


def best_cpu_matmul() -> str:
    """Returns the fastest library with full float32 precision: "onednn" on AMD CPUs with AVX-512, else "default".

    MKL does not use AVX-512 on AMD CPUs, so oneDNN is about twice as fast there.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return "default"
    is_amd = read_cpuinfo().get("vendor_id") == "AuthenticAMD"
    return "onednn" if is_amd and _is_exact() else "default"


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: allocated by torch on a GPU, or used by this process for a CPU.

    On Linux, the pages of mapped files (libraries, weights, token files) do not count, because the system can drop them
    at any time. It keeps only the peak of all pages, so those of files that are mapped now are subtracted from it. On
    other systems, pages of mapped files count.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # ru_maxrss can include memory of the process that started this one
        lines = (line.partition(":") for line in STATUS.read_text().splitlines())
        sizes = {name: int(size.split()[0]) for name, _, size in lines if name in ("VmHWM", "RssFile")}  # in KiB
        if "VmHWM" in sizes:
            return 1024 * (sizes["VmHWM"] - sizes.get("RssFile", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error of torch or Python means that the device, or the host, has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


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
    """Raises UserError if this machine has too few GPUs or cores for ``devices`` processes."""
    if facts.accelerator == "cuda":
        if devices > facts.available and not sees_one_gpu():
            gpus = f"{facts.available} GPU{'s' if facts.available > 1 else ''}"
            raise UserError(f"trainer.devices={devices}: this machine has {gpus}.")
        return
    check_cpu_processes(devices)


def _use_onednn(precision: str) -> str:
    """Selects oneDNN ("bf16") or MKL ("none") for float32 matmuls; returns the previous value.

    "bf16" allows oneDNN to round to bfloat16. It does so only on CPUs with AMX.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before: str = matmul.fp32_precision
    matmul.fp32_precision = precision
    return before


def _is_exact() -> bool:
    """Returns whether oneDNN's matmuls have float32 precision even if it is allowed to round to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator).unbind()
    before = _use_onednn("bf16")
    error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    _use_onednn(before)
    return error.item() < 1e-3  # the error is about 3e-5 in float32 and 1e-1 in bfloat16
