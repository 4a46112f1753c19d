"""One worker process for each device of this machine, started and watched over from here. Imports no torch.

The workers find each other in a file and talk over the loopback interface. Each leads a session of its own: a
terminal's Ctrl-C comes to the supervisor alone, which hands it on, and what a worker has started is ended with it.
Their standard input is a pipe that closes with the supervisor, however that ends, and they with it.
"""

import contextlib
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

from gptlab.config.schema import Config
from gptlab.exit_codes import DIVERGED, DONE, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.launch.job_file import write_job
from gptlab.launch.signals import STOPS, Stops, held_back
from gptlab.tracking.environment import COMMAND
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.processes import MAX_PROCESSES_PER_CORE, RENDEZVOUS

WORKER = "gptlab.launch.worker"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
ORDERLY = {DONE, PRUNED, PREEMPTED, DIVERGED}  # of which all ranks know: they end together, each in its time
GRACE = 5.0  # seconds that workers have to end by themselves, and once more when they are told to
PAUSE = 0.05  # seconds between looks at them
COUNT = "import torch; print(torch.cuda.device_count())"

Worker = subprocess.Popen[bytes]


def supervise(config: Config, place: Path | None) -> int:
    """Run a complete configuration in workers, and return when none of them is left.

    Returns:
        DONE, PREEMPTED or INTERRUPTED; where workers have failed, the status of the first.
    """
    workers: list[Worker] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(number)

    stops = Stops(hand_on, (*STOPS, signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="gptlab-", ignore_cleanup_errors=True) as folder:
        write_job(Path(folder) / "job.json", config, place)
        # leaving, it closes the workers' pipes and waits for them
        with stops, contextlib.ExitStack() as stack:
            number = _number_of_workers(config.trainer)
            with held_back():  # until they can answer, and until all are there to hear
                workers.extend(stack.enter_context(_start(rank, number, folder)) for rank in range(number))
            try:
                status = _watch(workers, stops)
            finally:
                _signal_all(workers, signal.SIGKILL)
    stops.pass_on(status)
    return status


def end_with_supervisor() -> None:
    """In a worker: end this session as soon as the other end of standard input is closed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _start(rank: int, number: int, folder: str) -> Worker:
    """Start one of the workers; its variables are what Lightning and torch expect of a launcher."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(number),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        RENDEZVOUS: f"{folder}/rendezvous",
        COMMAND: os.environ.get(COMMAND) or shlex.join(sys.orig_argv),
    }
    return subprocess.Popen(
        (sys.executable, "-m", WORKER, f"{folder}/job.json"),
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _watch(workers: list[Worker], stops: Stops) -> int:
    """Wait for the workers; when one has failed or the user has interrupted, the others have to end soon."""
    failed, deadlines = None, [(GRACE, signal.SIGTERM), (2 * GRACE, signal.SIGKILL)]
    since: float | None = None
    while any([worker.poll() is None for worker in workers]):  # noqa: C419  (each is asked)
        statuses = {_status(worker.returncode, stops) for worker in workers if worker.returncode is not None}
        if failed is None and (bad := statuses - ORDERLY):
            failed = max(bad)  # a signal that killed one comes before what the others made of that
        if since is None and (failed is not None or signal.SIGINT in stops.listen()):
            since = time.monotonic()
        if since is not None and deadlines and time.monotonic() - since > deadlines[0][0]:
            _signal_all(workers, deadlines.pop(0)[1])
        time.sleep(PAUSE)
    statuses = {_status(worker.returncode, stops) for worker in workers}
    if signal.SIGINT in stops.listen():
        return INTERRUPTED
    return max(statuses) if failed is None else failed


def _signal_all(workers: list[Worker], number: int) -> None:
    """Send a signal to all workers and what they have started, which may be there still when they are not."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)


def _status(returned: int, stops: Stops) -> int:
    """Make an exit status of what a process returned, as shells do: 128 + n for one that signal n has ended."""
    if -returned in STOPS and -returned in stops.listen():  # which came after its work, and before its end
        return PREEMPTED
    return returned if returned >= 0 else 128 - returned


def _number_of_workers(trainer: TrainerConfig) -> int:
    """One for each device; one alone to refuse what cannot be (``gptlab.training.devices.choose_devices``)."""
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
    """Ask torch for the GPUs of this machine, in a process of its own."""
    return int(subprocess.run((sys.executable, "-c", COUNT), stdout=subprocess.PIPE, check=True).stdout)
