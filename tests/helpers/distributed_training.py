"""Trains a tiny model in two processes with every strategy, and prints what was communicated. Run by torchrun."""

import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
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
    found = {name: train(name) for name in ("ddp", "fsdp", "fsdp_tp")}
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


class Buckets(L.Callback):
    """Counts the buckets of gradients that DDP reduces."""

    buckets = 0

    def on_train_start(self, trainer, pl_module):
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model.register_comm_hook(None, self._reduce)

    def _reduce(self, _, bucket):
        self.buckets += 1
        return allreduce_hook(None, bucket)


def build(
    strategy: str, parts: int, optimizer: OptimizerConfig = ADAMW, *callbacks: L.Callback
) -> tuple[L.Trainer, GPTModule]:
    """Returns a trainer and a module with dropout."""
    named = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "tensor_parallel": parts, "precision": "32-true"}
    config = TrainerConfig(**defaults("trainer/auto.yaml") | named)
    hardware = Hardware("cpu", "", 2, 1, "32-true", compile=False)
    torch.manual_seed(0)
    model = tiny_config(dropout=0.1)
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
