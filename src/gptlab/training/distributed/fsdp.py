"""FSDP2 strategy: parameters, gradients and optimizer state are sharded over devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from gptlab.model.gpt import GPT, Block
from gptlab.model.modern import ModernBlock, WeightedSum
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.checkpoints.reading import flatten_tensors, read_state
from gptlab.training.checkpoints.shards import is_sharded, load_shards
from gptlab.training.checkpoints.writing import AtomicCheckpointIO
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.tensor_parallel import parallelize_blocks
from gptlab.training.hardware import Hardware
from gptlab.training.optim.optimizers import check_groups


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy, with tensor parallelism within groups of devices that share one batch.

    Checkpoints differ from Lightning's: parameters have the model's names, without the LightningModule's prefix, and
    are stored in one file or in shards.

    Args:
        config: Options for sharding and offloading, and the tensor-parallel size.
        plan: Batch plan, which has the number of data-parallel ranks.
        hardware: Accelerator and precision of the run.
        sharded_checkpoints: Whether each rank writes its own shards of a checkpoint.
    """

    def __init__(
        self, config: TrainerConfig, plan: BatchPlan, hardware: Hardware, *, sharded_checkpoints: bool
    ) -> None:
        super().__init__(
            data_parallel_size=plan.world_size,
            tensor_parallel_size=config.tensor_parallel,
            save_distributed_checkpoint=sharded_checkpoints,
        )
        self.config, self.hardware, self.sharded_checkpoints = config, hardware, sharded_checkpoints
        self.units: list[FSDPModule] = []  # one module of each block's unit, and the model

    @property
    def gpt(self) -> GPT:
        """The model being trained."""
        assert self.lightning_module is not None  # noqa: S101
        return cast(GPT, self.lightning_module.model)

    def shard(self, model: GPT) -> None:
        """Shards every block separately and the remaining parameters as one unit (Zhao et al. 2023, section 3).

        With mixed precision, autocast computes as with DDP: the residual stream is in float32. The linear layers of a
        block are gathered in bfloat16, in which they compute, and all other parameters in float32, with the remaining
        ones. Gradients are reduced in float32.
        """
        assert self.lightning_module is not None  # noqa: S101
        if self.config.cpu_offload:
            self.lightning_module.to(self.root_device)  # all tensors, before the parameters are offloaded
        if self.config.tensor_parallel > 1:
            parallelize_blocks(model, self.device_mesh["tensor_parallel"])
        on_gpu = self.root_device.type == "cuda"  # without a GPU, memory is not pinned and offloading has no effect
        bfloat16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        wrap = partial(
            fully_shard,
            mesh=self.device_mesh["data_parallel"],
            offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if self.config.cpu_offload else OffloadPolicy(),
        )
        for block in model.blocks:
            unit = linear_parts(block) if self.hardware.precision == "bf16-mixed" else []
            policy = bfloat16 if unit else MixedPrecisionPolicy()
            wrap(unit or [block], mp_policy=policy, reshard_after_forward=self.config.reshard_after_forward)
            self.units.append(cast(FSDPModule, unit[0] if unit else block))
        wrap(model, reshard_after_forward=False)  # the backward pass begins with these parameters
        self.units.append(cast(FSDPModule, model))
        for name in ("loss", "token_losses", "next_logits"):
            register_fsdp_forward_method(model, name)

    def model_to_device(self) -> None:
        """Moves the model to the device, unless its parameters are offloaded to the CPU."""
        if not self.config.cpu_offload:
            super().model_to_device()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulates unsharded gradients on each rank; the last micro-batch of a step reduces them once."""
        model = cast(FSDPModule, self.gpt)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keeps the blocks' parameters gathered between forward passes; reshards them on exit."""
        *blocks, _ = self.units
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(self.config.reshard_after_forward, recurse=False)
            self.reshard()

    def reshard(self) -> None:
        """Frees the gathered parameters of the model."""
        for unit in self.units:
            unit.reshard()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the parameters: this rank's shards or, for a one-file checkpoint, full tensors on the first rank."""
        return get_model_state_dict(self.gpt, options=self._options())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state, sharded or full as in ``lightning_module_state_dict``."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return cast(dict[str, Any], get_optimizer_state_dict(self.gpt, plain, options=self._options()))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes the shards of all ranks, or one file on the first rank."""
        files = cast(AtomicCheckpointIO, self.checkpoint_io)
        if self.sharded_checkpoints:
            files.save_shards(checkpoint, Path(filepath), storage_options)
        elif self.is_global_zero:
            files.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint of any strategy into the model and the optimizers; returns its other entries."""
        checkpoint_dir = Path(checkpoint_path)
        checkpoint = read_state(checkpoint_dir)
        if is_sharded(checkpoint_dir):
            options = StateDictOptions()
            groups = [state["param_groups"] for state in checkpoint.pop("optimizer_states")]
            for optimizer, saved in zip(self.optimizers, groups, strict=True):
                check_groups(saved, optimizer.param_groups)  # before the optimizer state is loaded
            moments = [get_optimizer_state_dict(self.gpt, o, options=options) for o in self.optimizers]
            model = get_model_state_dict(self.gpt, options=options)
            state: dict[str, Any] = {"state_dict": model, "optimizer_states": moments}
            load_shards(checkpoint_dir, flatten_tensors(state))
            for found, saved in zip(moments, groups, strict=True):
                found["param_groups"] = saved
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            state = {key: checkpoint.pop(key) for key in ("state_dict", "optimizer_states")}
        set_model_state_dict(self.gpt, state["state_dict"], options=options)
        for optimizer, found in zip(self.optimizers, state["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.gpt, optimizer, found, options=options)
        return checkpoint

    def _options(self) -> StateDictOptions:
        whole = not self.sharded_checkpoints
        return StateDictOptions(full_state_dict=whole, cpu_offload=whole)


def linear_parts(block: nn.Module) -> list[nn.Module]:
    """Returns the attention and the MLP of a block if autocast computes with all their parameters in bfloat16.

    Otherwise, and for a block that is a component, returns an empty list.
    """
    if not isinstance(block, Block | ModernBlock):
        return []
    parts: list[nn.Module] = [block.attn, block.mlp]
    owners = [
        module for part in parts for module in part.modules() if any(True for _ in module.parameters(recurse=False))
    ]
    return parts if all(isinstance(module, nn.Linear | WeightedSum) for module in owners) else []
