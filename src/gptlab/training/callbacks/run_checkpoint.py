"""Saves checkpoints; in a resumed run, runs an evaluation that preemption prevented."""

import errno
import logging
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from gptlab.training.checkpoints.records import CheckpointMetadata, checkpoint_path
from gptlab.training.checkpoints.writing import AtomicCheckpointIO
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Saves a checkpoint after every evaluation, every ``every`` steps, and when ``save`` is called.

    Args:
        files: Writes the checkpoints.
        folder: Directory of the checkpoints.
        every: Steps between checkpoints, in addition to those after evaluations; None for no additional ones.
        eval_every: Steps between evaluations.
        end_rules: Length of the run and configuration of the callbacks that may end it early. A run that a callback
            has ended stays finished when it is resumed, unless these have changed.
    """

    def __init__(
        self, files: AtomicCheckpointIO, folder: Path, *, every: int | None, eval_every: int, end_rules: str
    ) -> None:
        self.files, self.folder, self.every, self.eval_every = files, folder, every, eval_every
        self.end_rules = end_rules
        self.ended_by: str | None = None  # end_rules with which a callback ended the run at the checkpoint
        self.evaluation_due = False  # whether the checkpoint was saved before the evaluation of its step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a run that a callback had ended at the checkpoint; runs the evaluation that was due there, if any.

        ``Trainer.validate`` cannot be called while ``Trainer.fit`` runs, so the validation loop is run as Lightning
        itself does within an epoch (``_TrainingEpochLoop.on_advance_end``, read in lightning 2.6.6).
        """
        if self.ended_by == self.end_rules:
            trainer.should_stop = True
            log.info(
                "The run was ended by a callback at step %d. To train further, change train.max_steps or the callback.",
                trainer.global_step,
            )
        if self.evaluation_due:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises errors of the background thread; saves if a checkpoint is due and no evaluation follows this step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.files.check()
        if self.every and trainer.global_step % self.every == 0 and not self.is_evaluated(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the step that was evaluated, with its val loss if that is finite."""
        loss = trainer.callback_metrics["val/loss"].item()
        self.save(trainer, val_loss=loss if math.isfinite(loss) else None)

    def is_evaluated(self, trainer: L.Trainer) -> bool:
        """Returns whether the step that was just completed is followed by an evaluation."""
        return trainer.global_step % self.eval_every == 0 or trainer.global_step == trainer.max_steps

    def save(self, trainer: L.Trainer, *, val_loss: float | None = None, evaluation_due: bool = False) -> None:
        """Saves the step that was just completed; every rank must call this."""
        assert isinstance(trainer.lightning_module, GPTModule)  # noqa: S101
        trainer.lightning_module.on_validation_end()  # restores the trained weights after averages were evaluated
        self.evaluation_due = evaluation_due
        is_ended = trainer.should_stop and trainer.global_step < trainer.max_steps
        self.ended_by = self.end_rules if is_ended else None
        facts = CheckpointMetadata(step=trainer.global_step, val_loss=val_loss, evaluation_due=evaluation_due)
        trainer.save_checkpoint(checkpoint_path(self.folder, facts.step), weights_only=False, storage_options=facts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits until the last checkpoint is written; raises OSError if the disk was full."""
        self.files.wait()
        if self.files.unsaved is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.files.unsaved))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Waits for a pending checkpoint; logs its error, if any, because the run already ends with another one."""
        try:
            self.files.wait()
        except Exception as error:
            if error is not exception:
                log.exception("A checkpoint could not be written.")

    def state_dict(self) -> dict[str, Any]:
        """Returns whether an evaluation is still due, and whether a callback has ended the run."""
        return {"evaluation_due": self.evaluation_due, "ended_by": self.ended_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores whether an evaluation is still due, and whether a callback has ended the run."""
        self.evaluation_due = bool(state_dict["evaluation_due"])
        self.ended_by = state_dict.get("ended_by")  # None in checkpoints of earlier versions
