"""Launcher that runs trials as concurrent processes on this machine, each with its own devices. Imports no torch.

Like the ranks of a run (``gptlab.launch.supervisor``), each process has its own session and ends when this one ends.
"""

import os
import signal
import time
from pathlib import Path
from subprocess import STDOUT
from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.exit_codes import FAILED, INTERRUPTED, PREEMPTED
from gptlab.files import open_append
from gptlab.launch.signals import block_signals
from gptlab.launch.supervisor import Job, Worker, count_gpus, start_worker
from gptlab.sweeps.config import LocalLauncherConfig
from gptlab.tracking.run_store.sweeps import Trial
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.processes import STOP_SIGNALS

JOB, OUTPUT = "job.json", "output.log"
GRACE = 20.0  # seconds between an interrupt and SIGKILL


class _Process(NamedTuple):
    process: Worker
    slot: int


class LocalLauncher:
    """Runs trials as processes on this machine.

    Args:
        config: Number of concurrent trials.
        trainer: Trainer config of the trials, which determines the number of devices per trial.
    """

    def __init__(self, config: LocalLauncherConfig, trainer: TrainerConfig) -> None:
        gpus = 0 if trainer.accelerator == "cpu" else count_gpus()
        need = trainer.devices if trainer.strategy != "single" else 1
        need = (gpus or 1) if need == "auto" else need
        fit = max(1, gpus // need)
        self.at_once = fit if config.at_once == "auto" else config.at_once
        # trials in excess of ``fit`` share devices
        self._devices = [range(slot % fit * need, (slot % fit + 1) * need) for slot in range(self.at_once)]
        self._has_gpus = gpus > 0
        self._running: dict[int, _Process] = {}
        self._since: float | None = None  # time of the interrupt
        self._stopped: set[int] = set()  # signals forwarded to trials

    @property
    def has_room(self) -> bool:
        """Whether another trial can start."""
        return len(self._running) < self.at_once and not self._stopped

    @property
    def is_busy(self) -> bool:
        """Whether a trial is running."""
        return bool(self._running)

    def start(self, trial: Trial, config: RunConfig, run_dir: Path) -> Trial:
        """Starts a trial in a new process, whose output is written to output.log in the run directory."""
        run_dir.mkdir(parents=True, exist_ok=True)
        Job(config, run_dir).write(run_dir / JOB)
        taken = {running.slot for running in self._running.values()}
        slot = next(slot for slot in range(self.at_once) if slot not in taken)
        # the worker unblocks the signals when it can handle them
        with block_signals(), open_append(run_dir / OUTPUT) as output:
            process = start_worker(run_dir / JOB, env=self.environment(slot), stdout=output, stderr=STDOUT)
        self._running[trial.number] = _Process(process, slot)
        return trial

    def reattach(self, trial: Trial) -> bool:
        """Returns False, because trial processes end with the sweep process that started them."""
        return False

    def ended(self) -> list[tuple[int, int]]:
        """Returns (trial number, exit code) of each trial that ended since the last call."""
        if self._since is not None and time.monotonic() - self._since > GRACE:
            self._signal(signal.SIGKILL)
        done = [
            (number, running.process) for number, running in self._running.items() if running.process.poll() is not None
        ]
        for number, process in done:
            assert process.stdin is not None  # noqa: S101
            process.stdin.close()
            del self._running[number]
        return [(number, self._status(process.returncode)) for number, process in done]

    def forward_signal(self, number: int) -> None:
        """Forwards a signal to all trials; ``GRACE`` seconds after an interrupt, trials that still run are killed."""
        self._stopped.add(number)
        if number == signal.SIGINT and self._since is None:
            self._since = time.monotonic()
        for running in self._running.values():
            running.process.send_signal(number)

    def close(self) -> None:
        """Kills the trials that are still running."""
        self._signal(signal.SIGKILL)
        for running in self._running.values():
            running.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for running in self._running.values():
            if running.process.poll() is None:
                os.killpg(running.process.pid, number)

    def _status(self, returned: int) -> int:
        """Converts a return code to an exit code. A forwarded signal counts as an interrupt or a preemption."""
        if returned >= 0:
            return returned
        if signal.SIGINT in self._stopped:
            return INTERRUPTED
        if -returned in self._stopped and -returned in STOP_SIGNALS:
            return PREEMPTED
        return 128 - returned if -returned in signal.valid_signals() else FAILED

    def environment(self, slot: int) -> dict[str, str]:
        """Returns the environment variables of the trial in a slot: its visible GPUs, or its share of the CPU cores."""
        variables = dict(os.environ)
        if self._has_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            numbers = self._devices[slot]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[n] if any(visible) else str(n) for n in numbers)
        elif self.at_once > 1:
            variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        return variables
