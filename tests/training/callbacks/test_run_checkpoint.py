"""RunCheckpoint: the evaluation that is due in a resumed run."""

from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.checkpoints.writing import AtomicCheckpointIO

STEPS = 2


class Unsaved(RunCheckpoint):
    """RunCheckpoint that saves nothing and records the order of training steps and evaluations."""

    def __init__(self, *, evaluation_due: bool) -> None:
        files = AtomicCheckpointIO(keep_last=1, keep_best=False, asynchronous=False)
        super().__init__(files, Path("unused"), every=None, eval_every=STEPS, end_rules="")
        self.evaluation_due = evaluation_due
        self.seen: list[tuple[str, int, bool]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("evaluated", trainer.global_step, pl_module.training))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.seen.append(("trained", trainer.global_step, pl_module.training))


@pytest.mark.parametrize("due", [True, False])
def test_a_due_evaluation_runs_before_the_first_step(due):
    callback = Unsaved(evaluation_due=due)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=2,
        val_check_interval=STEPS,
        num_sanity_val_steps=0,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    steps = [("trained", 1, True), ("trained", 2, True), ("evaluated", 2, False)]
    assert callback.seen == ([("evaluated", 0, False)] if due else []) + steps
