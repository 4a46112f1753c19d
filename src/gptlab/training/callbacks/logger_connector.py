"""Records what callbacks log with Lightning's ``log``, at the optimizer step to which it belongs."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch import Tensor

Log = Callable[[L.Trainer, dict[str, float], int], None]


class StepLoggerConnector(_LoggerConnector):
    """Lightning's logger connector, with gptlab's steps.

    Lightning counts the steps of logged metrics from 0 and in a resumed run starts at 0 again, adds a metric "epoch",
    and records values of ``log`` only every ``log_every_n_steps`` steps, then with the latest value, which may be of an
    earlier step. Here, a value is recorded once, at the step (counted from 1) in which it was logged. There is no
    public option for any of these (read in lightning 2.6.6).

    Args:
        trainer: Trainer whose connector this replaces.
        is_due: Returns whether a step has a row of gptlab's metrics. Lightning's own monitors log at these steps.
        log: Logs metrics of a step to every logger.
    """

    def __init__(self, trainer: L.Trainer, is_due: Callable[[int], bool], log: Log) -> None:
        super().__init__(trainer)
        self._is_due, self._log = is_due, log
        self._latest: dict[str, Any] = {}  # values at the end of the previous step

    def start(self) -> None:
        """Sets Lightning's counter, from which its monitors take the step, to the step that is trained next."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step + 1  # noqa: SLF001

    @property
    def should_update_logs(self) -> bool:
        """Whether the step that is being trained has a row of metrics."""
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001
        return self._is_due(step) or self.trainer.should_stop

    def update_train_step_metrics(self) -> None:
        """Records the values that were logged during the step, if this micro-batch completed it."""
        # the first condition saves time if nothing was ever logged
        if not self.trainer._results or self.trainer.fit_loop._should_accumulate():  # noqa: SLF001
            return
        values = self.metrics["log"]
        new = {name: value for name, value in values.items() if not _is_same(value, self._latest.get(name))}
        self._latest = values  # keeps the tensors, so that their memory is not used by those of the next step
        if new:
            self.log_metrics(new)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs metrics at the latest step. ``step`` is ignored, except for a metric of this name."""
        self._logged_metrics.update(metrics)
        values = convert_tensors_to_scalars(metrics)
        step = int(values.pop("step", self.trainer.global_step))
        if values:
            self._log(self.trainer, values, step)


def _is_same(value: Tensor, earlier: Tensor | None) -> bool:
    """Whether two values are the same tensor; ``log`` copies every value into a new one."""
    return earlier is not None and value.data_ptr() == earlier.data_ptr()
