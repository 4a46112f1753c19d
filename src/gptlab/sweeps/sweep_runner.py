"""Starts the trials of a sweep and writes down what becomes of them, whatever that is. Imports no torch."""

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.launch.signals import STOP_SIGNALS, StopSignals
from gptlab.sweeps.analysis.report import report_sweep
from gptlab.sweeps.local_launcher import OUTPUT
from gptlab.sweeps.search import Search
from gptlab.sweeps.space import Point
from gptlab.sweeps.sweep_store import SweepStore, config_hash
from gptlab.sweeps.sweep_table import SweepTable
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.state import END_STATES, load_state
from gptlab.tracking.run_store.sweeps import TRIAL_END_STATES, Trial

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # seconds between looks at the trials
FAILURES = ("diverged", "config_error", "failed")
Compose = Callable[[Point], RunConfig]


class Launcher(Protocol):
    """What runs trials, somewhere."""

    at_once: int

    @property
    def has_room(self) -> bool:
        """Whether another trial can begin."""

    @property
    def is_busy(self) -> bool:
        """Whether there is a trial to wait for."""

    def start(self, trial: Trial, config: RunConfig, run_dir: Path) -> Trial:
        """Start a trial; return it with what is known of it now."""

    def reattach(self, trial: Trial, run_dir: Path) -> bool:
        """Whether a trial of an earlier start of the sweep runs still, and is waited for from here on."""

    def ended(self) -> list[tuple[int, int]]:
        """Return (number, exit status) of the trials that have ended since the last time."""

    def forward_signal(self, number: int) -> None:
        """Answer a signal that this process was sent."""

    def close(self) -> None:
        """Leave nothing behind that would not end by itself."""


class _ReadyTrial(NamedTuple):
    trial: Trial
    config: RunConfig


class SweepRunner:
    """Starts the trials of a sweep, and writes down what becomes of them.

    Args:
        ledger: What is known so far.
        search: Where the points come from.
        runner: Where they run.
        compose: Makes the configuration of a point.
        retry: Run trials again that have failed.
    """

    def __init__(self, ledger: SweepStore, search: Search, runner: Launcher, compose: Compose, *, retry: bool) -> None:
        self.ledger, self.search, self.runner, self.compose, self.retry = ledger, search, runner, compose, retry
        self.screen = SweepTable(lambda: list(ledger.trials.values()), ledger.run_dir)

    def run(self) -> int:
        """Run what there is to run; return the exit status of the sweep."""
        self._announce()
        waiting = self._waiting()
        with StopSignals(
            lambda number, frame: self.runner.forward_signal(number), (*STOP_SIGNALS, signal.SIGINT)
        ) as signals:
            try:
                with self.screen:
                    self._work(waiting)
            finally:
                self.runner.close()
        status = self._status(signals.received)
        self._summarise(status)
        return status

    def _work(self, waiting: Iterator[_ReadyTrial]) -> None:
        is_over = False
        while self.runner.is_busy or not is_over:
            while self.runner.has_room and not is_over:
                ready = next(waiting, None)
                is_over = ready is None
                if ready is not None:
                    self._begin(ready)
            for number, status in self.runner.ended():
                self._end(number, status)
            if not self.runner.is_busy and not self.runner.has_room:
                break  # the user or the machine wants an end
            time.sleep(POLL_SECONDS)

    def _waiting(self) -> Iterator[_ReadyTrial]:
        """Yield the trials that have not ended, those that are new when their turn comes."""
        for number in range(self.search.n_trials):
            trial = self.ledger.trials.get(number)
            if trial is None:
                ready = self._new(number)
            elif trial.state not in TRIAL_END_STATES or (self.retry and trial.state in FAILURES):
                ready = _ReadyTrial(trial, self.compose(trial.overrides))
            else:
                ready = None
            if ready is not None:
                yield ready

    def _new(self, number: int) -> _ReadyTrial | None:
        """Make a trial; None where nothing is to be run for it."""
        point = self.search.propose(number)
        try:
            config = self.compose(point)
        except UserError as error:
            trial = Trial(number=number, overrides=point, config_hash="")
            self._close(trial.to("config_error", status=CONFIG_ERROR, message=str(error)))
            return None
        trial = Trial(number=number, overrides=point, config_hash=config_hash(config))
        for same in self.ledger.trials.values():
            if same.config_hash == trial.config_hash and same.state == "done":
                message = f"the same as trial {same.number}"
                self._close(trial.to("done", status=DONE, value=same.value, message=message))
                return None
        return _ReadyTrial(trial, config)

    def _begin(self, ready: _ReadyTrial) -> None:
        trial, run_dir = ready.trial, self.ledger.run_dir(ready.trial)
        if self.runner.reattach(trial, run_dir):  # whatever was taken for its end: two jobs must not write one run
            self.ledger.write(trial.to("running", status=None, message=None))
            return
        self.search.prepare(trial, run_dir)
        trial = self.ledger.write(trial.to("running", starts=trial.starts + 1, status=None, message=None))
        self.ledger.write(self.runner.start(trial, ready.config, run_dir))
        self.screen.began(trial)

    def _end(self, number: int, status: int) -> None:
        """Write down how a trial has ended."""
        trial = self.ledger.trials[number]
        run_dir = self.ledger.run_dir(trial)
        name, seen = END_STATES.get(status, "failed"), load_state(run_dir)
        message = None if status in (DONE, PRUNED) else (seen and seen.message) or _last_line(run_dir / OUTPUT)
        value = Run(run_dir).value(self.ledger.sweep.metric) if status in (DONE, PRUNED) else None
        if status == DONE and value is None:
            name, status, message = "diverged", DIVERGED, f"{self.ledger.sweep.metric} was never a finite number"
        tokens = seen.tokens if seen else 0
        self._close(trial.to(name, status=status, message=message, value=value, tokens=tokens))

    def _close(self, trial: Trial) -> None:
        self.ledger.write(trial)
        if trial.state in TRIAL_END_STATES:
            self.search.tell(trial)
        self.screen.ended(trial)

    def _announce(self) -> None:
        sweep, known = self.ledger.sweep, list(self.ledger.trials.values())
        log.info("%-9s %s", "sweep", sweep.question)
        log.info("%-9s %s", "space", " ".join(f"{key}={value}" for key, value in sweep.space.items()))
        ended = sum(trial.state in TRIAL_END_STATES for trial in known)
        log.info("%-9s %d%s, %d at once", "trials", self.search.n_trials,
                 f", {ended} of them have ended before" if ended else "", self.runner.at_once)  # fmt: skip
        log.info("%-9s %s", "directory", self.ledger.directory)

    def _status(self, heard: list[int]) -> int:
        if signal.SIGINT in heard:
            return INTERRUPTED
        trials = self.ledger.trials.values()
        if any(trial.state not in TRIAL_END_STATES for trial in trials) or len(trials) < self.search.n_trials:
            return PREEMPTED
        statuses = {trial.status or DONE for trial in trials} - {PRUNED, DONE}
        return max((status if status in (CONFIG_ERROR, DIVERGED) else FAILED for status in statuses), default=DONE)

    def _summarise(self, status: int) -> None:
        trials = sorted(self.ledger.trials.values(), key=lambda trial: trial.number)
        counts = Counter(trial.state for trial in trials)
        if any(trial.state == "done" for trial in trials):
            report_sweep(self.ledger.directory)
        for trial in trials:
            if trial.state in FAILURES:  # in an earlier start of the sweep, too
                self.screen.ended(trial)
        log.info("%d trials: %s", self.search.n_trials, ", ".join(f"{n} {state}" for state, n in counts.items()))
        if status in (INTERRUPTED, PREEMPTED):
            log.info("The sweep goes on where it stopped with the same command.")
        elif any(trial.state in FAILURES for trial in trials):
            log.info("To run again what has failed: the same command with hydra.sweeper.retry=true hydra.sweep.dir=%s",
                     self.ledger.directory)  # fmt: skip


def _last_line(path: Path) -> str | None:
    """The last thing that a process said."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
