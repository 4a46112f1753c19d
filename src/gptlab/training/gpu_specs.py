"""GPUs: how fast they compute, and what memory they have. Imports no torch.

Sources: NVIDIA's data sheets (B200, H200, H100, A100, A40, A30, A10, L40S, L40, L4) and its white papers on the
architectures Blackwell, Ada and Ampere GA102, appendix A (GeForce, A10G).
"""

from typing import NamedTuple

from gptlab.errors import UserError, did_you_mean

VENDOR_PREFIX = "NVIDIA "


class GPU(NamedTuple):
    """One kind of GPU.

    Attributes:
        name: As CUDA gives it, without the maker.
        flops: Peak FLOP/s of dense bfloat16 products that are summed up in float32.
        memory: Bytes; of the data sheet's GB, of which a card has a little more: about what CUDA itself takes.
        bandwidth: Of that memory, bytes a second.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "b200": GPU("B200", 2250e12, 180e9, 8000e9),
    "h200": GPU("H200", 989.4e12, 141e9, 4800e9),
    "h100": GPU("H100 80GB HBM3", 989.4e12, 80e9, 3350e9),
    "h100-pcie": GPU("H100 PCIe", 756e12, 80e9, 2000e9),
    "h100-nvl": GPU("H100 NVL", 835e12, 94e9, 3938e9),
    "a100": GPU("A100-SXM4-80GB", 312e12, 80e9, 2039e9),
    "a100-40gb": GPU("A100-SXM4-40GB", 312e12, 40e9, 1555e9),
    "a100-pcie": GPU("A100 80GB PCIe", 312e12, 80e9, 1935e9),
    "a100-pcie-40gb": GPU("A100-PCIE-40GB", 312e12, 40e9, 1555e9),
    "a40": GPU("A40", 149.7e12, 48e9, 696e9),
    "a30": GPU("A30", 165e12, 24e9, 933e9),
    "a10g": GPU("A10G", 70e12, 24e9, 600e9),
    "a10": GPU("A10", 125e12, 24e9, 600e9),
    "l40s": GPU("L40S", 362e12, 48e9, 864e9),
    "l40": GPU("L40", 181e12, 48e9, 864e9),
    "l4": GPU("L4", 121e12, 24e9, 300e9),
    "rtx4090": GPU("GeForce RTX 4090", 165.2e12, 24e9, 1008e9),
    "rtx3090": GPU("GeForce RTX 3090", 71e12, 24e9, 936e9),
}

# By the name that CUDA gives the device, whole: an RTX A1000 is no A100, and a MIG slice no whole GPU.
BY_NAME = {gpu.name: gpu for gpu in GPUS.values()}


def gpu_from_cuda_name(name: str) -> GPU | None:
    """Return the GPU that CUDA calls so; None where nothing is known for certain."""
    return BY_NAME.get(name.removeprefix(VENDOR_PREFIX))


def gpu_from_name(name: str) -> GPU:
    """Return the GPU that a person calls so: "h100", or CUDA's own name. UserError names the nearest."""
    if (gpu := gpu_from_cuda_name(name) or GPUS.get(name.lower())) is None:
        raise UserError(
            f"gpu={name}: its speed and memory are not known here.{did_you_mean(name.lower(), GPUS)} "
            f"There are {', '.join(GPUS)}."
        )
    return gpu
