"""Worker processes, one for each device of this machine: started and watched from here. Imports no torch.

The workers find each other in a file and talk over the loopback interface. Each leads a session of its own: a
terminal's Ctrl-C reaches the supervisor alone, which forwards it, and what a worker has started is ended with it.
Their standard input is a pipe that closes when the supervisor ends, however that happens, and then they end, too.
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
from gptlab.exit_codes import DIVERGED, DONE, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.launch.signals import STOP_SIGNALS, StopSignals, block_signals
from gptlab.tracking.environment import COMMAND
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.processes import MAX_PROCESSES_PER_CORE, RENDEZVOUS

WORKER = "gptlab.worker"  # by name, as it is above this package
WORKER_COMMAND = (sys.executable, "-m", WORKER)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
COORDINATED = {DONE, PRUNED, PREEMPTED, DIVERGED}  # statuses all ranks agree on: each ends in its own time
GRACE_SECONDS = 5.0  # that workers have to end by themselves, and once more after SIGTERM
POLL_SECONDS = 0.05
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"

Worker = subprocess.Popen[bytes]


class Job(NamedTuple):
    """What a worker runs.

    Attributes:
        config: A validated configuration; of a rank, completed by ``preflight``.
        run_dir: The run directory; None names one by the time.
        plan: The batch plan, if it is known.
    """

    config: RunConfig
    run_dir: Path | None
    plan: BatchPlan | None = None

    def write(self, path: Path) -> None:
        """Writes a job file."""
        values = {
            "config": self.config.model_dump(mode="json"),
            "run_dir": self.run_dir and str(self.run_dir.absolute()),
            "plan": self.plan and self.plan._asdict(),
        }
        path.write_text(json.dumps(values), encoding="utf-8")


def read_job(path: Path) -> Job:
    """Reads a job file; the configuration, which was validated before, is taken as it is."""
    values = json.loads(path.read_text(encoding="utf-8"))
    run_dir = values["run_dir"] if "run_dir" in values else values["place"]  # a job that was queued before the renaming
    plan = values.get("plan")
    if plan:
        plan = BatchPlan(**plan | {"earlier": tuple(tuple(stage) for stage in plan["earlier"])})
    return Job(rebuild(RunConfig, values["config"]), run_dir and Path(run_dir), plan)


def start_worker(job_file: Path, **options: Any) -> Worker:
    """Starts a process that runs a job file, in a session of its own; it ends when its standard input is closed.

    Args:
        job_file: Written by ``Job.write``.
        options: Passed to ``subprocess.Popen``.
    """
    command = (*WORKER_COMMAND, str(job_file))
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **options)


def supervise(job: Job) -> int:
    """Runs a completed configuration in workers, and returns when none of them is left.

    Returns:
        DONE, PREEMPTED or INTERRUPTED; if workers have failed, the status of the first.
    """
    workers: list[Worker] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(number)

    signals = StopSignals(forward, (*STOP_SIGNALS, signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="gptlab-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        job.write(folder / "job.json")
        # at its end, the stack closes the workers' pipes and waits for them
        with signals, contextlib.ExitStack() as stack:
            count = _count_workers(job.config.trainer)
            with block_signals():  # until the workers can answer, and until all are there to receive them
                workers.extend(stack.enter_context(_start_rank(rank, count, folder)) for rank in range(count))
            try:
                status = _wait(workers, signals)
            finally:
                _signal_all(workers, signal.SIGKILL)
    signals.forward(status)
    return status


def exit_with_parent() -> None:
    """In a worker: ends its session as soon as the other end of its standard input is closed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _start_rank(rank: int, count: int, folder: Path) -> Worker:
    """Starts one of ``count`` workers, with the environment variables that Lightning and torch expect of a launcher."""
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
    """Waits for the workers; when one has failed or the user has interrupted, the others have to end soon."""
    failed, deadlines = None, [(GRACE_SECONDS, signal.SIGTERM), (2 * GRACE_SECONDS, signal.SIGKILL)]
    since: float | None = None
    while any([worker.poll() is None for worker in workers]):  # noqa: C419  (polls every one)
        statuses = {_exit_status(worker.returncode, signals) for worker in workers if worker.returncode is not None}
        if failed is None and (bad := statuses - COORDINATED):
            failed = max(bad)  # a signal that killed one comes before what the others made of that
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
    """Sends a signal to all workers and what they have started, which may outlive them."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)


def _exit_status(returned: int, signals: StopSignals) -> int:
    """Returns the exit status of a return code, as shells have it: 128 + n for a process that signal n has ended."""
    if -returned in STOP_SIGNALS and -returned in signals.poll():  # which came after its work, and before its end
        return PREEMPTED
    return returned if returned >= 0 else 128 - returned


def _count_workers(trainer: TrainerConfig) -> int:
    """Returns the number of devices; 1 if ``gptlab.training.devices.choose_devices`` will refuse the configuration."""
    if trainer.strategy == "single" or trainer.num_nodes > 1:
        return 1
    most = MAX_PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if trainer.devices != "auto" and trainer.devices <= most:
        return trainer.devices
    gpus = 0 if trainer.accelerator == "cpu" else count_gpus()
    if trainer.devices == "auto":
        return gpus or 1
    return trainer.devices if trainer.devices <= gpus else 1


@cache
def count_gpus() -> int:
    """Counts the GPUs that torch sees on this machine, in a process of its own."""
    return int(subprocess.run((sys.executable, "-c", COUNT_GPUS), stdout=subprocess.PIPE, check=True).stdout)
