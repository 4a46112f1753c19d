"""Tensor parallelism: every block is split over devices that share one batch (Shoeybi et al. 2019, section 3).

Attention is split by heads, the MLP by its inner width; each reduces its output over the devices once, and the gradient
of its input once. LayerNorms, embeddings and the head are replicated. All devices draw the same random numbers, so
replicated activations stay equal, and attention dropout, which each device applies to its own heads, uses the same mask
on every device.

Shapes: B batch, T time, C channels, nh heads, hs head size, tp devices that split a block.
"""

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from gptlab.model.gpt import GPT, Block
from gptlab.model.modern import WeightedSum


def parallelize_blocks(model: GPT, mesh: DeviceMesh) -> None:
    """Splits the blocks of a model over ``mesh``, in place.

    Every parameter becomes a DTensor with the same name and, when gathered, the same layout as before, so checkpoints
    are identical to those of one device. nh must be divisible by tp.
    """
    heads = model.config.n_head
    for block in model.h:
        plan: dict[str, ParallelStyle] = {
            "ln_1": ReplicatedLayer(),
            "attn.c_attn": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
            "attn.c_proj": RowwiseParallel(),
            "ln_2": ReplicatedLayer(),
            "mlp.c_fc": ColwiseParallel(),
            "mlp.c_proj": RowwiseParallel(),
        }
        plan |= {name: ReplicatedLayer() for name, part in block.named_children() if isinstance(part, WeightedSum)}
        parallelize_module(block, mesh, plan)
        cast(Block, block).attn.c_attn.register_forward_hook(lambda _, __, qkv: _own_heads(qkv, heads))
    whole: dict[str, ParallelStyle] = {name: ReplicatedLayer() for name in ("wte", "ln_f", "lm_head")}
    whole |= {name: ReplicatedLayer() for name in ("wpe", "ln_e") if getattr(model, name, None) is not None}
    parallelize_module(model, mesh, whole)
    if model.config.tie_weights:
        model.lm_head.weight = model.wte.weight


class ReplicatedLayer(ParallelStyle):
    """Replicated layer: every device of the group computes it redundantly, with DTensor parameters.

    Thus all parameters are on one mesh, as global gradient norms and fused optimizers require.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Distributes a layer; ``parallelize_module`` calls this method, abstract in torch 2.13's ParallelStyle."""

        def replicated(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
            return tuple(DTensor.from_local(part, mesh, [Replicate()], run_check=False) for part in inputs)

        def local(_: nn.Module, outputs: Any, mesh: DeviceMesh) -> Tensor:
            return outputs.to_local()

        return distribute_module(module, device_mesh, input_fn=replicated, output_fn=local)  # type: ignore[arg-type]


def _own_heads(qkv: DTensor, n_head: int) -> Tensor:
    """Returns the queries, keys and values (B, T, 3C / tp) of this device's heads from those of all heads (B, T, 3C).

    The rows of ``c_attn`` are split in the order of GPT-2's matrix, which is not by heads. Therefore they are first
    gathered and then split by heads.
    """
    by_heads = qkv.unflatten(2, (3, n_head, -1))  # (B, T, 3, nh, hs)
    return by_heads.redistribute(placements=[Shard(3)]).to_local().flatten(2)
