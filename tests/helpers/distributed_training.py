"""Trains a tiny model in two processes with every strategy, and prints what was communicated. Run by torchrun."""

import gc
import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from conftest import defaults, tiny_config
from gptlab.data.batches import Batch
from gptlab.model.gpt import GPT
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import (
    AdamWConfig,
    ComponentOptimizerConfig,
    ConstantConfig,
    MuonConfig,
    OptimizerConfig,
    TrainerConfig,
)
from gptlab.training.distributed.strategies import build_strategy, gathered_weights
from gptlab.training.hardware import Hardware
from gptlab.training.module import GPTModule
from gptlab.training.optim import muon
from gptlab.training.optim.muon import StackedMuon, orthogonalize
from gptlab.training.optim.optimizers import build_optimizer

STEPS, MICRO_BATCHES = 2, 3
ADAMW = AdamWConfig(name="adamw", lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused="auto")

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": ADAMW,
    "muon": MuonConfig(**defaults("optimizer/muon.yaml")),
    **{name: ComponentOptimizerConfig(**defaults(f"optimizer/{name}.yaml")) for name in ("sgd", "adafactor", "lion")},
    "own": ComponentOptimizerConfig(**{"_target_": "distributed_training.Descent", "lr": 0.1}),
}


def optimizers(strategy: str) -> dict[str, OptimizerConfig]:
    """Returns the optimizers that work with a strategy; ``RunConfig`` refuses the others."""
    return {name: config for name, config in OPTIMIZERS.items() if name != "adafactor" or strategy == "ddp"}


class Descent(torch.optim.Optimizer):
    """An optimizer that needs a gradient for every parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


def main() -> None:
    """Prints the results as JSON, from rank 0."""
    found = {name: train(name) | mixed_precision(name) for name in ("ddp", "fsdp", "fsdp_tp")}
    found["buckets"] = many_buckets()
    found["muon"] = {layout: divided_muon(layout) for layout in ("replicated", "sharded")}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def train(strategy: str) -> dict[str, Any]:
    """Trains for two steps of three micro-batches, then runs three forward passes as sampling does."""
    parts = 2 if strategy == "fsdp_tp" else 1
    trainer, module = build(strategy, parts)
    generator = torch.Generator().manual_seed(1)
    batches = [Batch(*torch.randint(61, (2, 2, 16), generator=generator), None) for _ in range(STEPS * MICRO_BATCHES)]
    with profile(activities=[ProfilerActivity.CPU]) as training:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    with profile(activities=[ProfilerActivity.CPU]) as sampling, gathered_weights(trainer.strategy), torch.no_grad():
        for _ in range(3):
            module.model(batches[0].idx)
    return {
        "reduced": trainer.callbacks[0].buckets or event_counts(training)["c10d::_reduce_scatter_base_"],
        "gathered": event_counts(sampling)["c10d::_allgather_base_"],
        "held": held_fraction(module.model),
        "syncs_buffers": trainer.callbacks[0].syncs_buffers,
        "alike": is_identical(local_tensor(module.model.ln_f.weight)),
        "split": tensor_parallel_error(module) if parts > 1 else None,
        "kept": {name: keeps_weights(strategy, parts, config) for name, config in optimizers(strategy).items()},
    }


class Divergence(L.Callback):
    """Makes the gradients of the second step NaN, by those of one process, and records the weights of every step."""

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            loss *= float("nan")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append([local_tensor(parameter).detach().clone() for parameter in pl_module.parameters()])


def keeps_weights(strategy: str, parts: int, optimizer: OptimizerConfig) -> bool:
    """Whether the weights after a step with a NaN gradient are those before it, and change in the other step."""
    divergence = Divergence()
    trainer, module = build(strategy, parts, optimizer, divergence)
    batches = [Batch(*torch.randint(61, (2, 2, 16)), None) for _ in range(STEPS * MICRO_BATCHES)]
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    first, second = divergence.weights[MICRO_BATCHES - 1 :: MICRO_BATCHES]
    assert not torch.equal(first[-1].sum(), before[-1].sum())
    return trainer.global_step == STEPS and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def many_buckets() -> dict[str, Any]:
    """Trains with DDP and small buckets; returns their number, and the losses with those of a plain loop."""
    recorded = Losses()
    trainer, module = build("ddp", 1, ADAMW, recorded, dropout=0.0)
    trainer.strategy._ddp_kwargs["bucket_cap_mb"] = 2**-7  # 8 KiB
    plain = GPT(tiny_config())
    plain.load_state_dict(module.model.state_dict())
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(61, (STEPS * MICRO_BATCHES, 2, 2, 2, 16), generator=generator)  # (micro-batch, rank, ...)
    batches = [Batch(*micro[dist.get_rank()], None) for micro in numbers]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    optimizer, losses = build_optimizer(plain, ADAMW, fused=False), []
    for number, micro in enumerate(numbers, start=1):
        both = [plain.loss(idx, targets, None, None) for idx, targets in micro]
        (sum(both) / (2 * MICRO_BATCHES)).backward()
        losses.append(both[dist.get_rank()].item())
        if number % MICRO_BATCHES == 0:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return {"reduced": trainer.callbacks[0].buckets, "losses": recorded.losses, "plain": losses}


def divided_muon(layout: str) -> dict[str, Any]:
    """Performs steps of Muon on matrices of three shapes; compares them with torch's Muon in this process."""
    shapes = [(12, 4), (4, 16), (12, 4), (5, 3), (12, 4)]  # rows and stacks that two ranks do not divide
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    mesh, worked = init_device_mesh("cpu", (2,)), []

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if layout == "sharded" else tensor.clone()

    def counted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        worked.append(x.size(0))
        return orthogonalize(x, *args)

    ours, theirs = ([nn.Parameter(function(w)) for w in weights] for function in (placed, torch.clone))
    options = {"lr": 0.05, "weight_decay": 0.3}
    stacked = StackedMuon([{"params": ours}], ns_dtype="float64", cautious=False, **options)
    reference = torch.optim.Muon(theirs, **options)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalize", counted)
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # the only dtype of torch's Muon
        for _ in range(STEPS):
            for our, their, shape in zip(ours, theirs, shapes, strict=True):
                their.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
                our.grad = placed(their.grad)
            stacked.step()
            reference.step()
    whole = [our.full_tensor() if layout == "sharded" else our for our in ours]
    return {
        "error": max((a - b).abs().max().item() for a, b in zip(whole, theirs, strict=True)),
        "alike": all(is_identical(weight) for weight in whole),
        "orthogonalized": sum(worked),
        "gathers": event_counts(profiled)["_c10d_functional::all_gather_into_tensor"],
    }


class Losses(L.Callback):
    """Records the loss of every micro-batch, and the bytes that the first one leaves behind: gradients and a loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.losses:
            self.held = -held_bytes()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if not self.losses:
            self.held += held_bytes() - pl_module.step_loss.nbytes
        self.losses.append(outputs["loss"].item())


def mixed_precision(strategy: str) -> dict[str, Any]:
    """Trains in mixed precision; returns the losses and the bytes of accumulated gradients."""
    recorded = Losses()
    trainer, module = build(strategy, 2 if strategy == "fsdp_tp" else 1, ADAMW, recorded, precision="bf16-mixed")
    generator = torch.Generator().manual_seed(1)
    batches = [Batch(*torch.randint(61, (2, 2, 16), generator=generator), None) for _ in range(STEPS * MICRO_BATCHES)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return {"mixed": recorded.losses, "accumulated": recorded.held}


def held_bytes() -> int:
    """Returns the bytes of all tensors of this process, each storage counted once."""
    gc.collect()
    storages = {}
    for tensor in [part for part in gc.get_objects() if isinstance(part, torch.Tensor)]:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None and part.device.type == "cpu":
                storage = local_tensor(part).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Buckets(L.Callback):
    """Counts the buckets of gradients that DDP reduces."""

    buckets, syncs_buffers = 0, False

    def on_train_start(self, trainer, pl_module):
        if isinstance(trainer.strategy, DDPStrategy):
            self.syncs_buffers = trainer.strategy.model.will_sync_module_buffers()
            trainer.strategy.model.register_comm_hook(None, self._reduce)

    def _reduce(self, _, bucket):
        self.buckets += 1
        return allreduce_hook(None, bucket)


def build(
    strategy: str,
    parts: int,
    optimizer: OptimizerConfig = ADAMW,
    *callbacks: L.Callback,
    precision: Any = "32-true",
    dropout: float = 0.1,
) -> tuple[L.Trainer, GPTModule]:
    """Returns a trainer and a module."""
    named = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "tensor_parallel": parts, "precision": precision}
    config = TrainerConfig(**defaults("trainer/auto.yaml") | named)
    hardware = Hardware("cpu", "", 2, 1, precision, compile=False)
    torch.manual_seed(0)
    model = tiny_config(dropout=dropout)
    schedule = ConstantConfig(name="constant", warmup_steps=0)
    train = SimpleNamespace(grad_clip=1.0, ema_decay=None, compile_mode="default", loss_chunk=None)
    run = SimpleNamespace(
        seed=1, model=model, optimizer=optimizer, schedule=schedule, loss=None, train=train, steps=STEPS
    )
    module = GPTModule(GPT(model), run, token_bytes=torch.ones(61, dtype=torch.int), compile=False, loss_chunk=None)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=build_strategy(config, BatchPlan(2 // parts, 2, MICRO_BATCHES), hardware, sharded_checkpoints=False),
        precision=precision,
        max_steps=STEPS,
        accumulate_grad_batches=MICRO_BATCHES,
        callbacks=[Buckets(), *callbacks],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, module


def tensor_parallel_error(module: GPTModule) -> dict[str, float]:
    """Returns the largest errors of the logits and gradients of a tensor-parallel model."""
    model = module.model.eval()
    module.trainer.optimizers[0].zero_grad()
    whole = GPT(tiny_config()).eval()
    whole.load_state_dict({name: p.full_tensor().detach() for name, p in model.named_parameters()}, strict=False)
    idx = torch.arange(32).view(2, 16)
    found, expected = model(idx), whole(idx)
    for logits in (found, expected):
        logits.square().mean().backward()
    gradients = zip(model.parameters(), whole.parameters(), strict=True)
    return {
        "logits": (found - expected).abs().max().item(),
        "gradients": max((p.grad.full_tensor() - q.grad).abs().max().item() for p, q in gradients),
    }


def held_fraction(model: GPT) -> float:
    """Returns the fraction of the weights of the blocks that this process holds."""
    weights = [p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() > 1]
    return sum(local_tensor(p).numel() for p in weights) / sum(p.numel() for p in weights)


def is_identical(tensor: torch.Tensor) -> bool:
    """Whether a tensor is bit-identical on both processes."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    return torch.equal(*both)


def local_tensor(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def event_counts(profiled: profile) -> Counter[str]:
    return Counter({event.key: event.count for event in profiled.key_averages()})


if __name__ == "__main__":
    sys.exit(main())
