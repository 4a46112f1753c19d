"""Watchdog: writes the stack traces of a process that makes no progress, and ends it."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lightning as L

from gptlab.data.batches import Batch
from gptlab.terminal import printable

CHECKS = 10  # per timeout
COMPILING = 12  # timeouts of 600 seconds are two hours; max-autotune can take more than one
HUNG_STATUS = 124  # exit code of a hung process, as for timeout(1)
STDERR = 2  # the file descriptor, which a redirected ``sys.stderr`` does not affect


class Watchdog(L.Callback):
    """Ends this process after ``timeout`` seconds without progress, i.e. without calls of Lightning's hooks.

    Writes the stack traces of all threads to ``<folder>/rank_<r>.txt`` and to stderr, then ends the process
    immediately, because a process that hangs in a collective or a driver runs no signal handler and no ``finally``. All
    ranks wait for a rank that hangs, so each writes its own stack traces after the timeout. The first rank ends first,
    and its launcher ends the others.

    As a context manager, it also covers code without Lightning hooks: the set-up of the process group and the teardown.
    A thread that never releases the GIL also blocks the watchdog's thread. Therefore faulthandler, which does not need
    the GIL, is scheduled to end the process somewhat later (with exit code 1), and is rescheduled at every check.

    On a GPU or with torch.compile, the timeout of the first step and of the first validation batch is ``COMPILING``
    times as long, and again that of the first batch of each other shape, because kernels are compiled in them.

    Args:
        trainer: The trainer to watch.
        timeout: Seconds without progress.
        folder: Directory of the stack traces; created when needed.

    Attributes:
        listeners: Called with the message before the process ends, each in a daemon thread that is not joined.
    """

    def __init__(self, trainer: L.Trainer, timeout: float, folder: Path) -> None:
        self.trainer, self.timeout = trainer, timeout
        self.folder = folder
        self.listeners: list[Callable[[str], None]] = []
        self._ended = threading.Event()
        self._limit = timeout
        self._compiled: set[tuple[str, tuple[int, ...]]] = set()  # stages and shapes of completed batches
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def record_progress(self, *_: Any, **__: Any) -> None:
        """Restarts the timeout."""
        self._last_progress, self._limit = time.monotonic(), self.timeout

    setup = on_fit_start = on_train_start = on_train_end = record_progress
    on_validation_start = on_validation_end = record_progress
    on_save_checkpoint = on_load_checkpoint = on_exception = teardown = record_progress

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        """Restarts the timeout, which is longer until a step of this shape is complete."""
        self._start_batch(pl_module, "train", batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Restarts the timeout."""
        self.record_progress()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._compiled.add(("train", tuple(batch.idx.shape)))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any
    ) -> None:
        """Restarts the timeout, which is longer for the first batch of this shape."""
        self._start_batch(pl_module, "val", batch)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Restarts the timeout."""
        self.record_progress()
        self._compiled.add(("val", tuple(batch.idx.shape)))

    def _start_batch(self, module: L.LightningModule, stage: str, batch: Batch) -> None:
        self.record_progress()
        compiles = module.device.type == "cuda" or getattr(module, "compile_target", False)
        if compiles and (stage, tuple(batch.idx.shape)) not in self._compiled:
            self._limit = COMPILING * self.timeout

    def __enter__(self) -> Self:
        self.record_progress()
        self._reschedule_faulthandler()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _reschedule_faulthandler(self) -> None:
        faulthandler.dump_traceback_later(1.5 * self._limit, exit=True, file=STDERR)

    def _watch(self) -> None:
        while True:
            self._reschedule_faulthandler()
            left = self._last_progress + self._limit - time.monotonic()
            if left <= 0:
                self._end_process()
            if self._ended.wait(min(left, self.timeout / CHECKS)):
                return

    def _end_process(self) -> None:
        """Writes the stack traces of all threads, gives other ranks time to do the same, and ends the process."""
        rank = self.trainer.global_rank
        faulthandler.dump_traceback(STDERR)  # first, as it needs no disk, which may be the cause of the hang
        where = "above"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank_{rank}.txt").unlink(missing_ok=True)
            with (self.folder / f"rank_{rank}.txt").open("x") as file:  # not through a link
                faulthandler.dump_traceback(file)
            where = f"in {self.folder / f'rank_{rank}.txt'}"
        message = (
            f"gptlab: rank {rank} made no progress for {self._limit:g} seconds (trainer.hang_timeout) and is "
            f"terminated. The stack traces of its threads are {where}\n"
        )
        os.write(STDERR, printable(message).encode())  # no logging: the thread that hangs may hold its lock
        for listener in self.listeners:
            threading.Thread(target=listener, args=(message.strip(),), daemon=True).start()
        time.sleep(self.timeout * (0.1 if rank == 0 else 0.2))
        os._exit(HUNG_STATUS)


def record_progress(trainer: L.Trainer) -> None:
    """Restarts the timeout during work that calls no hooks of callbacks."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Watchdog):
            callback.record_progress()
