"""The loggers of a run."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from gptlab.errors import UserError
from gptlab.experiments.schema import Config, WandbConfig
from gptlab.training.processes import is_first_rank


class MetricsFile(CSVLogger):
    """metrics.csv at the top of the run directory; a resumed run adds to it.

    Args:
        directory: The run's.
        keep_until: On a resume, the step up to which earlier rows stand; None for a new run.
    """

    def __init__(self, directory: Path, keep_until: int | None) -> None:
        super().__init__(directory, name="", version="", flush_logs_every_n_steps=1)
        earlier = _rows(directory / "metrics.csv", keep_until) if keep_until is not None else []
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
        loggers.append(_wandb_logger(config, config.logger.wandb, directory))
    # the last, so that nothing that can be refused stands after it has touched the file
    return [*loggers, MetricsFile(directory, keep_until)]


def _wandb_logger(config: Config, settings: WandbConfig, directory: Path) -> Logger:
    """Create the W&B run on the first rank, with tokens as the x-axis; its id is kept for a resume."""
    if not is_first_rank():
        return WandbLogger(offline=True)  # never starts a run: Lightning logs on the first rank only
    import wandb

    id_file = directory / "wandb_id"
    try:
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags,
            name=f"{config.name}/{directory.name}",
            id=id_file.read_text() if id_file.exists() else None,
            resume="allow",
            dir=directory,
            mode=settings.mode,
            config=config.model_dump(mode="json"),
        )
    except wandb.errors.UsageError as error:  # no login
        raise UserError(
            f"logger=wandb cannot start: {error}\nLog in with `wandb login`, or keep the record in the run directory: "
            "logger.wandb.mode=offline"
        ) from error
    id_file.write_text(run.id)
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    run.define_metric("val/loss", summary="min", step_metric="tokens")
    return WandbLogger(experiment=run)
