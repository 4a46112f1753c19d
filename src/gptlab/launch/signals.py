"""Handles preemption signals outside of ``Trainer.fit``, during which a callback handles them. Imports no torch."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from gptlab.exit_codes import CONFIG_ERROR, FAILED, PREEMPTED
from gptlab.launch.requeue import requeue_slurm_job
from gptlab.training.distributed.processes import STOP_SIGNALS

Handler = Callable[[int, FrameType | None], Any]


class StoppedEarly(BaseException):
    """Raised when a signal arrives before training has started, when there is nothing to save."""


class StopSignals:
    """Context manager that handles preemption signals and restores the previous handlers on exit.

    Args:
        handler: Called for each signal, unless another handler has been installed in the meantime.
        signals: Signals to handle; ignored ones stay ignored.

    Attributes:
        received: Numbers of the signals received until the last ``poll``, by any handler.
    """

    def __init__(self, handler: Handler, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
        self.handler, self.signals = handler, signals
        self.received: list[int] = []

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        # Python writes the number of each signal to this pipe, independent of its handler
        self._earlier_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        earlier = {number: signal.getsignal(number) for number in self.signals}
        self._earlier = {number: kept for number, kept in earlier.items() if kept not in (signal.SIG_IGN, None)}
        for number in self._earlier:
            signal.signal(number, self.handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)
        signal.set_wakeup_fd(self._earlier_wakeup)
        self.poll()
        if self._earlier_wakeup >= 0:  # of an outer ``StopSignals``, for example
            os.write(self._earlier_wakeup, bytes(self.received))
        os.close(self._read_end)
        os.close(self._write_end)

    def poll(self) -> list[int]:
        """Returns the numbers of the signals received so far."""
        with contextlib.suppress(BlockingIOError):
            self.received.extend(number for number in os.read(self._read_end, 4096) if number in self._earlier)
        return self.received

    def forward(self, status: int) -> None:
        """Calls the previous handlers of the received signals if the run was preempted; submitit's requeues its job.

        SIGUSR1 without a previous handler requeues the SLURM job, if any.

        Args:
            status: Exit code of the run.
        """
        for number in dict.fromkeys(self.received if status == PREEMPTED else ()):
            earlier = self._earlier[signal.Signals(number)]
            if callable(earlier):
                earlier(number, None)
            elif number == signal.SIGUSR1:
                with block_signals():  # SLURM ends the job immediately: log first
                    requeue_slurm_job()


def run_stoppable(run: Callable[[], int]) -> int:
    """Calls ``run`` and returns its exit code, or PREEMPTED if a signal arrived before training started.

    After a signal, FAILED and CONFIG_ERROR become PREEMPTED too: its child processes may have ended with the signal.
    """
    with StopSignals(_stop_early) as signals:
        try:
            status = run()
        except StoppedEarly:
            status = PREEMPTED
        if status in (FAILED, CONFIG_ERROR) and signals.poll():
            status = PREEMPTED
    signals.forward(status)
    return status


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Blocks preemption signals and SIGINT, in new child processes as well until they call ``unblock_signals``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """Unblocks preemption signals and SIGINT; pending ones are delivered."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGINT))


def _stop_early(number: int, frame: FrameType | None) -> None:
    raise StoppedEarly
