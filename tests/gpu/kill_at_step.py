"""Callback that kills the process of a run: callbacks.kill._target_=kill_at_step.KillAtStep callbacks.kill.step=8."""

import os
import signal
from typing import Any

import lightning as L


class KillAtStep(L.Callback):
    """Kills the process at the end of a step, without cleanup.

    Args:
        step: Optimizer step, counted from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Kills the process if this was the last micro-batch of the step."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
