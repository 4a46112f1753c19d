"""The loggers of a run."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from gptlab.experiments.schema import Config
from gptlab.experiments.wandb_logger import wandb_logger
from gptlab.training.processes import is_first_rank

METRICS = "metrics.csv"


class MetricsFile(CSVLogger):
    """metrics.csv at the top of the run directory; a resumed run adds to it.

    Args:
        directory: The run's.
        keep_until: On a resume, the step up to which earlier rows stand; None for a new run.
    """

    def __init__(self, directory: Path, keep_until: int | None) -> None:
        super().__init__(directory, name="", version="", flush_logs_every_n_steps=1)
        earlier = _rows(directory / METRICS, keep_until) if keep_until is not None else []
        if earlier:
            self.experiment.metrics.extend(earlier)
            self.experiment.save()  # at once: Lightning's writer has removed the old file

    def log_hyperparams(self, params: object = None) -> None:
        """Write nothing: config.yaml has them."""


def _rows(path: Path, until: int) -> list[dict[str, Any]]:
    """Read the rows up to a step, their values as they stand there."""
    if not is_first_rank() or not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if int(row["step"]) <= until]


def build_loggers(config: Config, directory: Path, keep_until: int | None) -> list[Logger]:
    """Build metrics.csv and whatever else the configuration names."""
    loggers: list[Logger] = []
    if config.logger.tensorboard is not None:
        loggers.append(TensorBoardLogger(directory, name="", version="tensorboard", default_hp_metric=False))
    if config.logger.wandb is not None:
        earlier = _rows(directory / METRICS, keep_until) if keep_until is not None else []
        loggers.append(wandb_logger(config, config.logger.wandb, directory, earlier))
    # the last, so that nothing that can be refused stands after it has touched the file
    return [*loggers, MetricsFile(directory, keep_until)]
