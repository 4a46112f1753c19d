"""Replacement of Lightning's handling of SIGTERM."""

import signal
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel

from gptlab.training.callbacks.preemption import Preemption
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.distributed.processes import STOP_SIGNALS

MICRO_BATCHES = 3


class Handlers(L.Callback):
    """Records the SIGTERM handler when training starts, before later callbacks change it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = signal.getsignal(signal.SIGTERM)


class Silent(Preemption):
    """Preemption without its own work per micro-batch."""

    def on_train_batch_end(self, *_: object) -> None:
        pass

    def on_validation_batch_end(self, *_: object) -> None:
        pass


@pytest.fixture
def broadcasts(tmp_path: Path, monkeypatch) -> Iterator[list[object]]:
    """The broadcast tensors in a process group of one rank, for which Lightning sees world size 2."""
    sent: list[object] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda _: 2))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: sent.append(tensor))
    yield sent
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fit(*callbacks: L.Callback) -> object:
    """Trains for some micro-batches; returns the SIGTERM handler."""
    handlers = Handlers()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=MICRO_BATCHES,
        limit_val_batches=0,
        callbacks=[handlers, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    return handlers.found


def test_lightning_handles_sigterm_and_broadcasts_at_every_micro_batch(broadcasts):
    before = signal.getsignal(signal.SIGTERM)
    assert fit() is not before
    assert len(broadcasts) == MICRO_BATCHES


def test_preemption_disables_lightning_s_handler_and_broadcasts(broadcasts):
    before = signal.getsignal(signal.SIGTERM)
    assert fit(Silent(StepSync(), None)) is before
    assert broadcasts == []


def test_an_ignored_signal_stays_ignored():
    """As SIGHUP is after nohup."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        preemption = Preemption(StepSync(), None)
        preemption.on_train_start(L.Trainer(logger=False), BoringModel())
        found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found.pop(signal.SIGHUP) is signal.SIG_IGN
    assert {*found.values()} == {preemption._on_signal}
