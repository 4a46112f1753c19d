"""How commands end: their exit statuses, and the sentence for a mistake."""

import sys

from gptlab.errors import Diverged
from gptlab.training.distributed.processes import is_first_rank

DONE = 0
FAILED = 1  # as Python has it for an exception
MISTAKEN = 2  # the command or its input
DIVERGED = 3  # the loss or the gradient was not finite for too many steps in a row
PRUNED = 4  # a sweep saw no future in the run: no failure, and no result
PREEMPTED = 75  # a signal asked the run to stop: it is saved, and goes on when it is started again (EX_TEMPFAIL)
HUNG = 124  # a process made no progress for too long (as timeout(1) has it)
INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class SweepEnded(Exception):  # noqa: N818  (what it has done)
    """A sweep is over, and not every trial has come to a result."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def tell(error: Exception) -> int:
    """Print what is wrong, once and not once a process; return the exit status."""
    if is_first_rank():
        print(f"gptlab: {error}", file=sys.stderr)
    return DIVERGED if isinstance(error, Diverged) else MISTAKEN
