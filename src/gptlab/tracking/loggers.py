"""Loggers of a run: metrics.csv, state.json, TensorBoard and W&B."""

import csv
import io
import logging
import sys
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError, without_passwords
from gptlab.files import append_whole, open_regular, skip_if_disk_full, write_file
from gptlab.tracking.run_directory import without_origin
from gptlab.tracking.run_store.runs import METRICS, Run, flatten, read_csv
from gptlab.tracking.run_store.state import STATE, RunState, load_state, new_state
from gptlab.tracking.wandb.logger import build_wandb_logger
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.distributed.processes import is_first_rank

log = logging.getLogger(__name__)


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's ``TensorBoardLogger`` for the run directory, with the configuration as hyperparameters.

    Their metrics are ``val/loss`` and ``val/bits_per_byte``, of which TensorBoard shows the last value.

    Args:
        config: Configuration of the run.
        directory: Run directory.
        keep_until: On a resume, the last step whose rows TensorBoard keeps; None for a new run.
    """

    def __init__(self, config: RunConfig, directory: Path, keep_until: int | None) -> None:
        purge_step = None if keep_until is None else keep_until + 1
        super().__init__(directory, name="", version="tensorboard", default_hp_metric=False, purge_step=purge_step)
        if is_first_rank():
            self._log_config(config)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a row of metrics; it is dropped if the disk is full."""
        with skip_if_disk_full(Path(self.log_dir)):
            super().log_metrics(metrics, step)

    def _log_config(self, config: RunConfig) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = flatten(without_passwords(without_origin(config)))
        numbers_or_text = {key: value if isinstance(value, int | float) else str(value) for key, value in values}
        for summary in hparams(numbers_or_text, dict.fromkeys(MetricsCallback.evaluation_metrics, 0.0)):
            self.experiment.file_writer.add_summary(summary)


class MetricsCSVLogger(Logger):
    """Logger of metrics.csv in the run directory, with one row per logged step and a column per metric.

    Unlike Lightning's ``CSVLogger``, it loses no row if the process is killed or the disk is full: a row is written
    as a whole or not at all, and a new column replaces the file at once. Rows that cannot be written are written later.

    Args:
        directory: Run directory.
        keep_until: On a resume, the last step whose row is kept; None for a new run.
    """

    name = version = None

    def __init__(self, directory: Path, keep_until: int | None) -> None:
        super().__init__()
        self.path = directory / METRICS
        self._step = keep_until or 0
        self._columns: list[str] = []  # of the file
        self._last: dict[str, Any] | None = None  # last row of the file
        self._kept = 0  # size of the file without its last row, in bytes
        self._rows: list[dict[str, Any]] = []  # not written yet
        self._replaces_last = False  # whether the first of them replaces the last row of the file
        if keep_until is not None and is_first_rank():
            self._replace(_read_rows(self.path, keep_until))

    def log_hyperparams(self, params: object = None) -> None:
        """Logs nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs metrics of a step, by default the latest one; adds them to its row if it is the last one."""
        self._step = self._step if step is None else step
        self._add({**metrics, "step": self._step})
        with skip_if_disk_full(self.path):
            if {key for row in self._rows for key in row} <= set(self._columns):
                append_whole(self.path, self._format(self._rows), self._kept if self._replaces_last else None)
                self._remember(self._rows[-1])
            else:
                earlier = _read_rows(self.path, sys.maxsize)
                self._replace([*(earlier[:-1] if self._replaces_last else earlier), *self._rows])
            self._rows, self._replaces_last = [], False

    def _add(self, row: dict[str, Any]) -> None:
        """Adds a row to those that are not written yet, or its values to the latest row if that has no other ones."""
        latest = self._rows[-1] if self._rows else self._last
        if latest is None or any(str(latest.get(key, value)) != str(value) for key, value in row.items()):
            self._rows.append(row)
        elif self._rows:
            self._rows[-1] = latest | row
        else:
            self._rows, self._replaces_last = [latest | row], True

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file, with the columns of all rows in alphabetical order."""
        columns = sorted({key for row in rows for key in row})
        header = dict(zip(columns, columns, strict=True))
        write_file(self.path, self._format([header, *rows] if rows else [], columns))
        self._columns = columns
        self._remember(rows[-1] if rows else None)

    def _remember(self, last: dict[str, Any] | None) -> None:
        self._last = last
        self._kept = self.path.stat().st_size - (len(self._format([last]).encode()) if last else 0)

    def _format(self, rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
        text = io.StringIO()
        csv.DictWriter(text, columns or self._columns).writerows(rows)
        return text.getvalue()


def _initial_state(config: RunConfig, directory: Path, keep_until: int | None) -> RunState:
    """Returns the initial state of a run; on a resume, its state at step ``keep_until``."""
    state = new_state(config.steps)
    if keep_until is None:
        return state
    for problem in Run(directory).damaged(STATE) if is_first_rank() else ():
        log.warning("%s. The wall time of the earlier starts is not known.", problem)
    earlier = load_state(directory)
    rows = _read_rows(directory / METRICS, keep_until)
    if not rows and config.resume and is_first_rank():
        log.warning("%s is missing or empty. Its rows start after step %d.", directory / METRICS, keep_until)
    losses = {name: [float(row[name]) for row in rows if name in row] for name in ("train/loss", "val/loss")}
    return state.model_copy(
        update={
            "step": keep_until,
            "tokens": config.train.stages.first(keep_until) * config.model.block_size,
            "loss": losses["train/loss"][-1] if losses["train/loss"] else None,
            "val_loss": losses["val/loss"][-1] if losses["val/loss"] else None,
            "best_val_loss": min(filter(isfinite, losses["val/loss"]), default=None),
            "seconds": earlier.seconds if earlier else 0.0,
        }
    )


def check_metrics(directory: Path) -> None:
    """Raises UserError if a run to resume has a metrics.csv that cannot be read."""
    _read_rows(directory / METRICS, 0, warns=False)


def _read_rows(path: Path, until: int, *, warns: bool = True) -> list[dict[str, Any]]:
    """Reads the rows up to a step, with values as strings; raises UserError if they are not numbers."""
    if not is_first_rank() or not path.exists():
        return []
    try:
        with io.TextIOWrapper(io.BufferedReader(open_regular(path)), encoding="utf-8", newline="") as file:
            content = file.read()
        if warns and content and not content.endswith("\n"):
            log.warning("The last row of %s is unfinished and is left out.", path)
        rows = list(read_csv(io.StringIO(content, newline="")))
        for row in rows:
            int(row["step"]), [float(value) for value in row.values()]  # raise an error
        return [row for row in rows if int(row["step"]) <= until]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error!r:.300}. To resume without it, remove it.") from error


class RunStateLogger(Logger):
    """Logger of state.json in the run directory.

    The file is rewritten at most once per second, and additionally at every evaluation and at the last step.

    Args:
        directory: Run directory.
        state: Initial state.
    """

    name = version = None

    def __init__(self, directory: Path, state: RunState) -> None:
        super().__init__()
        self.directory, self.state = directory, state
        self._first_step, self._seconds = state.step, state.seconds  # before this start
        self._saved = 0.0
        if is_first_rank():
            state.save(directory)

    def log_hyperparams(self, params: object = None) -> None:
        """Logs nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Updates the state from a row of metrics."""
        now, before = time.time(), self.state
        step = max(before.step, step or 0)  # other callbacks may log rows of earlier steps or without a step
        elapsed = now - before.began
        ahead = (before.max_steps - step) / max(1, step - self._first_step)
        val_loss = metrics.get("val/loss")
        known = [loss for loss in (before.best_val_loss, val_loss) if loss is not None and isfinite(loss)]
        self.state = before.model_copy(
            update={
                "step": step,
                "tokens": int(metrics.get("tokens", before.tokens)),
                "loss": metrics.get("train/loss", before.loss),
                "val_loss": before.val_loss if val_loss is None else val_loss,
                "best_val_loss": min(known, default=None),
                "tokens_per_second": metrics.get("tokens_per_second", before.tokens_per_second),
                "seconds": self._seconds + elapsed,
                "seconds_left": elapsed * ahead,
                "updated": now,
            }
        )
        if now - self._saved > 1 or step == before.max_steps or val_loss is not None:
            self._saved = now
            with skip_if_disk_full(self.directory / STATE):
                self.state.save(self.directory)


def build_loggers(config: RunConfig, directory: Path, keep_until: int | None) -> list[Logger]:
    """Builds the configured loggers and those of metrics.csv and state.json.

    Args:
        config: Configuration of the run.
        directory: Run directory.
        keep_until: On a resume, the step of the checkpoint; later rows of metrics.csv are removed. None for a new run.

    Raises:
        UserError: logger.wandb.mode=online, but W&B does not respond or there is no login.
    """
    loggers: list[Logger] = []
    if config.logger.tensorboard is not None:
        loggers.append(RunTensorBoardLogger(config, directory, keep_until))
    if config.logger.wandb is not None:
        earlier = _read_rows(directory / METRICS, keep_until) if keep_until is not None else []
        record = build_wandb_logger(config, config.logger.wandb, directory, earlier)
        loggers += [record] if record is not None else []
    # last, since the loggers above may raise an error, and these modify files
    return [
        *loggers,
        MetricsCSVLogger(directory, keep_until),
        RunStateLogger(directory, _initial_state(config, directory, keep_until)),
    ]
