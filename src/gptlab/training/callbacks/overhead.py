"""Reduces the per-step overhead of Python and Lightning: garbage collection and the profiler."""

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler

COLLECT_EVERY = 1000  # steps, as in OLMo-core (callbacks/garbage_collector.py)
NULL_CONTEXT = nullcontext()


class GarbageCollection(L.Callback):
    """Collects garbage only after every evaluation and every ``COLLECT_EVERY`` steps.

    With automatic collection, each rank collects at a different time, and all other ranks wait for it. Objects that
    exist after the first step are frozen: most exist until the end of the run, so the collector ignores them.
    """

    def __init__(self) -> None:
        self._is_active = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Disables automatic collection after the first step; from then on collects every ``COLLECT_EVERY`` steps."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._is_active:
            if gc.isenabled():  # otherwise other code controls garbage collection
                gc.disable()
                gc.collect()
                gc.freeze()
                self._is_active = True
        elif trainer.global_step % COLLECT_EVERY == 0:
            gc.collect()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collects garbage of the evaluation and its callbacks."""
        if self._is_active:
            gc.collect()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enables automatic collection again."""
        if self._is_active:
            gc.unfreeze()
            gc.enable()
            self._is_active = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Enables automatic collection again."""
        self.on_train_end(trainer, pl_module)


class NullProfiler(PassThroughProfiler):
    """Profiles nothing; Lightning's default creates a context around every hook of every callback in every step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Returns a shared context manager that does nothing."""
        return NULL_CONTEXT
