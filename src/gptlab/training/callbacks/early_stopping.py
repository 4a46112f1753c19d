"""Early stopping on any metric of the run."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from gptlab.errors import UserError, did_you_mean
from gptlab.training.callbacks.metrics import ends_step
from gptlab.training.config import EarlyStoppingConfig

OWN_PACKAGES = ("gptlab", "lightning")


class EarlyStopping(LightningEarlyStopping):
    """Lightning's ``EarlyStopping``; an unknown metric is reported with the metrics of the run.

    That is known after the first step if all callbacks are gptlab's, which name the metrics of their evaluations in an
    attribute ``evaluation_metrics``, and after the first evaluation otherwise.

    The name of the class is part of the checkpoint, so it is the same as Lightning's.

    Args:
        config: Metric, direction, patience and threshold; see conf/callbacks/early_stopping.yaml.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__(config.monitor, min_delta=config.min_delta, patience=config.patience, mode=config.mode)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best value and the counts; raises an error if one is not a number.

        Unlike Lightning's, ``patience`` is that of the configuration, so that it can change when a run is resumed.
        """
        counts = {name: int(state_dict[name]) for name in ("wait_count", "stopped_epoch", "patience")}
        float(state_dict["best_score"])
        restored = {"best_score": torch.as_tensor(state_dict["best_score"]), **counts, "patience": self.patience}
        super().load_state_dict(restored)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises UserError after the first step if the run will not have the metric."""
        if trainer.global_step != 1 or not ends_step(trainer, batch_idx):
            return
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if all(type(callback).__module__.partition(".")[0] in OWN_PACKAGES for callback in callbacks):
            later = {name for callback in callbacks for name in getattr(callback, "evaluation_metrics", ())}
            self._check_known({*trainer.callback_metrics, *later})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the run if the metric has not improved; raises UserError if there is no such metric."""
        self._check_known(trainer.callback_metrics)
        super().on_validation_end(trainer, pl_module)

    def _check_known(self, known: Iterable[str]) -> None:
        if self.monitor not in known:
            raise UserError(
                f"callbacks.early_stopping.monitor={self.monitor}: this run has no such metric."
                f"{did_you_mean(self.monitor, known)} Metrics: {', '.join(sorted(known))}."
            )
