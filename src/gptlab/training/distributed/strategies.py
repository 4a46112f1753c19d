"""How the network is spread over devices."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

from gptlab.model.gpt import GPT
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.fsdp import FSDP2Strategy
from gptlab.training.hardware import Hardware

RECOMPILES = 8  # of one shape, as torch has it


def build_strategy(
    config: TrainerConfig, plan: BatchPlan, hardware: Hardware, *, sharded_checkpoints: bool
) -> Strategy | str:
    """Build Lightning's strategy for "single", "ddp", "fsdp" (FSDP2 over all devices) or "fsdp_tp"."""
    match config.strategy:
        case "ddp":
            # a static graph is recorded in the first backward pass; where that is a micro-batch's without
            # synchronisation, torch's reducer fails an assertion of its own
            return DDPStrategy(gradient_as_bucket_view=True, static_graph=plan.accumulation == 1)
        case "fsdp" | "fsdp_tp":
            return FSDP2Strategy(config, plan, hardware, sharded_checkpoints=sharded_checkpoints)
        case _:
            return "auto"


def compile_in_place(model: GPT, what: Literal["whole", "blocks"], mode: str, *, shapes: int) -> None:
    """Compile the loss as a whole, or each block by itself: blocks that are alike share what is compiled.

    Args:
        model: To be compiled; its parameters keep their names.
        what: See there.
        mode: Of torch.compile's.
        shapes: How many shapes training has. Where it is more than one, each is compiled for itself: by itself torch
            would, from the second on, compile for all at once, which is slower, and give up after the eighth.
    """
    options: dict[str, Any] = {"mode": mode}
    if shapes > 1:
        options |= {"dynamic": False, "recompile_limit": RECOMPILES * shapes}
    if what == "blocks":
        for block in model.h:
            block.compile(**options)
    else:
        for name in ("loss", "token_losses"):
            setattr(model, name, torch.compile(getattr(model, name), **options))


def gathered_weights(strategy: Strategy) -> AbstractContextManager[None]:
    """Keep a sharded network whole between forward passes, for generation; nothing for any other network."""
    return strategy.gathered() if isinstance(strategy, FSDP2Strategy) else nullcontext()


@contextmanager
def any_length(trainer: L.Trainer) -> Iterator[None]:
    """Run the network on inputs of any length, in the training's precision: whole, and not compiled anew for each."""
    assert isinstance(trainer.precision_plugin, Precision)  # noqa: S101
    eager = torch.compiler.set_stance("force_eager")
    with eager, gathered_weights(trainer.strategy), trainer.precision_plugin.forward_context():
        yield


def refresh_gathered_weights(strategy: Strategy) -> None:
    """Let a sharded network, whose weights were written to, gather them anew."""
    if isinstance(strategy, FSDP2Strategy):
        strategy.reshard()


def data_rank(trainer: L.Trainer) -> int:
    """Say which share of the data this rank reads: those that split one model between them read the same."""
    return (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]


def reduce_over_data_ranks(tensor: Tensor, trainer: L.Trainer, operation: str) -> Tensor:
    """Reduce a tensor ("sum" or "mean") over the ranks that read data of their own."""
    strategy = trainer.strategy
    group = strategy.device_mesh["data_parallel"].get_group() if isinstance(strategy, FSDP2Strategy) else None
    return strategy.reduce(tensor, group=group, reduce_op=operation)
