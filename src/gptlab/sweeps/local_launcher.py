"""Trials in processes of this machine, so many at once, each with devices of its own. Imports no torch.

As the ranks of a run (``gptlab.launch.supervisor``), each process leads a session of its own, and ends with this one.
"""

import os
import signal
import time
from pathlib import Path
from subprocess import STDOUT
from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.exit_codes import FAILED, INTERRUPTED, PREEMPTED
from gptlab.launch.signals import STOP_SIGNALS, block_signals
from gptlab.launch.supervisor import Job, Worker, count_gpus, start_worker
from gptlab.sweeps.config import LocalLauncherConfig
from gptlab.tracking.run_store.sweeps import Trial
from gptlab.training.config import TrainerConfig

JOB, OUTPUT = "job.json", "output.log"
GRACE = 20.0  # seconds that trials have to end by themselves when the sweep is interrupted


class _Process(NamedTuple):
    process: Worker
    slot: int


class LocalLauncher:
    """Runs trials in processes.

    Args:
        config: How many at once.
        trainer: Of the sweep's trials, which says how many devices each needs.
    """

    def __init__(self, config: LocalLauncherConfig, trainer: TrainerConfig) -> None:
        gpus = 0 if trainer.accelerator == "cpu" else count_gpus()
        need = trainer.devices if trainer.strategy != "single" else 1
        need = (gpus or 1) if need == "auto" else need
        fit = max(1, gpus // need)
        self.at_once = fit if config.at_once == "auto" else config.at_once
        # beyond what fits, trials share devices
        self._devices = [_listed(range(slot % fit * need, (slot % fit + 1) * need)) for slot in range(self.at_once)]
        self._has_gpus = gpus > 0
        self._running: dict[int, _Process] = {}
        self._since: float | None = None  # the sweep was interrupted
        self._stopped: set[int] = set()  # signals that were handed on

    @property
    def has_room(self) -> bool:
        """Whether another trial can begin."""
        return len(self._running) < self.at_once and not self._stopped

    @property
    def is_busy(self) -> bool:
        """Whether a trial is under way."""
        return bool(self._running)

    def start(self, trial: Trial, config: RunConfig, run_dir: Path) -> Trial:
        """Start a trial in its place; what it prints goes to output.log there."""
        run_dir.mkdir(parents=True, exist_ok=True)
        Job(config, run_dir).write(run_dir / JOB)
        taken = {running.slot for running in self._running.values()}
        slot = next(slot for slot in range(self.at_once) if slot not in taken)
        with block_signals(), (run_dir / OUTPUT).open("ab") as output:  # until it can answer
            process = start_worker(run_dir / JOB, env=self.environment(slot), stdout=output, stderr=STDOUT)
        self._running[trial.number] = _Process(process, slot)
        return trial

    def reattach(self, trial: Trial, run_dir: Path) -> bool:
        """Whether a trial of an earlier start goes on by itself: processes end with their sweep."""
        return False

    def ended(self) -> list[tuple[int, int]]:
        """Return (number, exit status) of the trials that have ended since the last time."""
        if self._since is not None and time.monotonic() - self._since > GRACE:
            self._signal(signal.SIGKILL)
        done = [(number, running.process) for number, running in self._running.items() if _has_ended(running.process)]
        for number, process in done:
            assert process.stdin is not None  # noqa: S101
            process.stdin.close()
            del self._running[number]
        return [(number, self._status(process.returncode)) for number, process in done]

    def forward_signal(self, number: int) -> None:
        """Tell the trials of a signal; an interrupt gives them little time."""
        self._stopped.add(number)
        if number == signal.SIGINT and self._since is None:
            self._since = time.monotonic()
        for running in self._running.values():
            running.process.send_signal(number)

    def close(self) -> None:
        """End what is left."""
        self._signal(signal.SIGKILL)
        for running in self._running.values():
            running.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for running in self._running.values():
            if running.process.poll() is None:
                os.killpg(running.process.pid, number)

    def _status(self, returned: int) -> int:
        """Make an exit status of what a process returned; one that a signal of ours has ended was stopped by it."""
        if returned >= 0:
            return returned
        if signal.SIGINT in self._stopped:
            return INTERRUPTED
        if -returned in self._stopped and -returned in STOP_SIGNALS:
            return PREEMPTED
        return 128 - returned if -returned in signal.valid_signals() else FAILED

    def environment(self, slot: int) -> dict[str, str]:
        """The variables of the trial in a slot: its devices, or its share of the cores."""
        variables = dict(os.environ)
        if self._has_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            numbers = self._devices[slot].split(",")
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[int(n)] if any(visible) else n for n in numbers)
        elif self.at_once > 1:
            variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        return variables


def _has_ended(process: Worker) -> bool:
    return process.poll() is not None


def _listed(numbers: range) -> str:
    return ",".join(map(str, numbers))
