"""How the network is spread over devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gptlab.model.gpt import GPT
from gptlab.training.batch import BatchPlan


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


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2, except that checkpoints name the network's parameters without the LightningModule's prefix."""

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load into the network and the optimizers what any strategy has saved; return the rest."""
        assert self.lightning_module is not None  # noqa: S101
        optimizers = {f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return _load_checkpoint(
            path=Path(checkpoint_path),
            state={"state_dict": self.lightning_module.model, **optimizers},
            optimizer_states_from_list=True,
            weights_only=weights_only,
        )


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
