"""What the ranks tell each other at every step: whether one is to stop, and how the step went."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch

from gptlab.training.distributed.delayed_all_reduce import DelayedAllReduce
from gptlab.training.module import GPTModule


class StepReport(NamedTuple):
    """One step, as all ranks know it.

    Attributes:
        step: Counted from 1, as in metrics.csv.
        loss: Mean over all ranks and micro-batches, in nats per token.
        is_bad: The gradient was not finite, and the step skipped.
    """

    step: int
    loss: float
    is_bad: bool


class StepSync(L.Callback):
    """Sums every rank's news of a step, which all know one step later (see ``DelayedAllReduce``).

    Attributes:
        stop_requested: This rank is asked to stop; for signal handlers to set.
        agreed_stop: Some rank was asked to stop. It becomes true on all ranks at the same step.
        listeners: Called with every report, on every rank, in the order of the steps.
    """

    def __init__(self) -> None:
        self.stop_requested = self.agreed_stop = False
        self.listeners: list[Callable[[StepReport], None]] = []
        self._agreement = DelayedAllReduce()
        self._step = self._world_size = 0  # of the sum that is on its way

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the sum of the step that this micro-batch completed, if it did; take in that of the step before."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        stop = torch.full((), float(self.stop_requested), device=pl_module.device)  # filled there: no copy that waits
        loss = pl_module.step_loss / trainer.accumulate_grad_batches
        sums = self._agreement.add(torch.stack([stop, loss, pl_module.bad_step]))
        self._take(sums)
        self._step, self._world_size = trainer.global_step, trainer.world_size

    def collect(self) -> None:
        """Take in the step that is on its way, for what must know it now: a row of metrics, a checkpoint.

        Every rank must do so at the same step, or ``agreed_stop`` would come to some a step earlier.
        """
        self._take(self._agreement.collect())

    def _take(self, sums: list[float] | None) -> None:
        if sums is None:
            return
        stop, loss, bad = sums
        self.agreed_stop = self.agreed_stop or stop > 0
        report = StepReport(self._step, loss / self._world_size, bad > 0)
        for listener in self.listeners:
            listener(report)
