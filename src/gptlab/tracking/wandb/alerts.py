"""What W&B tells a run's owner, by mail or in Slack: that something goes wrong."""

import math
import time
from collections.abc import Callable
from typing import Any

from gptlab.training.callbacks.health_monitor import SPIKE

STALL = "No progress"
WARNINGS = {SPIKE}  # all else is an error


class Alerts:
    """Sends one alert of a kind, and no second one for a while.

    W&B limits them as well, but only those that it gets: a run that is offline would keep all.

    Args:
        run: Of W&B.
        wait: Seconds until a second one of a kind.
        clock: What tells the seconds.
    """

    def __init__(self, run: Any, wait: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.wait, self.clock = run, wait, clock
        self._sent: dict[str, float] = {}

    def send(self, kind: str, sentence: str) -> None:
        """Send an alert, unless one of its kind was sent just now."""
        now = self.clock()
        if now - self._sent.get(kind, -math.inf) < self.wait:
            return
        self._sent[kind] = now
        level = "WARN" if kind in WARNINGS else "ERROR"
        self.run.alert(title=kind, text=sentence, level=level, wait_duration=self.wait)
