"""One writer per run directory. Imports no torch."""

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Self

from filelock import LeaseCompromise, SoftFileLease, Timeout

from gptlab.errors import UserError
from gptlab.experiments.exits import FAILED

log = logging.getLogger(__name__)

LOCK = ".run.lock"  # names its owner's host, process and start time
LEASE = 60.0  # seconds without a refresh after which an owner on another host counts as dead
WAIT = 5.0  # seconds in which an owner on this host may end; workers outlive a killed supervisor by a moment


class RunLock:
    """Lock of a run directory, held by the process that writes there.

    The lock of an owner that is dead is taken over: at once on the host of that owner, elsewhere when the owner has
    not refreshed it for ``LEASE`` seconds. A process whose lock was taken over (it was suspended, or cut off from the
    file system) ends as soon as it notices.
    """

    def __init__(self) -> None:
        self._lease: SoftFileLease | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lease is not None:
            self._lease.release()

    def acquire(self, directory: Path) -> None:
        """Acquire the lock of ``directory``, once.

        Raises:
            UserError: Another process holds it, or no file can be created there.
        """
        if self._lease is not None:
            return
        path = directory / LOCK
        lease = SoftFileLease(path, lease_duration=LEASE, on_compromise=_end)
        try:
            self._lease = _acquired(lease, path, 0) or _acquired(lease, path, _patience(path))
        except OSError as error:
            raise UserError(f"{directory} cannot be locked for writing: {error}.") from error
        if self._lease is None:
            raise UserError(
                f"{directory} is being written by {_owner(path)}. Two processes would mix their rows and checkpoints: "
                "wait for the other one or end it, then run the same command again."
            )


def _acquired(lease: SoftFileLease, path: Path, timeout: float) -> SoftFileLease | None:
    if timeout:
        log.info("Waiting up to %.0f s for %s, which holds %s", timeout, _owner(path), path)
    with contextlib.suppress(Timeout):
        lease.acquire(timeout=timeout, poll_interval=0.1)
        return lease
    return None


def _patience(path: Path) -> float:
    """Return how many seconds to wait for the owner of a lock; on another host only its silence shows that it is dead.

    A lease is not shortened by clocks that differ: who waits watches for refreshes.
    """
    host = _fields(path).get("host", "").partition("?")[0]  # filelock appends a container's namespace
    return WAIT if host == socket.gethostname() else LEASE + WAIT


def _owner(path: Path) -> str:
    fields = _fields(path)
    return f"process {fields.get('pid', '(unknown)')} on {fields.get('host', '(unknown)')}"


def _fields(path: Path) -> dict[str, str]:
    """Read what a lock names; empty where it is gone."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if "=" in line)
    return {}


def _end(loss: LeaseCompromise) -> None:
    """End this process where another one has taken over the run; filelock calls this from its own thread."""
    if loss.reason == "owner-changed":
        log.critical("%s has taken over the run that this process wrote; it ends.", _owner(Path(loss.lock_file)))
        os._exit(FAILED)
    log.warning("The lock %s is no longer refreshed: %s.", loss.lock_file, loss.error or loss.reason)
