"""A process that makes no progress says where it stands, and ends."""

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

CHECKS = 10  # in the time that is allowed
HUNG_STATUS = 124  # as timeout(1) has it
STDERR = 2  # the descriptor, which nobody has put anything else in the place of


class Watchdog(L.Callback):
    """Ends this process where nothing of a training was begun or ended for too long.

    Stacks of all threads are written to ``<folder>/rank_<r>.txt`` and to stderr, then the process ends at once: one
    that hangs in a collective or in a driver runs no handler and no ``finally``. All ranks wait for one that hangs, so
    each writes its own stacks when the time is over. The first rank ends first, and whoever started them ends the rest.

    As a context it watches all that happens inside, also where Lightning has no hook: the set-up of a process group,
    the teardown. A thread that holds Python's lock for ever stops the watching thread, too; so faulthandler, which
    needs no lock, is set to end the process a little later (with its own status 1), and put off at every check.

    Args:
        trainer: Which is watched.
        timeout: Seconds without progress.
        folder: For the stacks; made when it is needed.

    Attributes:
        listeners: Called with a sentence, in threads that nobody waits for, before the process ends.
    """

    def __init__(self, trainer: L.Trainer, timeout: float, folder: Path) -> None:
        self.trainer, self.timeout = trainer, timeout
        self.folder = folder
        self.listeners: list[Callable[[str], None]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def note(self, *_: Any, **__: Any) -> None:
        """Take note of progress."""
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
        """Say where every thread stands, leave the other ranks time to do the same, and end."""
        rank = self.trainer.global_rank
        faulthandler.dump_traceback(STDERR)  # first: it needs no disk, which may be what hangs
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
        os.write(STDERR, sentence.encode())  # no logging: whoever hangs may hold its lock
        for listener in self.listeners:
            threading.Thread(target=listener, args=(sentence.strip(),), daemon=True).start()
        time.sleep(self.timeout * (0.1 if rank == 0 else 0.2))
        os._exit(HUNG_STATUS)
