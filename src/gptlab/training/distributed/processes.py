"""Rank and launcher of this process, read from environment variables, and its garbage collection. Imports no torch."""

import gc
import os
import platform
import signal
import sys
from pathlib import Path

from gptlab.errors import UserError

MAX_PROCESSES_PER_CORE = 4  # more processes on a CPU only wait for each other
MAX_PROCESSES = "GPTLAB_MAX_PROCESSES"  # environment variable: processes that are allowed on the CPU of a machine
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, AMD, and Windows Subsystem for Linux
RENDEZVOUS = "GPTLAB_RENDEZVOUS"  # environment variable: file through which the workers of one machine rendezvous

# Signals that preempt a run: SIGUSR1 and SIGUSR2 (submitit) come from schedulers before a job ends, and SIGHUP from a
# terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def collect_garbage_rarely() -> None:
    """Makes imports faster: those for training create 740,000 objects, and hardly any reference cycles.

    Training sets the intervals itself; see ``gptlab.training.callbacks.overhead.GarbageCollection``.
    """
    gc.set_threshold(100_000)  # new objects; the default is 700


def is_worker() -> bool:
    """Returns whether ``gptlab.launch.supervisor`` started this process as one of several workers on one machine."""
    return RENDEZVOUS in os.environ


def launched_externally() -> bool:
    """Returns whether torchrun or srun started this process as one of several ranks."""
    return launched_by_torchrun() or launched_by_srun()


def launched_by_torchrun() -> bool:
    """Returns whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_by_srun() -> bool:
    """Returns whether srun started this process as one of several tasks; being in an allocation is not enough."""
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def may_have_gpu() -> bool:
    """Returns whether this machine may have a GPU, without importing torch."""
    return sys.platform == "darwin" or any(Path(driver).exists() for driver in GPU_DRIVERS)


def max_cpu_processes() -> int:
    """Returns the number of processes that may train on the CPU of this machine.

    Raises:
        UserError: The environment variable is not a number.
    """
    most = os.environ.get(MAX_PROCESSES) or str(MAX_PROCESSES_PER_CORE * (os.cpu_count() or 1))
    if not most.isdecimal():
        raise UserError(f"{MAX_PROCESSES}={most} should be a number of processes.")
    return int(most)


def check_cpu_processes(processes: int, key: str = "trainer.devices") -> None:
    """Raises UserError if this machine has too few CPU cores for ``processes`` processes, which ``key`` asks for."""
    if processes > (most := max_cpu_processes()):
        raise UserError(
            f"{key}={processes}: this machine has no GPU and {os.cpu_count()} CPU cores. Use at most "
            f"{key}={most}, or set {MAX_PROCESSES}={processes} to try a larger number of processes."
        )


def is_restarted() -> bool:
    """Returns whether SLURM has requeued this job, or torchrun has restarted its processes."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) > 0 for name in ("SLURM", "TORCHELASTIC"))


def torchrun_job() -> str | None:
    """Returns what identifies this call of torchrun, also after it has restarted its processes; None without torchrun.

    torchrun has the same ID, "none", for all jobs on one machine that are not given one. There, all processes are
    children of the same agent.
    """
    if not launched_by_torchrun():
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{name} {platform.node()} {os.getppid()}" if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else name


def external_devices() -> tuple[int, int]:
    """Returns the processes per node and the number of nodes, as set by torchrun or SLURM.

    Raises:
        UserError: The nodes have different numbers of processes.
    """
    if launched_by_srun():
        processes, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
        if processes % nodes:
            raise UserError(
                f"srun started {processes} tasks on {nodes} nodes. Every node needs the same number of tasks."
            )
        return processes // nodes, nodes
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return devices, int(os.environ["WORLD_SIZE"]) // devices


def global_rank() -> int:
    """Returns the rank of this process in the run, from the variables of its launcher."""
    if is_worker() or launched_by_torchrun():
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if launched_by_srun() else 0


def is_first_rank() -> bool:
    """Returns whether this process is rank 0."""
    return global_rank() == 0
