"""Main loop of a sweep: starts trials and records their results. Imports no torch."""

import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError, did_you_mean
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.launch.signals import StopSignals
from gptlab.sweeps.analysis.report import report_sweep
from gptlab.sweeps.config import SweeperConfig
from gptlab.sweeps.local_launcher import OUTPUT
from gptlab.sweeps.search import Search
from gptlab.sweeps.space import Point
from gptlab.sweeps.sweep_store import SweepStore, config_hash
from gptlab.sweeps.sweep_table import SweepTable
from gptlab.tracking.run_store.blow_up import describe_blow_up
from gptlab.tracking.run_store.runs import METRICS, Run
from gptlab.tracking.run_store.state import END_STATES, load_state
from gptlab.tracking.run_store.sweeps import (
    DIRECTIONS,
    FAILED_STATES,
    TRIAL_END_STATES,
    Trial,
    ended_status,
    format_overrides,
    reopen,
)
from gptlab.training.distributed.processes import STOP_SIGNALS

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
METRIC_POLL_SECONDS = 2.0
EVALUATED = "val/loss"  # every evaluation records it
Compose = Callable[[Point], RunConfig]


class Launcher(Protocol):
    """Interface of launchers, which run trials on this machine or as jobs of a cluster."""

    at_once: int

    @property
    def has_room(self) -> bool:
        """Whether another trial can start."""

    @property
    def is_busy(self) -> bool:
        """Whether a trial is running or queued."""

    def start(self, trial: Trial, config: RunConfig, run_dir: Path) -> Trial:
        """Starts a trial; returns it with its job ID, if the launcher has one."""

    def reattach(self, trial: Trial) -> bool:
        """Reattaches to a trial that an earlier process of the sweep started; returns whether it is still running.

        If so, ``ended`` returns the trial when it ends.
        """

    def ended(self) -> list[tuple[int, int]]:
        """Returns (trial number, exit code) of each trial that ended since the last call."""

    def forward_signal(self, number: int) -> None:
        """Handles a signal that the sweep received."""

    def close(self) -> None:
        """Kills trial processes that are still running. Jobs of a cluster keep running."""


class _ReadyTrial(NamedTuple):
    trial: Trial
    config: RunConfig


class SweepRunner:
    """Starts the trials of a sweep and records their results.

    Args:
        store: State of the sweep.
        search: Search that proposes points.
        launcher: Launcher that runs trials.
        compose: Function that composes the configuration of a point.
        config: Configuration of the sweep, which says whether to run failed trials again, and when to start no more.
    """

    def __init__(
        self, store: SweepStore, search: Search, launcher: Launcher, compose: Compose, config: SweeperConfig
    ) -> None:
        self.store, self.search, self.launcher, self.compose, self.config = store, search, launcher, compose, config
        self._deadline = time.monotonic() + 3600 * (config.max_hours or math.inf)
        self._has_failed = False  # in this process
        self._metric_check: float | None = time.monotonic()  # time of the next one; None: the metric is recorded
        self.table = SweepTable(lambda: list(store.trials.values()), store.run_dir)

    def run(self) -> int:
        """Runs all trials that have not ended; returns the exit code of the sweep."""
        self._announce()
        waiting = self._waiting()
        with StopSignals(
            lambda number, frame: self.launcher.forward_signal(number), (*STOP_SIGNALS, signal.SIGINT)
        ) as signals:
            try:
                with self.table:
                    self._work(waiting)
            finally:
                self.launcher.close()
        status = self._status(signals.received)
        self._summarize(status)
        return status

    def _work(self, waiting: Iterator[_ReadyTrial]) -> None:
        is_over = False
        while self.launcher.is_busy or not is_over:
            while self.launcher.has_room and not is_over:
                ready = next(waiting, None) if self._starts_more() else None
                is_over = ready is None
                if ready is not None:
                    self._begin(ready)
            for number, status in self.launcher.ended():
                self._end(number, status)
            self._check_metric()
            if not self.launcher.is_busy and not self.launcher.has_room:
                break  # a signal was received
            time.sleep(POLL_SECONDS)

    def _starts_more(self) -> bool:
        """Whether further trials start; logs why not."""
        if self.config.fail_fast and self._has_failed:
            log.info("No further trial starts, because one has failed (hydra.sweeper.fail_fast=true).")
            return False
        if time.monotonic() > self._deadline:
            log.info("No further trial starts after hydra.sweeper.max_hours=%g.", self.config.max_hours)
            return False
        return True

    def _waiting(self) -> Iterator[_ReadyTrial]:
        """Yields the trials that have not ended; new points are proposed only when a trial can start."""
        for number in range(self.search.n_trials):
            trial = self.store.trials.get(number)
            if trial is None:
                ready = self._new(number)
            elif trial.state not in TRIAL_END_STATES or (self.config.retry and trial.state in FAILED_STATES):
                ready = _ReadyTrial(trial, self.compose(trial.overrides))
            else:
                ready = None
            if ready is not None:
                yield ready

    def _new(self, number: int) -> _ReadyTrial | None:
        """Creates a trial; returns None if its config is invalid or a finished trial has the same config."""
        point = self.search.propose(number)
        try:
            config = self.compose(point)
        except UserError as error:
            trial = Trial(number=number, overrides=point, config_hash="")
            self._close(trial.to("config_error", status=CONFIG_ERROR, message=str(error)))
            return None
        trial = Trial(number=number, overrides=point, config_hash=config_hash(config))
        for same in self.store.trials.values():
            if same.config_hash == trial.config_hash and same.state == "done":
                message = f"same configuration as trial {same.number}"
                self._close(trial.to("done", status=DONE, value=same.value, blew_up=same.blew_up, message=message))
                return None
        return _ReadyTrial(trial, config)

    def _begin(self, ready: _ReadyTrial) -> None:
        trial, run_dir = ready.trial, self.store.run_dir(ready.trial)
        if self.launcher.reattach(trial):  # in any state: two jobs must not write to one run directory
            self.store.write(trial.to("running", status=None, message=None))
            return
        if trial.state in FAILED_STATES:
            reopen(run_dir)
        elif (status := ended_status(run_dir)) is not None:  # it ended while no process of the sweep ran
            self.store.write(trial)
            self._end(trial.number, status)
            return
        self.search.prepare(trial, run_dir)
        started = {"starts": trial.starts + 1, "job": None}
        trial = self.store.write(trial.to("running", status=None, message=None, **started))
        self.store.write(self.launcher.start(trial, ready.config, run_dir))
        self.table.began(trial)

    def _end(self, number: int, status: int) -> None:
        """Records the result of a trial; if a signal ended its process, that of its run, which may have been done."""
        trial = self.store.trials[number]
        run_dir = self.store.run_dir(trial)
        if status in (INTERRUPTED, PREEMPTED) and (recorded := ended_status(run_dir)) is not None:
            status = recorded
        name, state = END_STATES.get(status, "failed"), load_state(run_dir)
        message = None if status in (DONE, PRUNED) else (state and state.message) or _last_line(run_dir / OUTPUT)
        sweep, run = self.store.sweep, Run(run_dir)
        which: Literal["lowest", "highest"] = "lowest" if sweep.direction == "minimize" else "highest"
        value = run.value(sweep.metric, which) if status in (DONE, PRUNED) else None
        if status == DONE and (problem := missing_metric(sweep.metric, run.rows)) is not None:
            self._close(trial.to("failed", status=CONFIG_ERROR, message=problem))
            raise UserError(problem)
        if status == DONE and value is None:
            name, status, message = "diverged", DIVERGED, f"{self.store.sweep.metric} has no finite value"
        blow_up = describe_blow_up(run) if status == DONE else None
        tokens = state.tokens if state else 0
        result = {"value": value, "blew_up": blow_up is not None, "tokens": tokens}
        self._close(trial.to(name, status=status, message=message or blow_up, **result))

    def _check_metric(self) -> None:
        """Raises UserError if a running trial has not recorded the metric of the sweep in its first evaluation."""
        if self._metric_check is None or time.monotonic() < self._metric_check:
            return
        if self.store.sweep.metric in DIRECTIONS:  # recorded by gptlab, though perhaps not by every evaluation
            self._metric_check = None
            return
        self._metric_check = time.monotonic() + METRIC_POLL_SECONDS
        running = (trial for trial in self.store.trials.values() if trial.state == "running")
        if (first := next(running, None)) is None:
            return
        if any("every" in values for values in self.compose(first.overrides).callbacks.components.values()):
            self._metric_check = None  # a callback may record its metrics less often; they are checked at the end
            return
        rows = Run(self.store.run_dir(first)).rows
        problem = missing_metric(self.store.sweep.metric, rows)
        if rows and problem is None:
            self._metric_check = None
        evaluated = next((row for row in rows if EVALUATED in row), None)
        # the rows of an evaluation are complete when there is one of a later step
        if problem is not None and evaluated is not None and rows[-1].get("step", 0) > evaluated.get("step", 0):
            raise UserError(problem)

    def _close(self, trial: Trial) -> None:
        self.store.write(trial)
        self._has_failed |= trial.state in FAILED_STATES
        if trial.state in TRIAL_END_STATES:
            self.search.tell(trial)
        self.table.ended(trial)

    def _announce(self) -> None:
        sweep, known = self.store.sweep, list(self.store.trials.values())
        log.info("%-9s %s", "sweep", sweep.question)
        log.info("%-9s %s", "space", format_overrides(sweep.space))
        ended = sum(trial.state in TRIAL_END_STATES for trial in known)
        log.info("%-9s %d%s, up to %d concurrent", "trials", self.search.n_trials,
                 f" ({ended} of them already ended)" if ended else "", self.launcher.at_once)  # fmt: skip
        log.info("%-9s %s", "directory", self.store.directory)

    def _status(self, received: list[int]) -> int:
        if signal.SIGINT in received:
            return INTERRUPTED
        trials = self.store.trials.values()
        is_unfinished = any(trial.state not in TRIAL_END_STATES for trial in trials)
        is_unfinished |= len(trials) < self.search.n_trials
        if is_unfinished and not (self.config.fail_fast and self._has_failed):
            return PREEMPTED
        statuses = {trial.status or DONE for trial in trials} - {PRUNED, DONE}
        return max((status if status in (CONFIG_ERROR, DIVERGED) else FAILED for status in statuses), default=DONE)

    def _summarize(self, status: int) -> None:
        trials = sorted(self.store.trials.values(), key=lambda trial: trial.number)
        counts = Counter(trial.state for trial in trials)
        if any(trial.state == "done" for trial in trials):
            report_sweep(self.store.directory)
        for trial in trials:
            if trial.state in FAILED_STATES or trial.blew_up:  # including trials of earlier sweep processes
                self.table.ended(trial)
        blown = sum(trial.blew_up for trial in trials)
        log.info("%d trial%s: %s%s", self.search.n_trials, "s" if self.search.n_trials > 1 else "",
                 ", ".join(f"{n} {state}" for state, n in counts.items()),
                 f" ({blown} of the done trials blew up)" if blown else "")  # fmt: skip
        if status in (INTERRUPTED, PREEMPTED):
            log.info("Run the same command again to resume the sweep.")
        elif any(trial.state in FAILED_STATES for trial in trials):
            log.info("To retry the failed trials, add hydra.sweeper.retry=true hydra.sweep.dir=%s to the command.",
                     self.store.directory)  # fmt: skip


def missing_metric(metric: str, rows: Sequence[Mapping[str, float]]) -> str | None:
    """Returns the message of an error if rows of metrics.csv, at least one, do not have a metric; else None."""
    if not rows or any(metric in row for row in rows):
        return None
    columns = sorted({name for row in rows for name in row} - {"step"})
    return (
        f"hydra.sweeper.metric={metric} is not a column of {METRICS}.{did_you_mean(metric, columns)} "
        f"Columns: {', '.join(columns)}."
    )


def _last_line(path: Path) -> str | None:
    """Returns the last line of a file that is not empty, or None."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
