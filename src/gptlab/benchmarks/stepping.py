"""Training steps with and without guards, in turns, in one run."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from gptlab.benchmarks.measuring import StepTime
from gptlab.data.batches import Batch
from gptlab.model.config import GPTConfig
from gptlab.model.modern import build_gpt
from gptlab.tracking.logs import quiet_lightning
from gptlab.tracking.run_directory import STACKS
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.config import AdamWConfig, ConstantConfig, TrainConfig
from gptlab.training.module import GPTModule, TrainingConfig

TURN = 10  # steps; the first of each is not counted, as it ends what the other way has begun
LIMITS = SimpleNamespace(max_bad_steps=10, spike_sigma=6.0, spike_window=128)
TIMEOUT = 600.0  # of the watchdog


class _Module(GPTModule):
    guarded = True

    def skip_if_bad(self, optimizer: Optimizer) -> None:
        if self.guarded:
            super().skip_if_bad(optimizer)
        else:
            optimizer.found_inf = None  # type: ignore[attr-defined]


class _AlternatingGuards(L.Callback):
    """Gives the guards and their absence turns, and takes the time of every step.

    Attributes:
        times: Of the steps without guards, and of those with them.
    """

    def __init__(self) -> None:
        self.guards: list[L.Callback] = []
        self.times: tuple[list[StepTime], list[StepTime]] = ([], [])
        self._begun = StepTime.now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the step before, and begin the next: all that Lightning does between two is in it."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = StepTime.now()
        assert isinstance(pl_module, _Module)  # noqa: S101
        if batch_idx % TURN > 1 or (batch_idx % TURN == 0 and batch_idx > 0):
            self.times[pl_module.guarded].append(StepTime(now.wall - self._begun.wall, now.cpu - self._begun.cpu))
        if batch_idx % TURN == 0:
            pl_module.guarded = batch_idx // TURN % 2 == 1
            trainer.callbacks = [self, *self.guards] if pl_module.guarded else [self]  # type: ignore[attr-defined]
        self._begun = StepTime.now()


def time_steps(
    model: GPTConfig, optimizer: AdamWConfig, *, batch_size: int, steps: int
) -> tuple[list[StepTime], list[StepTime]]:
    """Train on random tokens; return the times of ``steps`` steps without guards, and of as many with them."""
    quiet_lightning()
    torch.manual_seed(0)
    turns, pulse = _AlternatingGuards(), StepSync()
    turns.guards = [pulse, TrainingHealthMonitor(pulse, cast(TrainConfig, LIMITS), "")]
    module = _module(model, optimizer)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=(2 * -(-steps // (TURN - 1)) + 1) * TURN,
        max_epochs=-1,
        callbacks=[turns],
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with TemporaryDirectory() as folder, Watchdog(trainer, TIMEOUT, Path(folder) / STACKS) as watchdog:
        turns.guards.append(watchdog)
        trainer.fit(module, _batches(model, batch_size))
    return turns.times[0][:steps], turns.times[1][:steps]


def _module(model: GPTConfig, optimizer: AdamWConfig) -> _Module:
    train = SimpleNamespace(grad_clip=1.0, ema_decay=None, compile_mode="default", loss_chunk=None)
    schedule = ConstantConfig(name="constant", warmup_steps=0)
    config = SimpleNamespace(seed=0, model=model, optimizer=optimizer, schedule=schedule, train=train, steps=10**9)
    token_bytes = torch.ones(model.vocab_size or 0)
    return _Module(build_gpt(model), cast(TrainingConfig, config), token_bytes=token_bytes, compile=False)


def _batches(model: GPTConfig, batch_size: int) -> DataLoader[Batch]:
    assert model.vocab_size is not None  # noqa: S101  (conf/bench.yaml has it)
    tokens = torch.randint(model.vocab_size, (batch_size, model.block_size + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    return DataLoader(cast(Any, [batch] * 10**6), batch_size=None)
