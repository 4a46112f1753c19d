"""Which losses are spikes."""

import math

import numpy as np
import pytest

from gptlab.training.callbacks.spikes import SpikeDetector

WINDOW = 20
JUMP = 170  # from here on the loss is another


def series() -> list[float]:
    """A falling, noisy loss with two spikes close together, one of two steps, a NaN, and a jump to another level."""
    rng = np.random.default_rng(0)
    losses = 4 * np.exp(-np.arange(220) / 80) + rng.normal(0, 0.05, 220)
    losses[60] += 2
    losses[66] += 2
    losses[100:102] += 1
    losses[120] = math.nan
    losses[JUMP:] += 1
    return losses.tolist()


def by_definition(losses: list[float], sigma: float) -> dict[int, float]:
    found, window, was_high = {}, np.array([]), False
    for i, loss in enumerate(losses):
        if math.isnan(loss):
            continue
        limit = window.mean() + sigma * window.std(ddof=1) if len(window) >= WINDOW // 2 else math.inf
        if loss > limit and not was_high:
            found[i] = window.mean()
        was_high = loss > limit
        window = np.append(window, min(loss, limit))[-WINDOW:]
    return found


@pytest.mark.parametrize("sigma", [2.0, 5.0])
def test_spikes_are_found_by_their_definition(sigma: float) -> None:
    detector, losses = SpikeDetector(sigma, WINDOW), series()
    found = {i: mean for i, loss in enumerate(losses) if (mean := detector.expected(loss)) is not None}
    assert found == pytest.approx(by_definition(losses, sigma))
    if sigma == 5:
        assert list(found) == [60, 66, 100, JUMP]  # each once, none hidden by the one before, no noise
        assert detector.expected(losses[-1] + 3) is not None  # the new level is what is expected by now


def test_what_is_restored_anywhere_decides_the_same() -> None:
    losses, whole = series(), SpikeDetector(5.0, WINDOW)
    expected = [whole.expected(loss) for loss in losses]
    for cut in (0, 5, 30, 60, 61, 101, 102, 121, JUMP + 3):
        first, second = SpikeDetector(5.0, WINDOW), SpikeDetector(5.0, WINDOW)
        begun = [first.expected(loss) for loss in losses[:cut]]
        second.load(first.state())
        assert begun + [second.expected(loss) for loss in losses[cut:]] == expected
