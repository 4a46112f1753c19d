"""Builds the distributed strategy, compiles the model, and provides helpers that work with any strategy."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gptlab.files import use_private_compile_cache
from gptlab.model.gpt import GPT
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.fsdp import FSDP2Strategy
from gptlab.training.hardware import Hardware

RECOMPILES = 8  # recompilations per shape; torch's default limit


def build_strategy(
    config: TrainerConfig, plan: BatchPlan, hardware: Hardware, *, sharded_checkpoints: bool
) -> Strategy | str:
    """Builds Lightning's strategy for "single", "ddp", "fsdp" (FSDP2 over all devices) or "fsdp_tp"."""
    match config.strategy:
        case "ddp":
            # a static graph is recorded in the first backward pass; if that belongs to a micro-batch without
            # synchronization, torch's reducer fails an internal assertion. Buffers are constant, so that they need not
            # be broadcast in every forward pass
            static = plan.accumulation == 1
            return DDPStrategy(gradient_as_bucket_view=True, static_graph=static, broadcast_buffers=False)
        case "fsdp" | "fsdp_tp":
            return FSDP2Strategy(config, plan, hardware, sharded_checkpoints=sharded_checkpoints)
        case _:
            return "auto"


def compile_in_place(model: GPT, target: Literal["whole", "blocks"], mode: str, *, shapes: int) -> None:
    """Compiles the loss functions, or each block separately; identical blocks share the compiled code.

    Args:
        model: The model to compile; its parameters keep their names.
        target: "whole" for the loss functions, "blocks" for each block separately.
        mode: The ``mode`` of torch.compile.
        shapes: Number of input shapes in training. If there are several, each is compiled separately. By default, torch
            would compile for dynamic shapes from the second on, which is slower, and stop compiling after the eighth.
    """
    use_private_compile_cache()
    options: dict[str, Any] = {"mode": mode}
    if torch.are_deterministic_algorithms_enabled():  # Inductor then chooses no kernel by its measured speed
        options = {"options": {"deterministic": True, "triton.cudagraphs": mode == "reduce-overhead"}}
    if shapes > 1:
        options["dynamic"] = False
        if "recompile_limit" in signature(torch.compile).parameters:  # since torch 2.13
            options["recompile_limit"] = RECOMPILES * shapes
        else:
            torch._dynamo.config.recompile_limit = RECOMPILES * shapes  # noqa: SLF001  (read in torch 2.11)
    if target == "blocks":
        for block in model.blocks:
            block.compile(**options)
    else:
        for name in ("loss", "token_losses"):
            setattr(model, name, torch.compile(getattr(model, name), **options))


def gathered_weights(strategy: Strategy) -> AbstractContextManager[None]:
    """Keeps a sharded model's weights gathered between forward passes, for generation; a no-op for other models."""
    return strategy.gathered() if isinstance(strategy, FSDP2Strategy) else nullcontext()


@contextmanager
def any_length(trainer: L.Trainer) -> Iterator[None]:
    """Context manager for forward passes on inputs of any length, in the training precision.

    Weights of a sharded model are gathered, and compilation is disabled, because each length would be compiled.
    Operations without a deterministic algorithm are allowed, because sampling needs one: a cumulative sum on a GPU.
    """
    assert isinstance(trainer.precision_plugin, Precision)  # noqa: S101
    eager = torch.compiler.set_stance("force_eager")
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with eager, gathered_weights(trainer.strategy), trainer.precision_plugin.forward_context():
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warn_only)


@contextmanager
def scoring(trainer: L.Trainer, model: nn.Module) -> Iterator[None]:
    """Context manager as ``any_length``, with the model in evaluation mode; its mode is restored at the end."""
    training = model.training
    model.eval()
    try:
        with any_length(trainer):
            yield
    finally:
        model.train(training)


def refresh_gathered_weights(strategy: Strategy) -> None:
    """Gathers a sharded model's weights again after they were modified."""
    if isinstance(strategy, FSDP2Strategy):
        strategy.reshard()


def data_rank(trainer: L.Trainer) -> int:
    """Returns this process's data-parallel rank; the ranks of a tensor-parallel group have the same one."""
    return (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]


def num_data_ranks(trainer: L.Trainer) -> int:
    """Returns the number of data-parallel ranks."""
    return (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]


def reduce_over_data_ranks(tensor: Tensor, trainer: L.Trainer, operation: str) -> Tensor:
    """Reduces a tensor ("sum" or "mean") over the data-parallel ranks."""
    strategy = trainer.strategy
    group = strategy.device_mesh["data_parallel"].get_group() if isinstance(strategy, FSDP2Strategy) else None
    return strategy.reduce(tensor, group=group, reduce_op=operation)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor whole. For a sharded one, every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
