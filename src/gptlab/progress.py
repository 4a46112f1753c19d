"""Progress of steps that read many bytes before a run starts. Imports no rich.

A terminal shows a bar, which ``gptlab.tracking.logs`` sets as ``show_bar``. Elsewhere, a line is logged from time to
time.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from io import FileIO

log = logging.getLogger(__name__)

MIN_BAR_BYTES = 2**27  # reading less takes less than a second
LOG_SECONDS = 15.0  # between two lines
CHUNK = 2**20

Advance = Callable[[int], None]  # is called with the number of bytes that were read since the last call


def _no_bar(*_: object) -> AbstractContextManager[Advance]:
    return nullcontext(lambda _: None)


show_bar: Callable[[str, int], AbstractContextManager[Advance]] = _no_bar


@contextmanager
def track_reading(what: str, total: int) -> Iterator[Advance]:
    """Shows the progress of reading ``total`` bytes.

    Args:
        what: What is done, to begin the line with: "Verifying 3 shards".
        total: Number of bytes that will be read; an estimate for text, which may be compressed.

    Yields:
        A function to call with the number of bytes that were read since its last call. Any thread may call it.
    """
    begun, lock = time.monotonic(), threading.Lock()
    done, logged = 0, begun
    with (show_bar if total >= MIN_BAR_BYTES else _no_bar)(what, total) as advance_bar:

        def advance(size: int) -> None:
            nonlocal done, logged
            advance_bar(size)
            with lock:
                done, now = done + size, time.monotonic()
                if now - logged < LOG_SECONDS:
                    return
                logged = now
                speed = done / (now - begun)
                left = timedelta(seconds=round(max(0, total - done) / max(speed, 1)))
                log.info(
                    "%s: %.0f%% of %.1f GB · %.0f MB/s · %s left",
                    *(what, min(100, 100 * done / max(total, 1)), total / 1e9, speed / 1e6, left),
                    extra={"progress": True},  # not printed in a terminal, which has the bar
                )

        yield advance


def hash_file(file: FileIO, advance: Advance) -> str:
    """Returns the SHA-256 of the rest of a file, in hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
        advance(size)
    return digest.hexdigest()
