"""When a run is saved, and what is yet to be done where it goes on."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from gptlab.training.checkpoints.records import CheckpointMetadata, checkpoint_path
from gptlab.training.checkpoints.writing import AtomicCheckpointIO
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Saves after every evaluation, every so many steps, and when it is told to.

    Args:
        files: What writes them.
        folder: Where they are.
        every: Steps between checkpoints, beside those after evaluations; None for no others.
        eval_every: Steps between evaluations.
    """

    def __init__(self, files: AtomicCheckpointIO, folder: Path, *, every: int | None, eval_every: int) -> None:
        self.files, self.folder, self.every, self.eval_every = files, folder, every, eval_every
        self.evaluation_due = False  # at the step of the checkpoint, which was saved before it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make up for the evaluation that the checkpoint came before.

        ``Trainer.validate`` cannot be called while ``Trainer.fit`` runs, so the loop is run as Lightning itself does
        within an epoch (``_TrainingEpochLoop.on_advance_end``, read in lightning 2.6.6).
        """
        if self.evaluation_due:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise what went wrong since; save, where the step is one to be saved and no evaluation follows."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.files.check()
        if self.every and trainer.global_step % self.every == 0 and not self.is_evaluated(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was evaluated."""
        loss = trainer.callback_metrics["val/loss"].item()
        self.save(trainer, val_loss=loss if math.isfinite(loss) else None)

    def is_evaluated(self, trainer: L.Trainer) -> bool:
        """Whether an evaluation belongs to the step that was just made."""
        return trainer.global_step % self.eval_every == 0 or trainer.global_step == trainer.max_steps

    def save(self, trainer: L.Trainer, *, val_loss: float | None = None, evaluation_due: bool = False) -> None:
        """Save the step that was just made; every rank must call this."""
        assert isinstance(trainer.lightning_module, GPTModule)  # noqa: S101
        trainer.lightning_module.on_validation_end()  # an evaluation may have put other weights there
        self.evaluation_due = evaluation_due
        facts = CheckpointMetadata(step=trainer.global_step, val_loss=val_loss, evaluation_due=evaluation_due)
        trainer.save_checkpoint(checkpoint_path(self.folder, facts.step), weights_only=False, storage_options=facts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last one."""
        self.files.wait()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Wait for what is being written; what ends the run is another error."""
        try:
            self.files.wait()
        except Exception as error:
            if error is not exception:
                log.exception("A checkpoint could not be written.")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"evaluation_due": self.evaluation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Learn what is yet to be done."""
        self.evaluation_due = state_dict["evaluation_due"]
