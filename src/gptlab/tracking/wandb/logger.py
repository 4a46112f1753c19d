"""A run's record on Weights & Biases, which W&B itself may be away from: it is kept here in any case, and stops no run.

A row of W&B has the step of the run. On a resume the rows go on behind what is there already: the server's word counts
where it answers, else the records in the run directory; what is there is not written twice, and what metrics.csv has
beyond it is made up for.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from gptlab.config.schema import RunConfig, WandbConfig
from gptlab.exit_codes import DONE, FAILED, HUNG, PREEMPTED
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.state import status_of
from gptlab.tracking.wandb.alerts import STALL, Alerts
from gptlab.tracking.wandb.artifacts import Artifacts
from gptlab.tracking.wandb.background_uploader import BackgroundUploader
from gptlab.tracking.wandb.files import last_step, mark_synced, sync_command, truncate_incomplete, wandb_records
from gptlab.tracking.wandb.init import init_run
from gptlab.tracking.wandb.opt_outs import opt_out
from gptlab.training.callbacks.preemption import Preempted
from gptlab.training.callbacks.samples import parse_samples
from gptlab.training.distributed.processes import is_first_rank

log = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, str]]


class RunWandbLogger(WandbLogger):
    """Lightning's, except that nothing W&B does can end the run.

    Args:
        run: Of W&B, under way.
        directory: The run's.
        first_step: Rows of steps before it are there already.
        best: The lowest val loss so far.

    Attributes:
        sender: What sends samples and checkpoints; None sends none.
        finish_timeout: Seconds that it has at the end.
        alerts: What tells W&B that something goes wrong; None tells nothing.
        artifacts: What hands it checkpoints; None hands over none.
    """

    def __init__(self, run: Any, directory: Path, first_step: int, best: float = math.inf) -> None:
        super().__init__(experiment=run)
        self.directory, self.first_step, self.works = directory, first_step, True
        self.best_before, self._has_rows = best, False
        self.alerts: Alerts | None = None
        self.artifacts: Artifacts | None = None
        self.sender: BackgroundUploader | None = None
        self.finish_timeout = 0.0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand W&B's client a row, which it merges with what it has of the same step."""
        if self.works and (step is None or step >= self.first_step):
            self._has_rows = True
            self._try(lambda: self.experiment.log(dict(metrics), step=step))

    def log_hyperparams(self, params: object = None) -> None:
        """Write nothing: the run began with its configuration."""

    def log_samples(self, step: int, tokens: Callable[[int], int]) -> None:
        """Write the table of all texts up to a step anew, those before a resume included.

        It comes into the row that is being written by then: W&B takes nothing for an earlier one.

        Args:
            step: That was just made.
            tokens: Of so many steps.
        """
        if self.works and self.sender is not None and self._has_rows:
            self.sender.put(f"the samples of step {step}", lambda: self._send_samples(step, tokens))

    def alert(self, kind: str, sentence: str) -> None:
        """Tell that something goes wrong."""
        if self.works and self.alerts is not None:
            alerts = self.alerts
            self._try(lambda: alerts.send(kind, sentence))

    def give_up(self, sentence: str) -> None:
        """Tell that this process hangs, and end the record, which nobody else will."""
        self.alert(STALL, sentence)
        if self.works:
            self._try(lambda: self._finish(HUNG))
            self.works = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the record, as long as W&B takes no longer than logger.wandb.finish_timeout."""
        if self.works:
            exit_code = _exit_code(status)
            self._try(lambda: self._finish(exit_code))
            self.works = False

    def _finish(self, exit_code: int) -> None:
        run = self.experiment
        if self.sender is not None:
            self.sender.close(self.finish_timeout)
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
        mark_synced(_keep_earlier_record(run))
        if self.artifacts is not None:
            self.artifacts.clear()

    def _keep_best(self, run: Any) -> None:
        """Say that the lowest val loss was before this start, if it was: W&B's client knows of no rows but its own."""
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
    """Begin or resume the record of a run; return None if W&B's own settings disable it.

    Args:
        config: Of the run.
        settings: Of W&B.
        directory: The run's; its id at W&B is kept there.
        earlier: The rows of metrics.csv, on a resume.

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
    record.finish_timeout, record.sender = settings.finish_timeout, BackgroundUploader()
    if settings.alert_wait is not None:
        record.alerts = Alerts(run, settings.alert_wait)
    if settings.checkpoints != "none":
        record.artifacts = Artifacts(run, directory, record.sender, settings.checkpoints, record.best_before)
    for row in earlier:
        record.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))
    if not run.offline:
        log.info("%-9s %s", "wandb", run.url)
        for path in before:  # the server had it, or has just got it
            mark_synced(path)
    return record


def _exit_code(status: str) -> int:
    """The exit status of a run that is ending, as the process will have it."""
    error = sys.exception()  # Lightning ends its loggers where it has caught what ends the run
    if status == "success":
        return DONE
    if isinstance(error, Preempted):
        return PREEMPTED
    return FAILED if error is None else status_of(error)


def _keep_earlier_record(run: Any) -> Path:
    return Path(run.sync_dir) / f"run-{run.id}.wandb"
