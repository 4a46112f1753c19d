"""When Python looks for garbage: at the same steps on all ranks, and not in the middle of one."""

import gc
from typing import Any

import lightning as L

COLLECT_EVERY = 1000  # steps, as in OLMo-core (callbacks/garbage_collector.py)


class GarbageCollection(L.Callback):
    """Collects garbage after every evaluation and every ``COLLECT_EVERY`` steps, and at no other time.

    Python looks for it when many objects were made, on each rank at another moment, and all ranks wait for the one that
    looks. What is there after the first step stays until the end, and is not looked through again.
    """

    def __init__(self) -> None:
        self._holds = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take over after the first step; later, collect where the step is one of those."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._holds:
            if gc.isenabled():  # else somebody else has taken over
                gc.disable()
                gc.collect()
                gc.freeze()
                self._holds = True
        elif trainer.global_step % COLLECT_EVERY == 0:
            gc.collect()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect what the evaluation and what came with it have left."""
        if self._holds:
            gc.collect()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave all to Python again."""
        if self._holds:
            gc.unfreeze()
            gc.enable()
            self._holds = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave all to Python again."""
        self.on_train_end(trainer, pl_module)
