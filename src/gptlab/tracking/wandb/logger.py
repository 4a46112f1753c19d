"""Logger for Weights & Biases. A failure of W&B ends its record, but not the run.

W&B's steps are the run's optimizer steps. On a resume, logging continues after the last row that W&B has. That row is
known from the server if it responds, otherwise from the records in the run directory. Rows of metrics.csv that W&B does
not have are logged first; other rows are not logged again.
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
    """Lightning's ``WandbLogger``, except that a failure of W&B does not end the run.

    Args:
        run: Run object of W&B's client.
        directory: Run directory.
        first_step: First step whose row W&B does not have yet.
        best: Lowest validation loss so far, nats per token.

    Attributes:
        uploader: Background thread that uploads samples and checkpoints; None disables both.
        finish_timeout: Seconds to wait for the uploader at the end of the run.
        alerts: Sender of alerts; None disables alerts.
        artifacts: Uploader of checkpoints; None disables them.
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
        """Logs a row of metrics; W&B's client merges rows of the same step."""
        if self.works and (step is None or step >= self.first_step):
            self._has_rows = True
            self._try(lambda: self.experiment.log(dict(metrics), step=step))

    def log_hyperparams(self, params: object = None) -> None:
        """Logs nothing: wandb.init has received the configuration."""

    def log_samples(self, step: int, tokens: Callable[[int], int]) -> None:
        """Logs the table of all samples up to a step, including those before a resume.

        The table is added to the current row at the time of the upload, since W&B rejects data for earlier steps.

        Args:
            step: Step of the latest samples.
            tokens: Returns the number of tokens seen up to a step.
        """
        if self.works and self.uploader is not None and self._has_rows:
            self.uploader.put(f"the samples of step {step}", lambda: self._send_samples(step, tokens))

    def alert(self, kind: str, sentence: str) -> None:
        """Sends an alert with ``kind`` as its title, if alerts are enabled."""
        if self.works and self.alerts is not None:
            alerts = self.alerts
            self._try(lambda: alerts.send(kind, sentence))

    def give_up(self, sentence: str) -> None:
        """Sends an alert that this process hangs, and ends the record; called by the watchdog before the process exits.

        Args:
            sentence: Text of the alert.
        """
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
            run.mark_preempting()  # so that W&B's agent restarts it
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning("W&B has not received the whole record in time. To upload it: %s", self._command())
            return
        if run.offline:
            log.info("The W&B record is kept in the run directory. To upload it: %s", self._command())
            return
        mark_synced(_record_path(run))
        if self.artifacts is not None:
            self.artifacts.clear()

    def _keep_best(self, run: Any) -> None:
        """Restores the lowest val loss from before a resume, since W&B's client summarizes only rows of this start."""
        run.log({}, commit=True)  # commits the last row, so that the client does not overwrite the summary
        since = run.summary.get("val/loss", {}).get("min", math.inf)
        run.summary.update({"val/loss": {"min": min(self.best_before, since)}})

    def _send_samples(self, until: int, tokens: Callable[[int], int]) -> None:
        import wandb

        samples, problems = Run(self.directory).samples()
        for problem in problems:
            log.warning("%s. It is not sent to W&B.", problem)
        written = [(step, parse_samples(text)) for step, text in samples if step <= until]
        rows = [[step, tokens(step), text] for step, texts in written for text in texts]
        table = wandb.Table(columns=["step", "tokens", "text"], data=rows)
        self.experiment.log({"samples": table}, commit=False)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # any error: the run must not depend on W&B
            self.works = False
            log.warning("W&B has failed, and no more rows are sent: %s. metrics.csv has all rows.", error)

    def _command(self) -> str:
        return sync_command(self.directory)


def build_wandb_logger(config: RunConfig, settings: WandbConfig, directory: Path, earlier: Rows) -> WandbLogger | None:
    """Starts or resumes the W&B record of a run; returns None if W&B's own settings disable it.

    Args:
        config: Configuration of the run.
        settings: Its ``logger.wandb``.
        directory: Run directory, which also stores the W&B ID of the run.
        earlier: Rows of metrics.csv, on a resume.

    Raises:
        UserError: logger.wandb.mode=online, but W&B does not respond or there is no login.
    """
    if (forbidden := opt_out()) and forbidden.mode == "disabled":
        log.info("W&B is off because of %s.", forbidden.source)
        return None
    if not is_first_rank():
        return WandbLogger(offline=True)  # does not start a W&B run, since Lightning logs on the first rank only
    for path in wandb_records(directory):
        truncate_incomplete(path)
    before = {path: last_step(path) for path in wandb_records(directory)}
    for path, step in before.items():
        if step < 0:  # the start was killed: `wandb sync` fails on an empty record
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
        for path in before:  # the server has all rows of earlier records now
            mark_synced(path)
    return record


def _exit_code(status: str) -> int:
    """Returns the exit code that this process will have."""
    error = sys.exception()  # Lightning finalizes loggers while it handles the exception that ends the run
    if status == "success":
        return DONE
    if isinstance(error, Preempted):
        return PREEMPTED
    return FAILED if error is None else status_of(error)


def _record_path(run: Any) -> Path:
    return Path(run.sync_dir) / f"run-{run.id}.wandb"


def attach_wandb(trainer: L.Trainer, recorder: MetricsCallback) -> None:
    """Connects the W&B logger of a run, if any, to the callbacks that report samples, checkpoints and alerts."""
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
