"""FSDP2 strategy: parameters, gradients and optimizer state are sharded over devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
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

from gptlab.model.gpt import GPT
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

    @property
    def gpt(self) -> GPT:
        """The model being trained."""
        assert self.lightning_module is not None  # noqa: S101
        return cast(GPT, self.lightning_module.model)

    def shard(self, model: GPT) -> None:
        """Shards every block separately and the remaining parameters as one unit (Zhao et al. 2023, section 3).

        Mixed precision gathers parameters and computes in bfloat16, and reduces gradients in float32.
        """
        assert self.lightning_module is not None  # noqa: S101
        if self.config.cpu_offload:
            self.lightning_module.to(self.root_device)  # all tensors, before the parameters are offloaded
        if self.config.tensor_parallel > 1:
            parallelize_blocks(model, self.device_mesh["tensor_parallel"])
        on_gpu = self.root_device.type == "cuda"  # without a GPU, memory is not pinned and offloading has no effect
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrap = partial(
            fully_shard,
            mesh=self.device_mesh["data_parallel"],
            mp_policy=mixed if self.hardware.precision == "bf16-mixed" else MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if self.config.cpu_offload else OffloadPolicy(),
        )
        for block in model.blocks:
            wrap(block, reshard_after_forward=self.config.reshard_after_forward)
        wrap(model, reshard_after_forward=False)  # the backward pass begins with these parameters
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
        blocks = cast(list[FSDPModule], list(self.gpt.blocks))
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
        for part in (*self.gpt.blocks, self.gpt):
            cast(FSDPModule, part).reshard()

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
