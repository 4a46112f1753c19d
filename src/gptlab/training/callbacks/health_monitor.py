"""Detects steps with a non-finite gradient, loss spikes, and evaluations without a finite loss."""

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L

from gptlab.errors import Diverged
from gptlab.training.callbacks.step_sync import StepReport, StepSync
from gptlab.training.config import TrainConfig
from gptlab.training.distributed.processes import is_first_rank

log = logging.getLogger(__name__)

# kinds of events that are passed to listeners
BAD_STEP, SPIKE, DIVERGED = "Step skipped", "Loss spike", "Run diverged"


class TrainingHealthMonitor(L.Callback):
    """Counts and reports bad steps and loss spikes; ends a run that has diverged.

    A run has diverged after ``max_bad_steps`` bad steps in a row, or if its last evaluation has no finite loss.

    The module itself skips a bad step, on the device. This callback receives the report one step later, at the same
    step on all ranks.

    Args:
        step_sync: Reports every step.
        config: The limits ``max_bad_steps`` (in a row), ``spike_sigma`` and ``spike_window``.
        replay: Command that prints the batch of a step, without its last argument ``step=<n>``.

    Attributes:
        listeners: Called on the first rank with the kind of event and a message that describes it.
    """

    def __init__(self, step_sync: StepSync, config: TrainConfig, replay: str) -> None:
        self.step_sync, self.max_bad_steps, self.replay = step_sync, config.max_bad_steps, replay
        self.bad_steps = self.in_a_row = self.loss_spikes = 0
        self.listeners: list[Callable[[str, str], None]] = []
        self._val_loss: float | None = None  # of the latest evaluation
        self._latest = 0  # the last step that was reported
        sigma = config.spike_sigma
        self._detector = SpikeDetector(sigma, config.spike_window) if sigma is not None else None
        step_sync.listeners.append(self.check_step)

    def check_step(self, report: StepReport) -> None:
        """Counts a step, and logs a warning if it is bad or a loss spike."""
        self._latest = report.step
        self.in_a_row = self.in_a_row + 1 if report.is_bad else 0
        self.bad_steps += report.is_bad
        if report.is_bad:
            self._warn(
                BAD_STEP,
                f"step {report.step}: skipped, because its gradient is not finite (loss {report.loss:.4f}). Bad steps "
                f"in a row: {self.in_a_row} of at most {self.max_bad_steps}.",
                report.step,
            )
        elif self._detector and (expected := self._detector.expected(report.loss)) is not None:
            self.loss_spikes += 1
            self._warn(
                SPIKE,
                f"step {report.step}: the loss {report.loss:.4f} is more than {self._detector.sigma:g} standard "
                f"deviations above {expected:.4f}, the mean of the previous steps.",
                report.step,
            )

    def _warn(self, kind: str, description: str, step: int) -> None:
        message = f"{description} To print its batch: {self.replay} step={step}"
        if is_first_rank():
            log.warning("%s", message)
        self._notify(kind, message)

    def _notify(self, kind: str, message: str) -> None:
        for listener in self.listeners if is_first_rank() else ():
            listener(kind, message)

    def counts(self) -> dict[str, float]:
        """Returns the totals so far, for a row of metrics; every rank must call it at the same step."""
        self.step_sync.collect()
        spikes = {"loss_spikes": self.loss_spikes} if self._detector else {}
        return {"bad_steps": self.bad_steps, **spikes}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises ``Diverged`` after ``max_bad_steps`` bad steps in a row; all ranks do so at the same step."""
        if self.in_a_row >= self.max_bad_steps:
            message = (
                f"The gradient was not finite for {self.in_a_row} steps in a row (train.max_bad_steps), up to step "
                f"{self._latest}. To print the batch of the first of them: {self.replay} "
                f"step={self._latest - self.in_a_row + 1}"
            )
            self._notify(DIVERGED, message)
            raise Diverged(message)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the loss of the evaluation, which is the same on all ranks."""
        self._val_loss = trainer.callback_metrics["val/loss"].item()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for the report of the last step."""
        self.step_sync.collect()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises ``Diverged`` if the last evaluation has no finite loss, also that of a resumed run without steps."""
        if self._val_loss is not None and not math.isfinite(self._val_loss):
            message = (
                f"The loss of the last evaluation, at step {trainer.global_step}, is not finite (val/loss "
                f"{self._val_loss}), so training has diverged. Lower optimizer.lr, or train with more warmup."
            )
            self._notify(DIVERGED, message)
            raise Diverged(message)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save in a checkpoint: counts, latest val loss, and the state of the spike detector."""
        self.step_sync.collect()
        return {
            "bad_steps": self.bad_steps,
            "in_a_row": self.in_a_row,
            "loss_spikes": self.loss_spikes,
            "val_loss": self._val_loss,
            "spikes": self._detector and self._detector.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the result of ``state_dict``."""
        self.bad_steps, self.in_a_row = int(state_dict["bad_steps"]), int(state_dict["in_a_row"])
        self.loss_spikes = int(state_dict["loss_spikes"])
        val_loss = state_dict.get("val_loss")  # None in checkpoints of earlier versions
        self._val_loss = None if val_loss is None else float(val_loss)
        if self._detector and state_dict["spikes"]:
            self._detector.load(state_dict["spikes"])


class SpikeDetector:
    """Detects losses above the mean of the preceding window by more than ``sigma`` standard deviations.

    The limit is that of OLMo-core's SkipStepOptimizer (with a window of 128 losses and a sigma of 6). Unlike in
    OLMo-core, a loss above the limit is added to the window as the limit itself, so that a spike does not hide the next
    one, but the mean adapts to a loss that remains high. A spike lasts as long as losses are above the limit, and is
    reported once. No spike is reported until the window is half full.

    Args:
        sigma: Number of standard deviations.
        window: Number of preceding losses that a loss is compared with.
    """

    def __init__(self, sigma: float, window: int) -> None:
        self.sigma, self.warmup = sigma, window // 2
        self._losses, self._is_high = deque[float](maxlen=window), False

    def expected(self, loss: float) -> float | None:
        """Adds the next loss; returns the mean of the window before it if it starts a spike, otherwise None."""
        if not math.isfinite(loss):  # not a spike, but a step that is skipped
            return None
        mean, limit = self._limit()
        begins = loss > limit and not self._is_high
        self._is_high = loss > limit
        self._losses.append(min(loss, limit))
        return mean if begins else None

    def _limit(self) -> tuple[float, float]:
        """Returns the mean of the window and the largest loss that is not a spike."""
        if len(self._losses) < self.warmup:
            return math.nan, math.inf
        mean = math.fsum(self._losses) / len(self._losses)
        squares = math.fsum((loss - mean) ** 2 for loss in self._losses)
        return mean, mean + self.sigma * math.sqrt(squares / (len(self._losses) - 1))

    def state(self) -> dict[str, Any]:
        """Returns the state to save in a checkpoint: the losses of the window, and whether a spike is in progress."""
        return {"losses": list(self._losses), "is_high": self._is_high}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the losses of the window, and whether a spike is in progress, from the result of ``state``."""
        self._losses.extend(map(float, state["losses"]))
        self._is_high = bool(state["is_high"])
