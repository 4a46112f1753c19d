"""Exit statuses of the commands, and how an error becomes a message and a status. Imports no torch."""

import sys
from collections.abc import Callable

from gptlab.errors import Diverged, UserError
from gptlab.training.distributed.processes import is_first_rank

DONE = 0
FAILED = 1  # as Python has it for an exception
CONFIG_ERROR = 2  # the command, its configuration or its input is wrong
DIVERGED = 3  # the loss or the gradient was not finite for too many steps in a row
PRUNED = 4  # a sweep ended the run early: no failure, and no result
PREEMPTED = 75  # a signal asked the run to stop: it is saved, and resumes when it is started again (EX_TEMPFAIL)
HUNG = 124  # a process made no progress for too long (as timeout(1) has it)
INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class SweepIncomplete(Exception):  # noqa: N818
    """A sweep has ended, and not every trial has a result."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def report_error(error: Exception) -> int:
    """Prints an error, on the first rank only, and returns its exit status."""
    if is_first_rank():
        print(f"gptlab: {error}", file=sys.stderr)
    return DIVERGED if isinstance(error, Diverged) else CONFIG_ERROR


def exit_status(work: Callable[[], int]) -> int:
    """Calls ``work`` and returns its exit status; an error that has a status of its own is reported."""
    try:
        return work()
    except (UserError, Diverged) as error:
        return report_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
