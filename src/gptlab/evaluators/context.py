"""What scores: this process' device and precision, and the other processes that torchrun or srun has started."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gptlab.training.devices import use_best_matmul
from gptlab.training.distributed.processes import external_devices, launched_externally
from gptlab.training.hardware import Hardware


class EvalContext(NamedTuple):
    """A process of an evaluation.

    Attributes:
        device: What it computes on.
        precision: "float32", or "bfloat16" for products, with weights and losses in float32.
        rank: Its number.
        world_size: Processes in all.
    """

    device: torch.device
    precision: Literal["float32", "bfloat16"]
    rank: int
    world_size: int

    def context(self) -> AbstractContextManager[Any]:
        """Compute in this precision."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def summed(self, numbers: Tensor) -> Tensor:
        """Add up numbers over all processes, each of which gets the sums."""
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers


def create_eval_context(precision: Literal["auto", "float32", "bfloat16"]) -> EvalContext:
    """Take the GPU if there is one, and join the other processes if there are some."""
    cuda = torch.cuda.is_available()
    rank, world_size = 0, 1
    if launched_externally():
        from gptlab.training.distributed.process_group import join_group  # with Lightning, for those alone who need it

        devices, nodes = external_devices()
        join_group(Hardware("cuda" if cuda else "cpu", "", devices, nodes, "32-true", compile=False))
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    use_best_matmul(device)
    if precision == "auto":
        precision = "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return EvalContext(device, precision, rank, world_size)
