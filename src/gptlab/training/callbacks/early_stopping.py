"""Early stopping on any metric of the run."""

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from gptlab.errors import UserError, did_you_mean
from gptlab.training.config import EarlyStoppingConfig


class EarlyStopping(LightningEarlyStopping):
    """Lightning's ``EarlyStopping``; an unknown metric is reported with the metrics of the run.

    The name of the class is part of the checkpoint, so it is the same as Lightning's.

    Args:
        config: Metric, direction, patience and threshold; see conf/callbacks/early_stopping.yaml.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__(config.monitor, min_delta=config.min_delta, patience=config.patience, mode=config.mode)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the run if the metric has not improved; raises UserError if there is no such metric yet."""
        if self.monitor not in (known := trainer.callback_metrics):
            raise UserError(
                f"callbacks.early_stopping.monitor={self.monitor}: the run has no such metric at its first evaluation."
                f"{did_you_mean(self.monitor, known)} Metrics: {', '.join(sorted(known))}."
            )
        super().on_validation_end(trainer, pl_module)
