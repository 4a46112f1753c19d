"""Watchdog: reports the stacks of a process that makes no progress and ends it."""

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

CHECKS = 10  # per timeout
HUNG_STATUS = 124  # the exit status of timeout(1)
STDERR = 2  # the file descriptor, which a redirected ``sys.stderr`` does not affect


class Watchdog(L.Callback):
    """Ends this process if ``note``, which Lightning's hooks call, has not been called for ``timeout`` seconds.

    Writes the stacks of all threads to ``<folder>/rank_<r>.txt`` and to stderr, then ends the process immediately: a
    process that hangs in a collective or in a driver runs no handler and no ``finally``. All ranks wait for one that
    hangs, so each writes its own stacks after the timeout. The first rank ends first, and its launcher ends the others.

    Used as a context manager, it also covers code without Lightning hooks: the set-up of a process group and the
    teardown. A thread that never releases the GIL also blocks the watching thread. Therefore faulthandler, which does
    not need the GIL, is set to end the process somewhat later (with its own exit status 1), and is postponed at every
    check.

    Args:
        trainer: The trainer to watch.
        timeout: Seconds without progress.
        folder: Folder of the stacks; created when needed.

    Attributes:
        listeners: Called with a sentence, each in a daemon thread that is not joined, before the process ends.
    """

    def __init__(self, trainer: L.Trainer, timeout: float, folder: Path) -> None:
        self.trainer, self.timeout = trainer, timeout
        self.folder = folder
        self.listeners: list[Callable[[str], None]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def note(self, *_: Any, **__: Any) -> None:
        """Records progress."""
        self._noted = time.monotonic()

    setup = on_fit_start = on_train_start = on_train_batch_start = on_train_batch_end = on_train_end = note
    on_validation_start = on_validation_batch_start = on_validation_batch_end = on_validation_end = note
    on_save_checkpoint = on_load_checkpoint = on_exception = teardown = note

    def __enter__(self) -> Self:
        self.note()
        self._put_off()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _put_off(self) -> None:
        faulthandler.dump_traceback_later(1.5 * self.timeout, exit=True, file=STDERR)

    def _watch(self) -> None:
        while True:
            self._put_off()
            left = self._noted + self.timeout - time.monotonic()
            if left <= 0:
                self._give_up()
            if self._ended.wait(min(left, self.timeout / CHECKS)):
                return

    def _give_up(self) -> None:
        """Writes the stacks of all threads, gives the other ranks time to do the same, and ends the process."""
        rank = self.trainer.global_rank
        faulthandler.dump_traceback(STDERR)  # first, as it needs no disk, which may be the cause of the hang
        where = "above"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
            where = f"in {self.folder / f'rank_{rank}.txt'}"
        sentence = (
            f"gptlab: rank {rank} made no progress for {self.timeout:g} seconds (trainer.hang_timeout), and ends. "
            f"Where its threads stand is {where}\n"
        )
        os.write(STDERR, sentence.encode())  # no logging: the thread that hangs may hold its lock
        for listener in self.listeners:
            threading.Thread(target=listener, args=(sentence.strip(),), daemon=True).start()
        time.sleep(self.timeout * (0.1 if rank == 0 else 0.2))
        os._exit(HUNG_STATUS)
