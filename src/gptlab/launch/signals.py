"""The signals that ask a run to stop, outside of training, where its processes answer them. Imports no torch."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from gptlab.exit_codes import PREEMPTED
from gptlab.launch import slurm

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
Handler = Callable[[int, FrameType | None], Any]


class Stopped(BaseException):
    """A signal came before training could answer it: there is nothing to save."""


class Stops:
    """Takes the signals that ask a run to stop, and gives them back to whoever had them.

    Args:
        handler: What to do when one comes, for as long as nobody takes them over.
        signals: Which; one that is ignored stays so.
    """

    def __init__(self, handler: Handler, signals: tuple[signal.Signals, ...] = STOPS) -> None:
        self.handler, self.signals = handler, signals
        self.heard: list[int] = []  # as of the last ``listen``

    def __enter__(self) -> Self:
        self._news, self._pipe = os.pipe()
        for end in (self._news, self._pipe):
            os.set_blocking(end, False)
        # Python writes down here what came, whoever handles it
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        owners = {number: signal.getsignal(number) for number in self.signals}
        self._owners = {number: owner for number, owner in owners.items() if owner not in (signal.SIG_IGN, None)}
        for number in self._owners:
            signal.signal(number, self.handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, owner in self._owners.items():
            signal.signal(number, owner)
        signal.set_wakeup_fd(self._wakeup)
        self.listen()
        os.close(self._news)
        os.close(self._pipe)

    def listen(self) -> list[int]:
        """Return the numbers of the signals that have come so far."""
        with contextlib.suppress(BlockingIOError):
            self.heard.extend(number for number in os.read(self._news, 4096) if number in self._owners)
        return self.heard

    def pass_on(self, status: int) -> None:
        """Let others do what they do when the run has stopped for a signal: who launched it, or else SLURM for SIGUSR1.

        submitit's handler puts the job back into the queue and ends the process.
        """
        for number in dict.fromkeys(self.heard if status == PREEMPTED else ()):
            owner = self._owners[signal.Signals(number)]
            if callable(owner):
                owner(number, None)
            elif number == signal.SIGUSR1:
                with held_back():  # SLURM ends the job at once: first this is said
                    slurm.requeue()


def stoppable(run: Callable[[], int]) -> int:
    """Call what runs in this process, and return its exit status; PREEMPTED when it was too early to ask it to stop."""
    with Stops(_stop_early) as stops:
        try:
            status = run()
        except Stopped:
            status = PREEMPTED
    stops.pass_on(status)
    return status


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let signals wait until this is done; in a process that is started here they wait for its ``let_in``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_in() -> None:
    """Let the signals come that waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPS, signal.SIGINT))


def _stop_early(number: int, frame: FrameType | None) -> None:
    raise Stopped
