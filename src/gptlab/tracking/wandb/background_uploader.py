"""What W&B is sent beside the rows, by a thread: for some of it W&B's client asks its server, and waits."""

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class BackgroundUploader:
    """Does one thing after the other in a thread of its own; what fails is told, and the next one tried."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, name="wandb", daemon=True)
        self._thread.start()

    def put(self, what: str, send: Callable[[], None]) -> None:
        """Take something to send, and what it is called."""
        self._waiting.put((what, send))

    def close(self, seconds: float) -> None:
        """Wait so long for what was taken."""
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("W&B has not taken all samples and checkpoints in %g seconds.", seconds)

    def _send_all(self) -> None:
        while (taken := self._waiting.get()) is not None:
            what, send = taken
            try:
                send()
            except Exception as error:  # whatever it is, the run is worth more
                log.warning("W&B does not get %s: %s", what, " ".join(str(error).split()))
