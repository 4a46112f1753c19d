"""Bad steps and loss spikes: what is counted, reported and restored."""

import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from gptlab.errors import Diverged
from gptlab.training.callbacks.health_monitor import SpikeDetector, TrainingHealthMonitor
from gptlab.training.callbacks.step_sync import StepReport, StepSync
from gptlab.training.config import TrainConfig

REPLAY = "python -m gptlab.prepare replay=outputs/a/b"


def guard(max_bad_steps: int = 3, spike_sigma: float | None = 6.0) -> TrainingHealthMonitor:
    limits = SimpleNamespace(max_bad_steps=max_bad_steps, spike_sigma=spike_sigma, spike_window=8)
    return TrainingHealthMonitor(StepSync(), cast(TrainConfig, limits), REPLAY)


def after_step(guard: TrainingHealthMonitor) -> None:
    nothing = cast(Any, None)
    guard.on_train_batch_end(nothing, nothing, None, None, 0)


def test_bad_steps_are_counted_and_told_with_their_batch(caplog: pytest.LogCaptureFixture) -> None:
    one = guard()
    for report in (StepReport(1, 2.0, False), StepReport(2, math.nan, True), StepReport(3, 1.5, True)):
        one.check_step(report)
        after_step(one)
    assert one.counts() == {"bad_steps": 2, "loss_spikes": 0}
    first, second = caplog.messages
    assert first.startswith("step 2: the gradient is not finite (the loss is nan), so the step was skipped: 1 in a row")
    assert first.endswith(f"of at most 3. Its batch: {REPLAY} step=2")
    assert "step 3:" in second
    assert "2 in a row" in second


def test_listeners_hear_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    one, heard = guard(max_bad_steps=1), []
    one.listeners.append(lambda kind, sentence: heard.append((kind, sentence)))
    for step, loss in enumerate((2.0, 2.5, 2.0, 2.5, 2.0, 9.0), 1):
        one.check_step(StepReport(step, loss, False))
    one.check_step(StepReport(7, math.nan, True))
    with pytest.raises(Diverged) as caught:
        after_step(one)
    assert heard == [
        ("Loss spike", caplog.messages[0]),
        ("Step skipped", caplog.messages[1]),
        ("Run diverged", str(caught.value)),
    ]


def test_so_many_bad_steps_in_a_row_end_the_run() -> None:
    one = guard()
    for step, is_bad in enumerate([True, True, False, True, True], 1):  # a good step begins the row anew
        one.check_step(StepReport(step, 1.0, is_bad))
        after_step(one)
    one.check_step(StepReport(6, math.nan, True))
    with pytest.raises(Diverged, match=r"3 steps in a row \(train.max_bad_steps\), up to step 6") as caught:
        after_step(one)
    assert str(caught.value).endswith(f"{REPLAY} step=4")
    assert one.counts()["bad_steps"] == 5


def test_a_spike_is_told_with_what_was_expected(caplog: pytest.LogCaptureFixture) -> None:
    one = guard()
    for step in range(1, 6):
        one.check_step(StepReport(step, 2.0 + step % 2, False))
    one.check_step(StepReport(6, 9.0, False))
    assert one.counts() == {"bad_steps": 0, "loss_spikes": 1}
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert told.getMessage().startswith("step 6: the loss is 9.0000, where 2.6000 was expected: more than 6 standard")
    assert told.getMessage().endswith(f"{REPLAY} step=6")


def test_without_a_limit_no_spike_is_told() -> None:
    one = guard(spike_sigma=None)
    for step in range(1, 12):
        one.check_step(StepReport(step, 1.0 if step < 11 else 100.0, False))
    assert one.counts() == {"bad_steps": 0}


def test_a_resumed_guard_goes_on_counting() -> None:
    whole, first = guard(), guard()
    beats = [StepReport(step, 2.0 + step % 3 + 50 * (step in (7, 12)), step in (9, 10)) for step in range(1, 14)]
    for report in beats[:10]:
        first.check_step(report)
    second = guard()
    second.load_state_dict(first.state_dict())
    for report in beats[10:]:
        second.check_step(report)
    for report in beats:
        whole.check_step(report)
    assert second.state_dict() == whole.state_dict()
    assert whole.counts() == {"bad_steps": 2, "loss_spikes": 2}


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
