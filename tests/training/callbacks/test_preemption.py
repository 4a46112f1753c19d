"""Lightning's own handling of SIGTERM, and that it is replaced."""

import signal
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel

from gptlab.training.callbacks.preemption import SIGNALS, Preemption
from gptlab.training.callbacks.step_sync import StepSync

MICRO_BATCHES = 3


class Handlers(L.Callback):
    """Notes what answers SIGTERM when training starts, before the callbacks that follow have had their say."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = signal.getsignal(signal.SIGTERM)


class Silent(Preemption):
    """Does nothing of its own at a micro-batch."""

    def on_train_batch_end(self, *_: object) -> None:
        pass

    def on_validation_batch_end(self, *_: object) -> None:
        pass


@pytest.fixture
def broadcasts(tmp_path: Path, monkeypatch) -> Iterator[list[object]]:
    """What is broadcast in a group of one process, which Lightning takes for one of two."""
    sent: list[object] = []
    owners = {number: signal.getsignal(number) for number in SIGNALS}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda _: 2))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: sent.append(tensor))
    yield sent
    dist.destroy_process_group()
    for number, owner in owners.items():
        signal.signal(number, owner)


def fit(*callbacks: L.Callback) -> object:
    """Train for some micro-batches; return what answered SIGTERM."""
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


def test_every_micro_batch_of_lightning_s_waits_for_a_broadcast_and_its_handler_answers_sigterm(broadcasts):
    before = signal.getsignal(signal.SIGTERM)
    assert fit() is not before
    assert len(broadcasts) == MICRO_BATCHES


def test_with_preemption_there_is_neither(broadcasts):
    before = signal.getsignal(signal.SIGTERM)
    assert fit(Silent(StepSync(), None)) is before
    assert broadcasts == []
