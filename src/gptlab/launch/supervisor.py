"""Supervisor of worker processes, one per device of this machine. Imports no torch.

Workers rendezvous through a file and communicate over the loopback interface. Each leads its own session, so that
Ctrl-C in the terminal reaches only the supervisor, which forwards it, and so that the child processes of a worker end
with it. Their standard input is a pipe. It closes when the supervisor ends for any reason, and the workers then exit.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gptlab.config.base import rebuild
from gptlab.config.schema import RunConfig
from gptlab.config.trust import check_trusted
from gptlab.exit_codes import DIVERGED, DONE, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.files import read_regular, write_file
from gptlab.launch.signals import StopSignals, block_signals
from gptlab.parsing import parse_json
from gptlab.tracking.environment import COMMAND
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.processes import RENDEZVOUS, STOP_SIGNALS, max_cpu_processes

WORKER = "gptlab.worker"  # by name, since it is in a layer above this package
WORKER_COMMAND = (sys.executable, "-m", WORKER)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
COORDINATED = {DONE, PRUNED, PREEMPTED, DIVERGED}  # exit codes that all ranks return together
GRACE_SECONDS = 5.0  # grace period before SIGTERM, and again before SIGKILL
POLL_SECONDS = 0.05
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"

Worker = subprocess.Popen[bytes]


class Job(NamedTuple):
    """Input of a worker process.

    Attributes:
        config: Validated configuration; for a rank, completed by ``preflight``.
        run_dir: Run directory; None creates ``outputs/<name>/<time>``.
        plan: Batch plan, if it is known.
    """

    config: RunConfig
    run_dir: Path | None
    plan: BatchPlan | None = None

    def write(self, path: Path) -> None:
        """Writes the job file at ``path``, as JSON."""
        values = {
            "config": self.config.model_dump(mode="json"),
            "run_dir": self.run_dir and str(self.run_dir.absolute()),
            "plan": self.plan and self.plan._asdict(),
        }
        write_file(path, json.dumps(values))


def read_job(path: Path) -> Job:
    """Reads a job file; its configuration is not validated again. Raises UserError if a component is not trusted."""
    values = parse_json(read_regular(path))
    check_trusted(values["config"], path)
    run_dir = values["run_dir"] if "run_dir" in values else values["place"]  # a job queued by an earlier version
    plan = values.get("plan")
    if plan:
        stages = {key: tuple(map(tuple, plan.get(key, ()))) for key in ("earlier", "past")}
        plan = BatchPlan(**plan | stages)
    return Job(rebuild(RunConfig, values["config"]), run_dir and Path(run_dir), plan)


def start_worker(job_file: Path, **options: Any) -> Worker:
    """Starts a process that runs a job file, in its own session.

    Args:
        job_file: File written by ``Job.write``.
        options: Keyword arguments of ``subprocess.Popen``.

    Returns:
        The process. It exits when its standard input is closed.
    """
    command = (*WORKER_COMMAND, str(job_file))
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **options)


def supervise(job: Job) -> int:
    """Runs a completed configuration in workers, and returns when all of them have ended.

    Returns:
        The exit code: DONE, PREEMPTED or INTERRUPTED, or that of the first worker that failed.
    """
    workers: list[Worker] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(number)

    signals = StopSignals(forward, (*STOP_SIGNALS, signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="gptlab-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        job.write(folder / "job.json")
        # on exit, the stack closes the workers' pipes and waits for them
        with signals, contextlib.ExitStack() as stack:
            count = _count_workers(job.config.trainer)
            with block_signals():  # until all workers have started: ``forward`` must reach all of them
                workers.extend(stack.enter_context(_start_rank(rank, count, folder)) for rank in range(count))
            try:
                status = _wait(workers, signals)
            finally:
                _signal_all(workers, signal.SIGKILL)
    signals.forward(status)
    return status


def exit_with_parent() -> None:
    """Ends this worker's session as soon as the supervisor's end of its standard input is closed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _start_rank(rank: int, count: int, folder: Path) -> Worker:
    """Starts one of ``count`` workers, with the environment variables that Lightning and torch expect."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        RENDEZVOUS: f"{folder}/rendezvous",
        COMMAND: os.environ.get(COMMAND) or shlex.join(sys.orig_argv),
    }
    return start_worker(folder / "job.json", env=os.environ | variables)


def _wait(workers: list[Worker], signals: StopSignals) -> int:
    """Waits for the workers; terminates the remaining ones after a grace period if one fails or on SIGINT."""
    failed, deadlines = None, [(GRACE_SECONDS, signal.SIGTERM), (2 * GRACE_SECONDS, signal.SIGKILL)]
    since: float | None = None
    while any([worker.poll() is None for worker in workers]):  # noqa: C419  (polls all of them)
        statuses = {_exit_status(worker.returncode, signals) for worker in workers if worker.returncode is not None}
        if failed is None and (bad := statuses - COORDINATED):
            failed = max(bad)  # a killed worker (128 + n) takes precedence over the errors it caused in others
        if since is None and (failed is not None or signal.SIGINT in signals.poll()):
            since = time.monotonic()
        if since is not None and deadlines and time.monotonic() - since > deadlines[0][0]:
            _signal_all(workers, deadlines.pop(0)[1])
        time.sleep(POLL_SECONDS)
    statuses = {_exit_status(worker.returncode, signals) for worker in workers}
    if signal.SIGINT in signals.poll():
        return INTERRUPTED
    return max(statuses) if failed is None else failed


def _signal_all(workers: list[Worker], number: int) -> None:
    """Sends a signal to all workers and to their child processes, which may outlive them."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)


def _exit_status(returned: int, signals: StopSignals) -> int:
    """Returns the exit code for a return code, as in shells: 128 + n for a process ended by signal n."""
    if -returned in STOP_SIGNALS and -returned in signals.poll():  # arrived between the end of training and the exit
        return PREEMPTED
    return returned if returned >= 0 else 128 - returned


def _count_workers(trainer: TrainerConfig) -> int:
    """Returns the number of devices, or 1 if ``gptlab.training.devices.choose_devices`` will raise an error."""
    if trainer.strategy == "single" or trainer.num_nodes > 1:
        return 1
    if trainer.devices != "auto" and trainer.devices <= max_cpu_processes():
        return trainer.devices
    gpus = 0 if trainer.accelerator == "cpu" else count_gpus()
    if trainer.devices == "auto":
        return gpus or 1
    return trainer.devices if trainer.devices <= gpus else 1


@cache
def count_gpus() -> int:
    """Returns the number of GPUs that torch sees on this machine, counted in a child process."""
    return int(subprocess.run((sys.executable, "-c", COUNT_GPUS), stdout=subprocess.PIPE, check=True).stdout)
