"""Exit codes of the commands, and the conversion of errors to messages and exit codes. Imports no torch."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gptlab.errors import Diverged, OutOfMemory, UserError
from gptlab.files import is_disk_full, write_file
from gptlab.terminal import print_message
from gptlab.training.distributed.processes import is_first_rank

DONE = 0
FAILED = 1  # as Python exits after an uncaught exception; also if memory or disk space does not suffice
CONFIG_ERROR = 2  # invalid command, configuration or input
DIVERGED = 3  # no finite gradient for train.max_bad_steps consecutive steps, or no finite loss in the last evaluation
PRUNED = 4  # a sweep ended the run early; neither a failure nor a complete run
PREEMPTED = 75  # a signal stopped the run after a checkpoint was saved; it can be resumed (EX_TEMPFAIL)
HUNG = 124  # a process made no progress for too long (as with timeout(1))
INTERRUPTED = 130  # 128 + SIGINT, as in shells

RESULT = "GPTLAB_RESULT"  # environment variable: directory in which a run reports to gptlab.train(...) in Python
RUN_DIR, ERROR = "run_dir", "error"  # files in it


NO_HOME = "Could not determine home directory."  # message of pathlib's RuntimeError


class SweepIncomplete(Exception):  # noqa: N818
    """Raised when a sweep ends without a result for every trial."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def report_result(name: str, text: str) -> bool:
    """Reports the run directory or the error of a run to ``gptlab.train`` in Python; returns whether it is the caller.

    Args:
        name: RUN_DIR or ERROR.
        text: Path, or message.
    """
    if folder := os.environ.get(RESULT):
        write_file(Path(folder, name), text)
    return bool(folder)


def report_error(error: Exception) -> int:
    """Prints an error on the first rank, or reports it to the caller in Python, and returns its exit code.

    Raises:
        OSError: ``error`` is one that means neither that the disk is full nor that a path is too long.
    """
    message, status = str(error), DIVERGED if isinstance(error, Diverged) else CONFIG_ERROR
    if is_home_missing(error):
        message = (
            "The home directory (~) is unknown: HOME is not set, and the user has no entry in the password database. "
            "Set HOME or, if only the cache is in the home directory, GPTLAB_CACHE=<directory>."
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(Path(error.filename).parts, key=len)
        message = f"A path is longer than the file system allows: {longest[:40]}... has {len(longest)} characters."
    elif isinstance(error, OSError):
        if not is_disk_full(error):
            raise error
        message, status = f"The disk is full, so {error.filename or 'a file'} could not be written.", FAILED
    if isinstance(error, OutOfMemory):
        status = FAILED
    # any rank can run out of memory, and the others then wait for it
    if (is_first_rank() or isinstance(error, OutOfMemory)) and not report_result(ERROR, message):
        print_message(f"gptlab: {message}", file=sys.stderr)
    return status


def is_home_missing(error: Exception) -> bool:
    """Whether a path with ~ could not be expanded."""
    return isinstance(error, RuntimeError) and str(error) == NO_HOME


def exit_status(work: Callable[[], int]) -> int:
    """Calls ``work`` and returns its exit code, or that of the error that it raised; see ``report_error``."""
    try:
        return work()
    except (UserError, Diverged, OutOfMemory, OSError) as error:
        return report_error(error)
    except RuntimeError as error:
        if not is_home_missing(error):
            raise
        return report_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
