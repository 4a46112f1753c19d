"""A run's record on Weights & Biases, which W&B itself may be away from: it is kept here in any case, and stops no run.

A row of W&B has the step of the run. On a resume the rows go on behind what is there already: the server's word counts
where it answers, else the records in the run directory; what is there is not written twice, and what metrics.csv has
beyond it is made up for.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from gptlab.errors import UserError
from gptlab.experiments.schema import Config, WandbConfig
from gptlab.experiments.wandb_files import how_to_send, last_step, mark_as_sent, mend, wandb_records
from gptlab.training.processes import is_first_rank

log = logging.getLogger(__name__)

ID = "wandb_id"  # the file that keeps a run's id
Rows = Iterable[Mapping[str, str]]


class WandbRecord(WandbLogger):
    """Lightning's, except that nothing W&B does can end the run.

    Args:
        run: Of W&B, under way.
        directory: The run's.
        first_step: Rows of steps before it are there already.
    """

    def __init__(self, run: Any, directory: Path, first_step: int) -> None:
        super().__init__(experiment=run)
        self.directory, self.first_step, self.works = directory, first_step, True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand W&B's client a row, which it merges with what it has of the same step."""
        if self.works and (step is None or step >= self.first_step):
            self._try(lambda: self.experiment.log(dict(metrics), step=step))

    def log_hyperparams(self, params: object = None) -> None:
        """Write nothing: the run began with its configuration."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the record, as long as W&B takes no longer than logger.wandb.finish_timeout."""
        if self.works:
            self._try(lambda: self._finish(0 if status == "success" else 1))
            self.works = False

    def _finish(self, exit_code: int) -> None:
        run = self.experiment
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning("W&B has not taken the whole record in time. It is kept; to send it: %s", self._command())
            return
        if run.offline:
            log.info("The W&B record is kept in the run directory. To send it: %s", self._command())
        else:
            mark_as_sent(_record(run))

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the run is worth more than its record
            self.works = False
            log.warning("W&B has failed, and gets no more rows: %s. metrics.csv has them all.", error)

    def _command(self) -> str:
        return how_to_send(self.directory)


def wandb_logger(config: Config, settings: WandbConfig, directory: Path, earlier: Rows) -> WandbLogger:
    """Begin the record of a run, or go on with it.

    Args:
        config: Of the run.
        settings: Of W&B.
        directory: The run's; its id at W&B is kept there.
        earlier: The rows of metrics.csv, on a resume.

    Raises:
        UserError: logger.wandb.mode=online, and W&B does not answer or there is no login.
    """
    if not is_first_rank():
        return WandbLogger(offline=True)  # never starts a run: Lightning logs on the first rank only
    for path in wandb_records(directory):
        mend(path)
    before = {path: last_step(path) for path in wandb_records(directory)}
    for path, step in before.items():
        if step < 0:  # of a start that was killed: `wandb sync` gives up at a record with nothing in it
            mark_as_sent(path)
    run = _begin(config, settings, directory)
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    run.define_metric("val/loss", summary="min", step_metric="tokens")
    first_step = max(before.values(), default=-1) + 1 if run.offline else run.starting_step
    record = WandbRecord(run, directory, first_step)
    for row in earlier:
        record.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))
    if not run.offline:
        log.info("%-9s %s", "wandb", run.url)
        for path in before:  # the server had it, or has just got it
            mark_as_sent(path)
    return record


def _begin(config: Config, settings: WandbConfig, directory: Path) -> Any:
    """Start W&B's client, online if it may and can be."""
    import wandb

    before = wandb_records(directory)
    try:
        return _init(config, settings, directory, "offline" if settings.mode == "offline" else "online")
    except Exception as error:
        if settings.mode == "offline":
            raise
        reason = " ".join(str(error).split())
    wandb.teardown()
    for path in set(wandb_records(directory)) - set(before):  # nothing is in it
        shutil.rmtree(path.parent)
    if settings.mode == "online":
        raise UserError(
            f"logger=wandb cannot start: {reason}\nLog in with `wandb login`, or keep the record in the run directory: "
            "logger.wandb.mode=offline, or auto for where W&B cannot be reached."
        )
    run = _init(config, settings, directory, "offline")
    log.warning(
        "W&B cannot be used (%s). The record is kept in the run directory; to send it: %s",
        *(reason, how_to_send(directory)),
    )
    return run


def _init(config: Config, settings: WandbConfig, directory: Path, mode: Literal["online", "offline"]) -> Any:
    os.environ.pop("WANDB_SERVICE", None)  # that of a parent process, which would keep hold of a run that was given up
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's reports on itself would hold up the end of a run
    import wandb

    id_file = directory / ID
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    wandb.setup(wandb.Settings(silent=True))  # before init, which else would ask a terminal for a login
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=settings.tags,
        name=f"{config.name}/{directory.name}",
        id=id_file.read_text(),
        resume="allow",
        dir=directory,
        mode=mode,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(
            silent=True,
            init_timeout=settings.init_timeout,
            finish_timeout=settings.finish_timeout,
            finish_timeout_raises=True,
        ),
    )


def _record(run: Any) -> Path:
    return Path(run.sync_dir) / f"run-{run.id}.wandb"
