"""Signals that ask a run to stop: all ranks save the same step, and the run can go on from it."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch

from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.distributed.delayed_all_reduce import DelayedAllReduce

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # of schedulers: the end is near; submitit has the last


class Preempted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop and is saved, if it is one that is saved."""


class Preemption(L.Callback):
    """Stops all ranks at the same step when one of them is sent a signal, in the middle of an evaluation too.

    Args:
        step_sync: Through which the ranks agree.
        checkpoints: What saves the run; None where nothing does.
    """

    def __init__(self, step_sync: StepSync, checkpoints: RunCheckpoint | None) -> None:
        self.step_sync, self.checkpoints = step_sync, checkpoints
        self._agreement = DelayedAllReduce()  # during an evaluation, when there are no step reports

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replaces Lightning's own handling of SIGTERM, which no public setting turns off.

        Its handler broadcasts in the middle of whatever the other ranks do, and on its account every micro-batch of a
        distributed run waits for a broadcast (Lightning issue 21487; read in lightning 2.6.6).
        """
        connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop  # noqa: SLF001
        connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # noqa: SLF001

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen from here on; before, there is nothing to save."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if that is agreed; after the last step only its evaluation is left, and is made."""
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and self.step_sync.agreed_stop and trainer.global_step != trainer.max_steps:
            is_evaluated = self.checkpoints is not None and self.checkpoints.is_evaluated(trainer)
            self._stop(trainer, evaluation_due=is_evaluated)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop, if that is agreed; the evaluation is made again when the run goes on."""
        sums = self._agreement.add(torch.full((1,), float(self.step_sync.stop_requested), device=pl_module.device))
        if sums is not None and sums[0] > 0 and trainer.global_step != trainer.max_steps:
            self._stop(trainer, evaluation_due=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave no sum on its way."""
        self._agreement.collect()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.step_sync.stop_requested = True

    def _stop(self, trainer: L.Trainer, *, evaluation_due: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(trainer, evaluation_due=evaluation_due)
            self.checkpoints.files.wait()
        raise Preempted
