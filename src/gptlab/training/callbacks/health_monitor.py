"""What is told of a run that goes wrong: steps without a finite gradient, and loss spikes."""

import logging
from collections.abc import Callable
from typing import Any

import lightning as L

from gptlab.errors import Diverged
from gptlab.training.callbacks.spikes import SpikeDetector
from gptlab.training.callbacks.step_sync import StepReport, StepSync
from gptlab.training.config import TrainConfig
from gptlab.training.distributed.processes import is_first_rank

log = logging.getLogger(__name__)

# kinds of trouble that listeners hear of
BAD_STEP, SPIKE, DIVERGED = "Step skipped", "Loss spike", "Run diverged"


class TrainingHealthMonitor(L.Callback):
    """Counts and tells bad steps and loss spikes, and ends a run that has nothing but bad steps.

    The module itself skips a bad step, on the device. Here it is known one step later, on all ranks alike.

    Args:
        pulse: Which tells how every step went.
        config: The limits: ``max_bad_steps`` in a row, ``spike_sigma`` and ``spike_window``.
        replay: The command that shows the batch of a step, but for " step=<n>".

    Attributes:
        listeners: Called, on the first rank, with what kind of thing went wrong and a sentence on it.
    """

    def __init__(self, pulse: StepSync, config: TrainConfig, replay: str) -> None:
        self.pulse, self.max_bad_steps, self.replay = pulse, config.max_bad_steps, replay
        self.bad_steps = self.in_a_row = self.loss_spikes = 0
        self.listeners: list[Callable[[str, str], None]] = []
        self._latest = 0  # the last step that is known of
        sigma = config.spike_sigma
        self._detector = SpikeDetector(sigma, config.spike_window) if sigma is not None else None
        pulse.listeners.append(self.check_step)

    def check_step(self, beat: StepReport) -> None:
        """Count a step, and tell if it was none that it should be."""
        self._latest = beat.step
        self.in_a_row = self.in_a_row + 1 if beat.is_bad else 0
        self.bad_steps += beat.is_bad
        if beat.is_bad:
            self._warn(
                BAD_STEP,
                f"step {beat.step}: the gradient is not finite (the loss is {beat.loss:.4f}), so the step was skipped: "
                f"{self.in_a_row} in a row, of at most {self.max_bad_steps}.",
                beat.step,
            )
        elif self._detector and (expected := self._detector.expected(beat.loss)) is not None:
            self.loss_spikes += 1
            self._warn(
                SPIKE,
                f"step {beat.step}: the loss is {beat.loss:.4f}, where {expected:.4f} was expected: more than "
                f"{self._detector.sigma:g} standard deviations above the mean of the steps before.",
                beat.step,
            )

    def _warn(self, kind: str, what: str, step: int) -> None:
        sentence = f"{what} Its batch: {self.replay} step={step}"
        if is_first_rank():
            log.warning("%s", sentence)
        self._tell(kind, sentence)

    def _tell(self, kind: str, sentence: str) -> None:
        for listener in self.listeners if is_first_rank() else ():
            listener(kind, sentence)

    def counts(self) -> dict[str, float]:
        """The totals so far, for a row of metrics; every rank must ask at the same step."""
        self.pulse.collect()
        spikes = {"loss_spikes": self.loss_spikes} if self._detector else {}
        return {"bad_steps": self.bad_steps, **spikes}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run where it learns nothing any more; all ranks do so at the same step."""
        if self.in_a_row >= self.max_bad_steps:
            sentence = (
                f"The gradient was not finite for {self.in_a_row} steps in a row (train.max_bad_steps), up to step "
                f"{self._latest}. The batch of the first of them: {self.replay} step={self._latest - self.in_a_row + 1}"
            )
            self._tell(DIVERGED, sentence)
            raise Diverged(sentence)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell of the last step, too."""
        self.pulse.collect()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, to decide as this one would."""
        self.pulse.collect()
        return {
            "bad_steps": self.bad_steps,
            "in_a_row": self.in_a_row,
            "loss_spikes": self.loss_spikes,
            "spikes": self._detector and self._detector.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.bad_steps, self.in_a_row = state_dict["bad_steps"], state_dict["in_a_row"]
        self.loss_spikes = state_dict["loss_spikes"]
        if self._detector and state_dict["spikes"]:
            self._detector.load(state_dict["spikes"])
