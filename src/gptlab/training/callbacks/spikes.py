"""When a loss is a spike. Imports no torch."""

import math
from collections import deque
from typing import Any


class SpikeDetector:
    """A spike begins with a loss above the mean of the window before it by more than ``sigma`` standard deviations.

    OLMo-core's SkipStepOptimizer has that limit (with a window of 128 losses and a sigma of 6). Here a loss above it
    enters the window as the limit itself, so that a spike does not hide the next one, while a loss that stays high
    becomes what is expected; and a spike lasts as long as its losses are above the limit, so that it is told once.
    Nothing is judged before half the window is full.

    Args:
        sigma: Standard deviations.
        window: How many losses before a loss it is compared with.
    """

    def __init__(self, sigma: float, window: int) -> None:
        self.sigma, self.warmup = sigma, window // 2
        self._losses, self._is_high = deque[float](maxlen=window), False

    def expected(self, loss: float) -> float | None:
        """Take in the next loss; return the mean of those before where a spike begins with it, else None."""
        if not math.isfinite(loss):  # no spike, but a step that is skipped
            return None
        mean, limit = self._limit()
        begins = loss > limit and not self._is_high
        self._is_high = loss > limit
        self._losses.append(min(loss, limit))
        return mean if begins else None

    def _limit(self) -> tuple[float, float]:
        """Mean of the window, and the largest loss that is no spike."""
        if len(self._losses) < self.warmup:
            return math.nan, math.inf
        mean = math.fsum(self._losses) / len(self._losses)
        squares = math.fsum((loss - mean) ** 2 for loss in self._losses)
        return mean, mean + self.sigma * math.sqrt(squares / (len(self._losses) - 1))

    def state(self) -> dict[str, Any]:
        """What another must know to decide as this one would."""
        return {"losses": list(self._losses), "is_high": self._is_high}

    def load(self, state: dict[str, Any]) -> None:
        """Take up such a state."""
        self._losses.extend(state["losses"])
        self._is_high = state["is_high"]
