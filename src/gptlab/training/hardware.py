"""Hardware of a run: a table of GPUs, device detection, and the resolution of "auto". Imports no torch.

``gptlab.training.devices`` detects the same facts with torch.

Sources of the table: NVIDIA's data sheets of the GPUs and of systems (HGX B300, GB200 NVL72, GH200 Grace Hopper
Superchip), of whose numbers with sparsity half are dense, and its white papers on the architectures RTX Blackwell, Ada
and Ampere GA102, appendix A (GeForce, RTX, A10G). H20: data sheets of servers.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from gptlab.errors import UserError, did_you_mean
from gptlab.model.config import GPTConfig
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.distributed.processes import external_devices, launched_externally

MIN_WIDTH_BF16 = 384  # n_embd from which training on a CPU is faster in bfloat16
MIN_WIDTH_COMPILE = 512  # n_embd from which compiling saves more time than it takes in a run on a CPU
MAX_LOGITS_BYTES = 2**26  # float32 logits in memory at a time on a CPU
# On a GPU, small chunks are slow. The logits may take a fraction of its memory: compiled, they are stored in bfloat16
# with their gradient; otherwise, there are several copies in float32.
MIN_GPU_CHUNK = 8192  # tokens
LOGITS_SHARE, LOGITS_SHARE_EAGER = 1 / 8, 1 / 32
SMALL_GPU = 16e9  # memory assumed for a GPU that is not in the table
GPU_VOCAB_MULTIPLE = 64  # rows of a bfloat16 matrix that are 128 bytes (NVIDIA, Matrix Multiplication Background, 2.2)
NVSWITCH_GPUS = 8  # GPUs of a node that NVSwitch connects (NVIDIA HGX)
CPUINFO = Path("/proc/cpuinfo")
VENDOR_PREFIX = "NVIDIA "
# lines of `nvidia-smi -L`: GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5b...)
#                             MIG 3g.20gb     Device  0: (UUID: MIG-c6d4...)
GPU_LINE = re.compile(r"GPU \d+: (.+) \(UUID: (\S+)\)")
MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (\S+)\)")


class GPU(NamedTuple):
    """Specifications of a GPU model.

    Attributes:
        name: Name reported by CUDA, without the vendor.
        flops: Peak FLOP/s of dense float16 and, if the GPU has it, bfloat16 matmuls with float32 accumulation.
        memory: Memory in bytes, as in the data sheet. The actual memory is larger by about what CUDA itself uses.
        bandwidth: Memory bandwidth in bytes per second.
        nvlink: Bytes per second that the GPU can send to the other GPUs of its node through NVLink and NVSwitch: half
            of the data sheet's number, which counts both directions. None for a GPU without NVSwitch.
        has_bf16: Whether the GPU has bfloat16.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    nvlink: float | None = None
    has_bf16: bool = True


GPUS = {
    "b300": GPU("B300 SXM6 AC", 2250e12, 288e9, 8000e9, 900e9),
    "gb200": GPU("GB200", 2500e12, 186e9, 8000e9, 900e9),
    "b200": GPU("B200", 2250e12, 180e9, 8000e9, 900e9),
    "gh200": GPU("GH200 480GB", 989.4e12, 96e9, 4000e9),
    "h200": GPU("H200", 989.4e12, 141e9, 4800e9, 450e9),
    "h100": GPU("H100 80GB HBM3", 989.4e12, 80e9, 3350e9, 450e9),
    "h100-pcie": GPU("H100 PCIe", 756e12, 80e9, 2000e9),
    "h100-nvl": GPU("H100 NVL", 835e12, 94e9, 3938e9),
    "h20": GPU("H20", 148e12, 96e9, 4000e9, 450e9),
    "a100": GPU("A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9),
    "a100-40gb": GPU("A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9),
    "a100-pcie": GPU("A100 80GB PCIe", 312e12, 80e9, 1935e9),
    "a100-pcie-40gb": GPU("A100-PCIE-40GB", 312e12, 40e9, 1555e9),
    "a40": GPU("A40", 149.7e12, 48e9, 696e9),
    "a30": GPU("A30", 165e12, 24e9, 933e9),
    "a10g": GPU("A10G", 70e12, 24e9, 600e9),
    "a10": GPU("A10", 125e12, 24e9, 600e9),
    "l40s": GPU("L40S", 362e12, 48e9, 864e9),
    "l40": GPU("L40", 181e12, 48e9, 864e9),
    "l4": GPU("L4", 121e12, 24e9, 300e9),
    "t4": GPU("Tesla T4", 65e12, 16e9, 300e9, has_bf16=False),
    "v100": GPU("Tesla V100-SXM2-16GB", 125e12, 16e9, 900e9, has_bf16=False),
    "v100-32gb": GPU("Tesla V100-SXM2-32GB", 125e12, 32e9, 900e9, has_bf16=False),
    "v100-pcie": GPU("Tesla V100-PCIE-16GB", 112e12, 16e9, 900e9, has_bf16=False),
    "v100-pcie-32gb": GPU("Tesla V100-PCIE-32GB", 112e12, 32e9, 900e9, has_bf16=False),
    "rtx6000-ada": GPU("RTX 6000 Ada Generation", 364.2e12, 48e9, 960e9),
    "a6000": GPU("RTX A6000", 154.8e12, 48e9, 768e9),
    "rtx5090": GPU("GeForce RTX 5090", 209.5e12, 32e9, 1792e9),
    "rtx4090": GPU("GeForce RTX 4090", 165.2e12, 24e9, 1008e9),
    "rtx3090": GPU("GeForce RTX 3090", 71e12, 24e9, 936e9),
}


class CUDADevice(NamedTuple):
    """A GPU, or an instance of one that is divided by MIG, with its name and UUID."""

    name: str
    uuid: str


# Matched by CUDA's full name, because an RTX A1000 is not an A100, and a MIG slice is not a full GPU.
BY_NAME = {gpu.name: gpu for gpu in GPUS.values()}


def gpu_from_cuda_name(name: str) -> GPU | None:
    """Returns the GPU with this CUDA name, or None if it is not in the table."""
    return BY_NAME.get(name.removeprefix(VENDOR_PREFIX))


def gpu_from_name(name: str) -> GPU:
    """Returns the GPU with this key of the table ("h100") or this CUDA name.

    Raises:
        UserError: The name is not in the table; the message has the nearest key.
    """
    if (gpu := gpu_from_cuda_name(name) or GPUS.get(name.lower())) is None:
        raise UserError(
            f"gpu={name} is not in the table of GPUs.{did_you_mean(name.lower(), GPUS)} Available: {', '.join(GPUS)}."
        )
    return gpu


class Hardware(NamedTuple):
    """Devices, precision and compilation of a run, with every "auto" resolved.

    Attributes:
        accelerator: "cuda" or "cpu".
        name: Device name: CUDA's, or the processor's with its number of cores.
        devices: Processes per node, one per device.
        num_nodes: Number of nodes.
        precision: One of Lightning's precision names.
        compile: False, "whole" to compile the loss function, or "blocks" to compile each block separately.
        float32_matmul: "default"; "onednn" on a CPU for which oneDNN has faster kernels than MKL, which can only be
            detected with torch, so that a plan resolves "auto" to "default"; or "tf32" on a GPU, if configured.
        is_local: Whether this describes the current machine, so that local measurements apply.
    """

    accelerator: Literal["cpu", "cuda"]
    name: str
    devices: int
    num_nodes: int
    precision: str
    compile: Literal[False, "whole", "blocks"]
    float32_matmul: str = "default"
    is_local: bool = True

    @property
    def world_size(self) -> int:
        """Number of devices on all nodes."""
        return self.devices * self.num_nodes

    @property
    def gpu(self) -> GPU | None:
        """Entry of the GPU in the table, or None for a CPU and for a GPU that is not in the table."""
        return gpu_from_cuda_name(self.name) if self.accelerator == "cuda" else None

    @property
    def memory(self) -> float | None:
        """Memory of one device in bytes; for a CPU, that of this machine. None if it is not known."""
        if self.accelerator == "cuda":
            return self.gpu.memory if self.gpu else None
        return total_memory()

    @property
    def link_bandwidth(self) -> float | None:
        """Bytes per second that each device can send to the others, or None if that depends on the network."""
        is_one_node = self.num_nodes == 1 and self.devices <= NVSWITCH_GPUS
        return self.gpu.nvlink if self.gpu and is_one_node else None

    def peak_flops(self) -> float | None:
        """Returns the peak FLOP/s of one device at this precision, or None if it is not known."""
        known = ("16", "bf16") if self.gpu and self.gpu.has_bf16 else ("16",)
        return self.gpu.flops if self.gpu and self.precision.startswith(known) else None


class DeviceFacts(NamedTuple):
    """Properties of a machine from which every "auto" is resolved.

    Attributes:
        accelerator: "cuda" or "cpu".
        name: See ``Hardware``.
        available: Number of devices of a node: its GPUs, or 1 for a CPU.
        has_bf16: Whether the device supports bfloat16 without emulation.
        can_compile: Whether torch.compile works for the device.
        float32_matmul: The fastest library with full float32 precision; see ``Hardware``.
    """

    accelerator: Literal["cpu", "cuda"]
    name: str
    available: int
    has_bf16: bool
    can_compile: bool
    float32_matmul: str = "default"


def resolve_hardware(facts: DeviceFacts, trainer: TrainerConfig, train: TrainConfig, model: GPTConfig) -> Hardware:
    """Resolves every "auto" of a configuration. torchrun or srun, if used, set the number of devices.

    On a CPU, bfloat16 and compilation are chosen only for wide models in a single process. For small models, float32 is
    nearly as fast and more precise. Several processes on one CPU are only useful for tests.

    Raises:
        UserError: trainer.float32_matmul=tf32 without a GPU.
    """
    if trainer.float32_matmul == "tf32" and facts.accelerator != "cuda":
        raise UserError(
            "trainer.float32_matmul=tf32 needs an NVIDIA GPU, which computes in TF32. Use trainer.float32_matmul=auto."
        )

    def is_faster(min_width: int) -> bool:
        is_wide = trainer.strategy == "single" and model.n_embd >= min_width
        return facts.accelerator == "cuda" or is_wide

    devices, num_nodes = _count_devices(trainer, facts.available)
    best_precision = "bf16-mixed" if facts.has_bf16 and is_faster(MIN_WIDTH_BF16) else "32-true"
    return Hardware(
        accelerator=facts.accelerator,
        name=facts.name,
        devices=devices,
        num_nodes=num_nodes,
        precision=best_precision if trainer.precision == "auto" else trainer.precision,
        compile=_resolve_compile(trainer, train, auto=facts.can_compile and is_faster(MIN_WIDTH_COMPILE)),
        float32_matmul=facts.float32_matmul if trainer.float32_matmul == "auto" else trainer.float32_matmul,
    )


def resolve_loss_chunk(
    chunk: int | Literal["auto"] | None, model: GPTConfig, hardware: Hardware | None = None
) -> int | None:
    """Returns the number of tokens whose logits are computed at a time; None for all tokens.

    "auto" is 64 MiB of logits on a CPU. On a GPU, it is at least 8,192 tokens, and as many as fit in an eighth of the
    memory if the loss is compiled, which is usually the whole micro-batch.

    Args:
        chunk: train.loss_chunk.
        model: Model, which determines the number of logits per token.
        hardware: Hardware of the run; None for a CPU.
    """
    if chunk != "auto":
        return chunk
    token_bytes = 4 * model.padded_vocab_size
    if hardware is None or hardware.accelerator != "cuda":
        return MAX_LOGITS_BYTES // token_bytes
    share = LOGITS_SHARE if hardware.compile == "whole" else LOGITS_SHARE_EAGER
    return max(MIN_GPU_CHUNK, int((hardware.memory or SMALL_GPU) * share) // token_bytes)


def resolve_padding(model: GPTConfig, is_on_gpu: Callable[[], bool]) -> GPTConfig:
    """Returns the model with ``pad_vocab_to_multiple_of=auto`` resolved for the device that trains it.

    ``is_on_gpu``, which may start nvidia-smi, is only called for "auto".
    """
    if model.pad_vocab_to_multiple_of != "auto":
        return model
    return model.model_copy(update={"pad_vocab_to_multiple_of": GPU_VOCAB_MULTIPLE if is_on_gpu() else 1})


def local_hardware(trainer: TrainerConfig, train: TrainConfig, model: GPTConfig) -> Hardware:
    """Returns the hardware that ``gptlab.training.devices.choose_devices`` chooses on this machine, without torch.

    Raises:
        UserError: trainer.accelerator=gpu, but nvidia-smi lists no GPU.
    """
    gpus = () if trainer.accelerator == "cpu" else list_gpus()
    if trainer.accelerator == "gpu" and not gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if visible is None else f" that CUDA_VISIBLE_DEVICES={visible} permits"
        raise UserError(
            f"trainer.accelerator=gpu: nvidia-smi lists no GPU on this machine{limit}. Use gpu=<name> to plan for the "
            "GPU of another machine."
        )
    available = max(len(gpus), trainer.tensor_parallel)  # a plan may use more devices than this machine has
    if gpus:
        gpu = gpu_from_cuda_name(gpus[0])
        has_bf16 = gpu.has_bf16 if gpu else True
        facts = DeviceFacts("cuda", gpus[0], available, has_bf16, has_compiler())
    else:
        has_bf16 = "avx512_bf16" in read_cpuinfo().get("flags", "").split()
        facts = DeviceFacts("cpu", processor_name(), available, has_bf16, has_compiler())
    return resolve_hardware(facts, trainer, train, model)


def gpu_hardware(gpu: GPU, trainer: TrainerConfig, train: TrainConfig, model: GPTConfig) -> Hardware:
    """Returns the hardware of another machine with ``trainer.devices`` GPUs of this model per node.

    ``trainer.devices=auto`` is resolved to ``trainer.tensor_parallel``, the smallest possible number.
    """
    facts = DeviceFacts("cuda", gpu.name, trainer.tensor_parallel, gpu.has_bf16, can_compile=True)
    return resolve_hardware(facts, trainer, train, model)._replace(is_local=False)


def list_gpus() -> tuple[str, ...]:
    """Returns the names of the GPUs of this machine that CUDA uses; empty if nvidia-smi is not installed.

    CUDA_VISIBLE_DEVICES selects them by index or by the beginning of their UUID; the list ends at the first entry that
    is invalid, and is empty if an entry is repeated (CUDA C++ Programming Guide, CUDA Environment Variables). Of a GPU
    that is divided by MIG, CUDA uses the first instance, unless another one is selected by its UUID.
    """
    gpus = installed_gpus()
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return tuple(_default_instance(gpu).name for gpu in gpus)
    chosen: list[CUDADevice] = []
    for entry in visible.split(","):
        if (device := _find_device(entry.strip(), gpus)) is None:
            break
        chosen.append(device)
    return tuple(device.name for device in chosen) if len({*chosen}) == len(chosen) else ()


@cache
def installed_gpus() -> list[list[CUDADevice]]:
    """Returns this machine's GPUs, each with its MIG instances, as listed by nvidia-smi."""
    try:
        output = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus: list[list[CUDADevice]] = []
    for line in output.splitlines():
        if gpu := GPU_LINE.match(line):
            gpus.append([CUDADevice(*gpu.groups())])
        elif instance := MIG_LINE.match(line):
            gpus[-1].append(CUDADevice(f"{gpus[-1][0].name} MIG {instance[1]}", instance[2]))
    return gpus


def _default_instance(gpu: list[CUDADevice]) -> CUDADevice:
    return gpu[1] if len(gpu) > 1 else gpu[0]


def _find_device(entry: str, gpus: list[list[CUDADevice]]) -> CUDADevice | None:
    """Returns the device of an entry of CUDA_VISIBLE_DEVICES, or None if the entry is invalid."""
    if entry.isdecimal():
        return _default_instance(gpus[int(entry)]) if int(entry) < len(gpus) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    found = [(gpu, device) for gpu in gpus for device in gpu if device.uuid.startswith(entry)]
    if len(found) != 1:
        return None
    gpu, device = found[0]
    return _default_instance(gpu) if device is gpu[0] else device


@cache
def read_cpuinfo() -> dict[str, str]:
    """Returns the entries of /proc/cpuinfo for the first core; empty if the file does not exist."""
    try:
        lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """Returns the name of this machine's processor, with its number of cores."""
    return f"{read_cpuinfo().get('model name') or os.uname().machine}, {os.cpu_count()} cores"


def total_memory() -> float:
    """Returns this machine's memory in bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def has_compiler() -> bool:
    """Returns whether there is a C compiler, which torch.compile needs on every device."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _count_devices(trainer: TrainerConfig, available: int) -> tuple[int, int]:
    """Returns the number of processes per node and the number of nodes."""
    if launched_externally():
        return external_devices()
    if trainer.strategy == "single":
        return 1, 1
    return (available if trainer.devices == "auto" else trainer.devices), trainer.num_nodes


def _resolve_compile(trainer: TrainerConfig, train: TrainConfig, *, auto: bool) -> Literal[False, "whole", "blocks"]:
    """Returns which part of the model to compile; ``auto`` is the resolved value of "auto".

    FSDP runs hooks between the blocks, so only the blocks of a sharded model can be compiled.
    """
    if not (auto if train.compile == "auto" else train.compile):
        return False
    return "blocks" if train.compile == "blocks" or trainer.strategy in ("fsdp", "fsdp_tp") else "whole"
