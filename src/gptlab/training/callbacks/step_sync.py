"""Per-step all-reduce of the preemption flag, the loss and the bad-step flag."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch

from gptlab.training.distributed.delayed_all_reduce import DelayedAllReduce
from gptlab.training.module import GPTModule


class StepReport(NamedTuple):
    """Result of one step, the same on all ranks.

    Attributes:
        step: Step number, counted from 1 as in metrics.csv.
        loss: Mean over all ranks and micro-batches, in nats per token.
        is_bad: Whether the gradient was not finite, so that the step was skipped.
    """

    step: int
    loss: float
    is_bad: bool


class StepSync(L.Callback):
    """Sums preemption flag, loss and bad-step flag over all ranks; results are one step late (``DelayedAllReduce``).

    Attributes:
        stop_requested: Preemption flag of this rank; set by signal handlers.
        agreed_stop: Whether the flag of any rank is set. It becomes true on all ranks at the same step.
        listeners: Called with every report, on every rank, in the order of the steps.
    """

    def __init__(self) -> None:
        self.stop_requested = self.agreed_stop = False
        self.listeners: list[Callable[[StepReport], None]] = []
        self._agreement = DelayedAllReduce()
        self._step = self._world_size = 0  # of the pending sum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts the sum of the step if this micro-batch completed one; reports the previous step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        stop = torch.full((), float(self.stop_requested), device=pl_module.device)  # filled on device: no blocking copy
        loss = pl_module.step_loss / trainer.accumulate_grad_batches
        bad = pl_module.bad_step.to(stop.device)  # on the CPU if FSDP offloads the gradients
        sums = self._agreement.add(torch.stack([stop, loss, bad]))
        self._take(sums)
        self._step, self._world_size = trainer.global_step, trainer.world_size

    def collect(self) -> None:
        """Waits for the pending step and reports it, e.g. before a row of metrics or a checkpoint.

        Every rank must call this at the same step; otherwise ``agreed_stop`` becomes true a step earlier on some.
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
