"""Preemption: on a signal, all ranks save a checkpoint of the same step, from which the run can be resumed."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch

from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.distributed.delayed_all_reduce import DelayedAllReduce
from gptlab.training.distributed.processes import STOP_SIGNALS

log = logging.getLogger(__name__)


class Preempted(Exception):  # noqa: N818  (not an error)
    """Raised in a run that received a signal, after a checkpoint is saved, if the run saves checkpoints."""


class Preemption(L.Callback):
    """Stops all ranks at the same step when one of them receives a signal, also during an evaluation.

    Args:
        step_sync: Shares the preemption flag between the ranks.
        checkpoints: Saves the run; None if the run saves no checkpoints.
    """

    def __init__(self, step_sync: StepSync, checkpoints: RunCheckpoint | None) -> None:
        self.step_sync, self.checkpoints = step_sync, checkpoints
        self._agreement = DelayedAllReduce()  # used during an evaluation, when there are no step reports

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disables Lightning's handling of SIGTERM, for which there is no public option.

        Its handler starts a broadcast regardless of what the other ranks are doing, and every micro-batch of a
        distributed run waits for a broadcast (Lightning issue 21487; read in lightning 2.6.6).
        """
        connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop  # noqa: SLF001
        connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # noqa: SLF001

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the signal handlers. Before training starts, there is nothing to save. Ignored signals stay so."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is after nohup
                signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the run if the ranks have agreed to, except after the last step, when only an evaluation remains."""
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and self.step_sync.agreed_stop and trainer.global_step != trainer.max_steps:
            is_evaluated = self.checkpoints is not None and self.checkpoints.is_evaluated(trainer)
            self._stop(trainer, evaluation_due=is_evaluated)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stops the run if the ranks have agreed to; the resumed run repeats the evaluation."""
        sums = self._agreement.add(torch.full((1,), float(self.step_sync.stop_requested), device=pl_module.device))
        if sums is not None and sums[0] > 0 and trainer.global_step != trainer.max_steps:
            self._stop(trainer, evaluation_due=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Completes the pending all-reduce."""
        self._agreement.collect()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.step_sync.stop_requested = True

    def _stop(self, trainer: L.Trainer, *, evaluation_due: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(trainer, evaluation_due=evaluation_due)
            self.checkpoints.files.wait()
        raise Preempted
