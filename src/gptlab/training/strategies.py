"""How the network is spread over devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from gptlab.model.gpt import GPT
from gptlab.training.batch import BatchPlan
from gptlab.training.processes import on_slurm, under_torchrun


def build_strategy(name: str, plan: BatchPlan) -> Strategy | str:
    """Build Lightning's strategy for "single", "ddp" or "fsdp" (FSDP2 over all devices)."""
    if name == "ddp":
        # a static graph is recorded in the first backward pass, which must not be one without synchronisation
        return DDPStrategy(gradient_as_bucket_view=True, static_graph=plan.accumulation == 1)
    if name == "fsdp":
        return FSDP2Strategy(
            data_parallel_size=plan.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "auto"


def cluster_environment() -> ClusterEnvironment:
    """Say who starts the processes: what started this one, not what variables a scheduler has left lying about."""
    if under_torchrun():
        return TorchElasticEnvironment()
    if on_slurm():
        # Lightning's own requeue would write checkpoints beside the run, and load them by itself
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2, except that checkpoints name the network's parameters without the LightningModule's prefix."""

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load into the network and the optimizers what any strategy has saved; return the rest."""
        assert self.lightning_module is not None  # noqa: S101
        model = cast(GPT, self.lightning_module.model)
        everything = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        checkpoint = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)
        set_model_state_dict(model, checkpoint.pop("state_dict"), options=everything)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(model, optimizer, _by_name(saved, optimizer, model), options=everything)
        return checkpoint


def _by_name(saved: dict[str, Any], optimizer: Optimizer, model: GPT) -> dict[str, Any]:
    """Name the parameters of a saved optimizer state, which numbers them in the order of its groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    name_of = {
        number: name
        for group, named in zip(saved["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], named, strict=True)
    }
    return {
        "state": {name_of[number]: state for number, state in saved["state"].items()},
        "param_groups": [group | {"params": n} for group, n in zip(saved["param_groups"], groups, strict=True)],
    }


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """Shard every block by itself, and what remains as one (Zhao et al. 2023, section 3)."""
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def compile_in_place(model: GPT, *, by_block: bool) -> None:
    """Compile the network, or each block of it (which sharding needs, since its hooks run between them)."""
    for part in model.h if by_block else [model]:
        part.compile()


@contextmanager
def gathered(model: GPT) -> Iterator[None]:
    """Keep a sharded network whole between forward passes, for generation; nothing for any other network."""
    sharded = [block for block in model.h if isinstance(block, FSDPModule)]
    for block in sharded:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in sharded:
            block.set_reshard_after_forward(True, recurse=False)
            block.reshard()
