"""Bad steps and loss spikes: counts, warnings and state."""

import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from gptlab.errors import Diverged
from gptlab.training.callbacks.health_monitor import SpikeDetector, TrainingHealthMonitor
from gptlab.training.callbacks.step_sync import StepReport, StepSync
from gptlab.training.config import TrainConfig

REPLAY = "python -m gptlab.prepare replay=outputs/a/b"


def monitor(max_bad_steps: int = 3, spike_sigma: float | None = 6.0) -> TrainingHealthMonitor:
    limits = SimpleNamespace(max_bad_steps=max_bad_steps, spike_sigma=spike_sigma, spike_window=8)
    return TrainingHealthMonitor(StepSync(), cast(TrainConfig, limits), REPLAY)


def after_step(one: TrainingHealthMonitor) -> None:
    nothing = cast(Any, None)
    one.on_train_batch_end(nothing, nothing, None, None, 0)


def test_bad_steps_are_counted_and_logged_with_their_batch(caplog: pytest.LogCaptureFixture) -> None:
    one = monitor()
    for report in (StepReport(1, 2.0, False), StepReport(2, math.nan, True), StepReport(3, 1.5, True)):
        one.check_step(report)
        after_step(one)
    assert one.counts() == {"bad_steps": 2, "loss_spikes": 0}
    first, second = caplog.messages
    assert first.startswith("step 2: skipped, because its gradient is not finite (loss nan)")
    assert first.endswith(f"1 of at most 3. To print its batch: {REPLAY} step=2")
    assert "step 3:" in second
    assert "2 of at most 3" in second


def test_listeners_receive_the_logged_messages(caplog: pytest.LogCaptureFixture) -> None:
    one, calls = monitor(max_bad_steps=1), []
    one.listeners.append(lambda kind, message: calls.append((kind, message)))
    for step, loss in enumerate((2.0, 2.5, 2.0, 2.5, 2.0, 9.0), 1):
        one.check_step(StepReport(step, loss, False))
    one.check_step(StepReport(7, math.nan, True))
    with pytest.raises(Diverged) as caught:
        after_step(one)
    assert calls == [
        ("Loss spike", caplog.messages[0]),
        ("Step skipped", caplog.messages[1]),
        ("Run diverged", str(caught.value)),
    ]


def test_max_bad_steps_in_a_row_end_the_run() -> None:
    one = monitor()
    for step, is_bad in enumerate([True, True, False, True, True], 1):  # a good step resets the count
        one.check_step(StepReport(step, 1.0, is_bad))
        after_step(one)
    one.check_step(StepReport(6, math.nan, True))
    with pytest.raises(Diverged, match=r"3 steps in a row \(train.max_bad_steps\), up to step 6") as caught:
        after_step(one)
    assert str(caught.value).endswith(f"{REPLAY} step=4")
    assert one.counts()["bad_steps"] == 5


def test_a_spike_is_logged_with_the_expected_loss(caplog: pytest.LogCaptureFixture) -> None:
    one = monitor()
    for step in range(1, 6):
        one.check_step(StepReport(step, 2.0 + step % 2, False))
    one.check_step(StepReport(6, 9.0, False))
    assert one.counts() == {"bad_steps": 0, "loss_spikes": 1}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("step 6: the loss 9.0000 is more than 6 standard deviations above 2.6000")
    assert warning.getMessage().endswith(f"{REPLAY} step=6")


def test_without_spike_sigma_no_spike_is_reported() -> None:
    one = monitor(spike_sigma=None)
    for step in range(1, 12):
        one.check_step(StepReport(step, 1.0 if step < 11 else 100.0, False))
    assert one.counts() == {"bad_steps": 0}


def test_a_resumed_monitor_continues_counting() -> None:
    whole, first = monitor(), monitor()
    reports = [StepReport(step, 2.0 + step % 3 + 50 * (step in (7, 12)), step in (9, 10)) for step in range(1, 14)]
    for report in reports[:10]:
        first.check_step(report)
    second = monitor()
    second.load_state_dict(first.state_dict())
    for report in reports[10:]:
        second.check_step(report)
    for report in reports:
        whole.check_step(report)
    assert second.state_dict() == whole.state_dict()
    assert whole.counts() == {"bad_steps": 2, "loss_spikes": 2}


WINDOW = 20
JUMP = 170  # index from which the loss is higher


def series() -> list[float]:
    """Returns a decreasing, noisy loss with two close spikes, a spike of two steps, a NaN, and a jump."""
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
def test_spikes_match_their_definition(sigma: float) -> None:
    detector, losses = SpikeDetector(sigma, WINDOW), series()
    found = {i: mean for i, loss in enumerate(losses) if (mean := detector.expected(loss)) is not None}
    assert found == pytest.approx(by_definition(losses, sigma))
    if sigma == 5:
        assert list(found) == [60, 66, 100, JUMP]  # each once, none hidden by the previous one, no noise
        assert detector.expected(losses[-1] + 3) is not None  # the mean has adapted to the new level


def test_a_restored_detector_detects_the_same_spikes() -> None:
    losses, whole = series(), SpikeDetector(5.0, WINDOW)
    expected = [whole.expected(loss) for loss in losses]
    for cut in (0, 5, 30, 60, 61, 101, 102, 121, JUMP + 3):
        first, second = SpikeDetector(5.0, WINDOW), SpikeDetector(5.0, WINDOW)
        before = [first.expected(loss) for loss in losses[:cut]]
        second.load(first.state())
        assert before + [second.expected(loss) for loss in losses[cut:]] == expected


def after_evaluation(one: TrainingHealthMonitor, loss: float) -> SimpleNamespace:
    trainer = SimpleNamespace(global_step=5, callback_metrics={"val/loss": torch.tensor(loss)})
    one.on_validation_end(cast(Any, trainer), cast(Any, None))
    return trainer


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_whose_last_evaluation_has_no_finite_loss_has_diverged(loss: float) -> None:
    one, calls = monitor(), []
    one.listeners.append(lambda kind, message: calls.append(kind))
    after_evaluation(one, 2.0)
    trainer = after_evaluation(one, loss)
    resumed = monitor()  # without another step
    resumed.load_state_dict(one.state_dict())
    for ended in (one, resumed):
        with pytest.raises(Diverged, match=f"val/loss {loss}"):
            ended.on_fit_end(cast(Any, trainer), cast(Any, None))
    assert calls == ["Run diverged"]


def test_a_run_whose_last_evaluation_is_finite_has_not_diverged() -> None:
    one = monitor()
    one.on_fit_end(cast(Any, None), cast(Any, None))  # no evaluation at all
    after_evaluation(one, math.nan)
    trainer = after_evaluation(one, 2.0)
    one.on_fit_end(cast(Any, trainer), cast(Any, None))
    earlier = {name: value for name, value in one.state_dict().items() if name != "val_loss"}
    monitor().load_state_dict(earlier)  # of an earlier version
