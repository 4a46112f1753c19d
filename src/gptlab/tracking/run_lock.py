"""Lock of a run directory, which ensures a single writer. Imports no torch."""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Self

from filelock import LeaseCompromise, SoftFileLease, Timeout

from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import FAILED
from gptlab.files import check_no_links, read_regular
from gptlab.terminal import print_message

log = logging.getLogger(__name__)

LOCK = ".run.lock"  # contains the owner's host, process and start time
REFRESH = 5.0  # seconds between the owner's refreshes
LEASE = 120.0  # seconds without a refresh after which the owner counts as dead; shared file systems may stall
WAIT = 5.0  # seconds to wait for a live owner to exit: workers briefly outlive a killed supervisor
POLL = 0.1  # seconds


class RunLock:
    """Lock of a run directory, held by the process that writes there.

    The owner refreshes the lock every ``REFRESH`` seconds. A lock is taken over immediately if its owner was a process
    on this host that has ended, otherwise after ``LEASE`` seconds without a refresh, by the waiting process's clock. An
    owner that loses its lock (it was suspended, disconnected from the file system, or the file was deleted) exits when
    its next refresh fails.
    """

    def __init__(self) -> None:
        self._lease: SoftFileLease | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lease is not None:
            self._lease.release()

    def acquire(self, directory: Path) -> None:
        """Acquires the lock of ``directory``, unless this object already holds a lock.

        Raises:
            UserError: Another process holds the lock, the lock file cannot be created, or the directory contains links.
        """
        if self._lease is not None:
            return
        check_no_links(directory)
        path, began = directory / LOCK, time.monotonic()
        lease = SoftFileLease(path, lease_duration=LEASE, heartbeat_interval=REFRESH, on_compromise=_exit)
        refreshed = _last_refresh(path)
        try:
            while not _try_acquire(lease):
                waited = time.monotonic() - began
                if waited > LEASE + WAIT or (waited > WAIT and _last_refresh(path) not in (refreshed, None)):
                    raise UserError(
                        f"{directory} is being written by {_owner(path)}, and two processes would corrupt its "
                        "metrics and checkpoints. Wait for the other process or end it, then run this command again."
                    )
                if waited < POLL:
                    log.info("Waiting for %s, which is writing to %s ...", _owner(path), directory)
                time.sleep(POLL)
        except OSError as error:
            raise UserError(f"{directory} cannot be locked for writing: {failure_reason(error)}.") from error
        self._lease = lease


def _try_acquire(lease: SoftFileLease) -> bool:
    with contextlib.suppress(Timeout):
        lease.acquire(timeout=0)
        return True
    return False


def _last_refresh(path: Path) -> tuple[int, int] | None:
    """Returns inode and modification time of a lock file, which change with each refresh; None if it does not exist."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_ino, stat.st_mtime_ns
    return None


def _owner(path: Path) -> str:
    """Returns a description of the process that owns a lock file, for messages."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        fields = dict(line.split("=", 1) for line in read_regular(path).splitlines() if "=" in line)
    return f"process {fields.get('pid', '(unknown)')} on {fields.get('host', '(unknown)')}"


def _exit(loss: LeaseCompromise) -> None:
    """Exits, since the lock is lost and another process may write the run. filelock calls this from its thread."""
    path = Path(loss.lock_file)
    reason = f"{_owner(path)} took over this run" if loss.reason == "owner-changed" else f"{loss.error or loss.reason}"
    # not logged: train.log may now belong to another process
    print_message(f"gptlab: The lock {path} is lost ({reason}). Exiting.", file=sys.stderr, flush=True)
    os._exit(FAILED)
