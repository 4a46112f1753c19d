"""Less overhead around a step than Python and Lightning have by default: garbage collection and the profiler."""

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler

COLLECT_EVERY = 1000  # steps, as in OLMo-core (callbacks/garbage_collector.py)
NULL_CONTEXT = nullcontext()


class GarbageCollection(L.Callback):
    """Collects garbage after every evaluation and every ``COLLECT_EVERY`` steps, and at no other time.

    By default each rank collects at another moment, after many allocations, and all ranks wait for the one that does.
    What exists after the first step stays until the end, and is frozen: it is not examined again.
    """

    def __init__(self) -> None:
        self._holds = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes over after the first step, and collects every ``COLLECT_EVERY`` steps from then on."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._holds:
            if gc.isenabled():  # else other code has taken over
                gc.disable()
                gc.collect()
                gc.freeze()
                self._holds = True
        elif trainer.global_step % COLLECT_EVERY == 0:
            gc.collect()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collects what the evaluation and its callbacks have left."""
        if self._holds:
            gc.collect()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Returns collection to Python."""
        if self._holds:
            gc.unfreeze()
            gc.enable()
            self._holds = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Returns collection to Python."""
        self.on_train_end(trainer, pl_module)


class NullProfiler(PassThroughProfiler):
    """Profiles nothing; Lightning's default creates a context around every hook of every callback in every step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Returns the one context that does nothing."""
        return NULL_CONTEXT
