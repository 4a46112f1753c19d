"""How the network is spread over devices."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gptlab.model.gpt import GPT


def build_strategy(name: str, world_size: int) -> Strategy | str:
    """Build Lightning's strategy for "single", "ddp" or "fsdp" (FSDP2 over all devices)."""
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, static_graph=True)
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "auto"


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
