"""A run's record on Weights & Biases. A failure of W&B ends the record, never the run.

Steps of W&B are steps of the run. On a resume, rows are logged after those that W&B has: the server's count if it
answers, else that of the records in the run directory. Rows that are there are not logged again; rows of metrics.csv
that are missing there are logged first.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from gptlab.config.schema import RunConfig, WandbConfig
from gptlab.exit_codes import DONE, FAILED, HUNG, PREEMPTED
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.state import status_of
from gptlab.tracking.wandb.files import last_step, mark_synced, sync_command, truncate_incomplete, wandb_records
from gptlab.tracking.wandb.init import init_run
from gptlab.tracking.wandb.opt_outs import opt_out
from gptlab.tracking.wandb.uploads import STALL, Alerts, BackgroundUploader, CheckpointArtifacts
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.preemption import Preempted
from gptlab.training.callbacks.samples import Samples, parse_samples
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.checkpoints.writing import AtomicCheckpointIO
from gptlab.training.distributed.processes import is_first_rank

log = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, str]]


class RunWandbLogger(WandbLogger):
    """Lightning's W&B logger, except that a failure of W&B never ends the run.

    Args:
        run: W&B's run, in progress.
        directory: Run directory.
        first_step: First step whose row W&B does not have yet.
        best: Lowest validation loss so far.

    Attributes:
        uploader: Uploads samples and checkpoints; None uploads none.
        finish_timeout: Seconds to wait for it at the end of the run.
        alerts: Sends alerts; None sends none.
        artifacts: Uploads checkpoints; None uploads none.
    """

    def __init__(self, run: Any, directory: Path, first_step: int, best: float = math.inf) -> None:
        super().__init__(experiment=run)
        self.directory, self.first_step, self.works = directory, first_step, True
        self.best_before, self._has_rows = best, False
        self.alerts: Alerts | None = None
        self.artifacts: CheckpointArtifacts | None = None
        self.uploader: BackgroundUploader | None = None
        self.finish_timeout = 0.0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs a row; W&B's client merges it with an earlier one of the same step."""
        if self.works and (step is None or step >= self.first_step):
            self._has_rows = True
            self._try(lambda: self.experiment.log(dict(metrics), step=step))

    def log_hyperparams(self, params: object = None) -> None:
        """Logs nothing: wandb.init got the configuration."""

    def log_samples(self, step: int, tokens: Callable[[int], int]) -> None:
        """Logs the table of all samples up to a step, including those before a resume.

        The table is added to the row that is current when it is uploaded: W&B accepts nothing for an earlier step.

        Args:
            step: Step of the newest samples.
            tokens: Maps a step to the tokens seen by then.
        """
        if self.works and self.uploader is not None and self._has_rows:
            self.uploader.put(f"the samples of step {step}", lambda: self._send_samples(step, tokens))

    def alert(self, kind: str, sentence: str) -> None:
        """Sends an alert."""
        if self.works and self.alerts is not None:
            alerts = self.alerts
            self._try(lambda: alerts.send(kind, sentence))

    def give_up(self, sentence: str) -> None:
        """Sends an alert that this process hangs and ends the record; called by the watchdog before it exits."""
        self.alert(STALL, sentence)
        if self.works:
            self._try(lambda: self._finish(HUNG))
            self.works = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the record, waiting at most logger.wandb.finish_timeout seconds for W&B."""
        if self.works:
            exit_code = _exit_code(status)
            self._try(lambda: self._finish(exit_code))
            self.works = False

    def _finish(self, exit_code: int) -> None:
        run = self.experiment
        if self.uploader is not None:
            self.uploader.close(self.finish_timeout)
        if math.isfinite(self.best_before):
            self._keep_best(run)
        if exit_code == PREEMPTED:
            run.mark_preempting()  # W&B's agent starts it again
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning("W&B has not taken the whole record in time. It is kept; to send it: %s", self._command())
            return
        if run.offline:
            log.info("The W&B record is kept in the run directory. To send it: %s", self._command())
            return
        mark_synced(_record_path(run))
        if self.artifacts is not None:
            self.artifacts.clear()

    def _keep_best(self, run: Any) -> None:
        """Restores the lowest val loss from before a resume: W&B's client summarizes only the rows that it logged."""
        run.log({}, commit=True)  # what follows a summary of one's own is kept as it is
        since = run.summary.get("val/loss", {}).get("min", math.inf)
        run.summary.update({"val/loss": {"min": min(self.best_before, since)}})

    def _send_samples(self, until: int, tokens: Callable[[int], int]) -> None:
        import wandb

        written = [(step, parse_samples(text)) for step, text in Run(self.directory).samples if step <= until]
        rows = [[step, tokens(step), text] for step, texts in written for text in texts]
        table = wandb.Table(columns=["step", "tokens", "text"], data=rows)
        self.experiment.log({"samples": table}, commit=False)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the run is worth more than its record
            self.works = False
            log.warning("W&B has failed, and gets no more rows: %s. metrics.csv has them all.", error)

    def _command(self) -> str:
        return sync_command(self.directory)


def build_wandb_logger(config: RunConfig, settings: WandbConfig, directory: Path, earlier: Rows) -> WandbLogger | None:
    """Starts or resumes the record of a run; returns None if W&B's own settings disable it.

    Args:
        config: Configuration of the run.
        settings: Its ``logger.wandb``.
        directory: Run directory, where the run's id at W&B is kept.
        earlier: Rows of metrics.csv, on a resume.

    Raises:
        UserError: logger.wandb.mode=online, and W&B does not answer or there is no login.
    """
    if (forbidden := opt_out()) and forbidden.mode == "disabled":
        log.info("W&B is off because of %s.", forbidden.source)
        return None
    if not is_first_rank():
        return WandbLogger(offline=True)  # never starts a run: Lightning logs on the first rank only
    for path in wandb_records(directory):
        truncate_incomplete(path)
    before = {path: last_step(path) for path in wandb_records(directory)}
    for path, step in before.items():
        if step < 0:  # of a start that was killed: `wandb sync` gives up at a record with nothing in it
            mark_synced(path)
    run = init_run(config, settings, directory)
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    run.define_metric("val/loss", summary="min", step_metric="tokens")
    first_step = max(before.values(), default=-1) + 1 if run.offline else run.starting_step
    losses = [loss for row in earlier if math.isfinite(loss := float(row.get("val/loss", math.inf)))]
    record = RunWandbLogger(run, directory, first_step, min(losses, default=math.inf))
    record.finish_timeout, record.uploader = settings.finish_timeout, BackgroundUploader()
    if settings.alert_wait is not None:
        record.alerts = Alerts(run, settings.alert_wait)
    if settings.checkpoints != "none":
        record.artifacts = CheckpointArtifacts(
            run, directory, record.uploader, settings.checkpoints, record.best_before
        )
    for row in earlier:
        record.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))
    if not run.offline:
        log.info("%-9s %s", "wandb", run.url)
        for path in before:  # the server had it, or has just got it
            mark_synced(path)
    return record


def _exit_code(status: str) -> int:
    """Returns the exit status that this process will have."""
    error = sys.exception()  # Lightning ends its loggers where it has caught what ends the run
    if status == "success":
        return DONE
    if isinstance(error, Preempted):
        return PREEMPTED
    return FAILED if error is None else status_of(error)


def _record_path(run: Any) -> Path:
    return Path(run.sync_dir) / f"run-{run.id}.wandb"


def attach_wandb(trainer: L.Trainer, recorder: MetricsCallback) -> None:
    """Connects a run's W&B record, if it has one, with what reports samples, checkpoints and alerts."""
    for record in trainer.loggers:
        if not isinstance(record, RunWandbLogger):
            continue
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            match callback:
                case TrainingHealthMonitor():
                    callback.listeners.append(record.alert)
                case Samples():
                    callback.listeners.append(partial(record.log_samples, tokens=recorder.tokens))
                case Watchdog():
                    callback.listeners.append(record.give_up)
        if record.artifacts is not None:
            cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io).listeners.append(record.artifacts.upload)
