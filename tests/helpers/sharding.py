"""Writes tensors in several layouts, and reads all checkpoints of a directory into each layout. Run by torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gptlab.training.checkpoints.shards import load_shards, save_shards

SHAPES = {"up.weight": (10, 6), "up.bias": (10,), "down.weight": (6, 10), "down.bias": (6,), "last.weight": (3, 5)}
GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
TENSORS["step"] = torch.tensor(3.0)


class Model(torch.nn.Module):
    """Layers whose parameters are the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)
        self.last = torch.nn.Linear(5, 3, bias=False)

    def forward(self) -> None:
        """Is required by FSDP."""


def main() -> None:
    """Raises AssertionError if a tensor that is read differs from the one that was written."""
    dist.init_process_group("gloo")
    ranks, rank, folder = dist.get_world_size(), dist.get_rank(), Path(sys.argv[1])
    layouts = ["fsdp", "fsdp_tp", "mesh"] if ranks > 1 else ["one"]
    for name in layouts:
        checkpoint_dir = folder / f"{name}-{ranks}"
        if not checkpoint_dir.exists():
            dist.barrier()
            checkpoint_dir.mkdir(exist_ok=True)
            save_shards(layout(name, TENSORS), checkpoint_dir, rank, dist.group.WORLD)
            if name != "mesh":  # as earlier versions did
                save(layout(name, TENSORS), storage_writer=FileSystemWriter(folder / f"earlier-{name}-{ranks}"))
            dist.barrier()
    for checkpoint_dir in folder.iterdir():
        for name in layouts:
            target = layout(name, {name: torch.full_like(tensor, torch.nan) for name, tensor in TENSORS.items()})
            load_shards(checkpoint_dir, target)
            for key, tensor in target.items():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(full, TENSORS[key]), (checkpoint_dir, name, key)
    dist.destroy_process_group()


def layout(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Distributes tensors as FSDP does, as FSDP with tensor parallelism does, or by rows and columns."""
    ranks = dist.get_world_size()
    if name == "one":
        return dict(tensors)
    plain = {"step": tensors["step"].clone()}
    if name == "mesh":
        mesh = init_device_mesh("cpu", (ranks // 2, 2))
        places = {
            "up.weight": (Shard(0), Shard(1)),
            "down.weight": (Replicate(), Shard(1)),
            "last.weight": (Shard(1), Shard(1)),
        }
        return plain | {
            key: distribute_tensor(tensor, mesh, places.get(key, (Replicate(), Shard(0))))
            for key, tensor in tensors.items()
            if key != "step"
        }
    model = Model()
    model.load_state_dict({key: tensor for key, tensor in tensors.items() if key != "step"})
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    if name == "fsdp_tp":
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"] if name == "fsdp_tp" else init_device_mesh("cpu", (ranks,)))
    return plain | {key: parameter.detach() for key, parameter in model.state_dict().items()}


if __name__ == "__main__":
    main()
