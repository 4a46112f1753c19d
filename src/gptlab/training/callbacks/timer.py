"""Time limit of a run."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer as LightningTimer
from pydantic import PositiveInt

from gptlab.errors import UserError
from gptlab.training.callbacks.checked_callback import CheckedCallback
from gptlab.training.callbacks.metrics import ends_step

log = logging.getLogger(__name__)


class Timer(LightningTimer, CheckedCallback):
    """Lightning's ``Timer``, which checks the time only at the end of every ``check_every`` steps.

    Lightning's own check is a blocking broadcast in every micro-batch, also within a step. When the time is over, the
    run is evaluated and saved as after its last step.

    Args:
        duration: Training time as DD:HH:MM:SS, summed over the starts of the run.
        check_every: Steps between checks.

    Raises:
        UserError: ``duration`` is not a time.
    """

    def __init__(self, duration: str, check_every: PositiveInt) -> None:
        try:
            super().__init__(duration=duration, verbose=False)
        except Exception as error:  # Lightning's MisconfigurationException
            raise UserError(f"callbacks.timer.duration={duration} is not of the form DD:HH:MM:SS.") from error
        self.duration, self.check_every = duration, check_every

    def on_fit_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Ends a resumed run that has no time left before its first step."""
        self._check(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run if its time is over; all ranks follow the clock of the first."""
        if ends_step(trainer, batch_idx) and trainer.global_step % self.check_every == 0:
            self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        left = self.time_remaining()
        if trainer.strategy.broadcast(left is not None and left <= 0):
            trainer.should_stop = True
            log.info(
                "step %d · the time limit callbacks.timer.duration=%s is reached", trainer.global_step, self.duration
            )
