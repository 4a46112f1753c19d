"""Runs of a proof, each in a separate process with its output in a log file. Imports no torch."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptlab.config.schema import RunConfig
from gptlab.launch.supervisor import Job, start_worker
from gptlab.terminal import get_console
from gptlab.tracking.run_directory import TRACE
from gptlab.tracking.run_store.runs import CHECKPOINTS
from gptlab.training.checkpoints.records import checkpoint_step, list_checkpoints, remove_checkpoint
from gptlab.verification.comparison import TraceStep, read_trace

log = logging.getLogger(__name__)

TAIL = 30  # printed lines of the output of a failed run
POLL = 0.02  # seconds


class RunFailed(Exception):  # noqa: N818  (a result of a proof)
    """Raised when a run of a proof fails.

    Attributes:
        tail: Last lines of its output.
    """

    def __init__(self, message: str, tail: str) -> None:
        super().__init__(message)
        self.tail = tail


class RunProcess:
    """Process that runs a validated configuration.

    Args:
        config: Configuration of the run.
        run_dir: Run directory, not used if the run resumes another.
        output: Log file for its output.
    """

    def __init__(self, config: RunConfig, run_dir: Path, output: Path) -> None:
        job = output.with_suffix(".json")
        Job(config, run_dir).write(job)
        self.process = start_worker(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._copying = threading.Thread(target=self._copy, args=(output,))
        self._copying.start()

    def kill(self) -> None:
        """Kills all processes of the run and waits for them to end.

        Its workers have their own sessions, and end when the standard input of the run is closed.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.stdin is not None  # noqa: S101
        self.process.stdin.close()
        self.process.wait()
        self._copying.join()

    def _copy(self, output: Path) -> None:
        """Copies the output of the run to the log file until its last process has ended."""
        assert self.process.stdout is not None  # noqa: S101
        with output.open("wb", buffering=0) as file, self.process.stdout as stdout:
            while data := os.read(stdout.fileno(), 2**16):
                file.write(data)


class ProofRuns:
    """Runs each named configuration once, in the run directory ``folder / name``.

    Args:
        folder: Parent directory of the run directories.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._known: dict[str, list[TraceStep] | RunFailed] = {}

    def run_dir(self, name: str) -> Path:
        """Returns the run directory of the run ``name``."""
        return self.folder / name

    def trace(self, name: str, config: RunConfig) -> list[TraceStep]:
        """Runs a configuration to the end and returns its trace; later calls with the same name return the same trace.

        Raises:
            RunFailed: The run failed.
        """
        if name not in self._known:
            try:
                self._known[name] = self._traced(name, config)
            except RunFailed as error:
                self._known[name] = error
        known = self._known[name]
        if isinstance(known, RunFailed):
            raise known
        return known

    def kill(self, name: str, config: RunConfig, after: int) -> Path:
        """Runs until step ``after`` is saved, kills all processes, and returns the run directory.

        Removes later checkpoints that were saved before the signal, so that the run resumes from that step.

        Raises:
            RunFailed: The run ended before it was killed.
        """
        folder, status = self.run_dir(name) / CHECKPOINTS, None
        with self._running(name, config) as run:
            while status is None and not any(checkpoint_step(saved) >= after for saved in list_checkpoints(folder)):
                status = run.process.poll()
                time.sleep(POLL)
        if status is not None:
            raise self._failed(name, status)
        for saved in list_checkpoints(folder):
            if checkpoint_step(saved) > after:
                remove_checkpoint(saved)
        return self.run_dir(name)

    def _traced(self, name: str, config: RunConfig) -> list[TraceStep]:
        with self._running(name, config) as run:
            status = run.process.wait()
        if status:
            raise self._failed(name, status)
        return read_trace((Path(config.resume) if config.resume else self.run_dir(name)) / TRACE)

    @contextmanager
    def _running(self, name: str, config: RunConfig) -> Iterator[RunProcess]:
        """Starts a run, and kills its processes at the end, also after an exception."""
        start = time.monotonic()
        with get_console().status(f"running: {name}"):
            run = RunProcess(config, self.run_dir(name), self._log(name))
            try:
                yield run
            finally:
                run.kill()
        log.info("run %-28s %5.1f s", name, time.monotonic() - start)

    def _failed(self, name: str, status: int) -> RunFailed:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        end = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        return RunFailed(f"run '{name}' {end}, see {self._log(name)}", "\n".join(lines[-TAIL:]))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"
