"""What a run tells its W&B record beside the metrics: samples, checkpoints, and what goes wrong."""

from functools import partial
from typing import cast

import lightning as L

from gptlab.tracking.wandb.logger import RunWandbLogger
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.samples import Samples
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.checkpoints.writing import AtomicCheckpointIO


def attach_wandb(trainer: L.Trainer, recorder: MetricsCallback) -> None:
    """Let the W&B record of a run, if it has one, hear of what happens."""
    for record in trainer.loggers:
        if not isinstance(record, RunWandbLogger):
            continue
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            match callback:
                case TrainingHealthMonitor():
                    callback.listeners.append(record.alert)
                case Samples():
                    callback.listeners.append(partial(record.log_samples, tokens=recorder.tokens))
                case Watchdog():
                    callback.listeners.append(record.give_up)
        if record.artifacts is not None:
            cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io).listeners.append(record.artifacts.take)
