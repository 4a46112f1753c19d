"""File permissions also for root, who may otherwise read and write every file."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3, from linux/capability.h
OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, see capabilities(7)


def set_effective(overrides: bool) -> None:
    """Turns the capabilities to ignore file permissions on or off, for this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] = sets[0] | OVERRIDES if overrides else sets[0] & ~OVERRIDES
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def file_permissions() -> Iterator[None]:
    """Context manager in which file permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    set_effective(False)
    try:
        yield
    finally:
        set_effective(True)


def drop_overrides() -> None:
    """Makes file permissions apply for the rest of this process."""
    if os.geteuid() == 0:
        set_effective(False)
