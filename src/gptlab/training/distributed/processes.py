"""What the environment says of this process, before Lightning does. Imports no torch."""

import os

from gptlab.errors import UserError

MAX_PROCESSES_PER_CORE = 4  # beyond this, processes on a CPU only wait for each other
RENDEZVOUS = "GPTLAB_RENDEZVOUS"  # the file in which the workers of one machine find each other


def is_worker() -> bool:
    """Whether ``gptlab.launch.supervisor`` has started this process, as one of those of one machine."""
    return RENDEZVOUS in os.environ


def launched_externally() -> bool:
    """Whether torchrun or srun has started this process as one of several ranks."""
    return launched_by_torchrun() or launched_by_srun()


def launched_by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_by_srun() -> bool:
    """Whether this process is one of several that srun has started; an allocation alone starts none."""
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def external_devices() -> tuple[int, int]:
    """Processes a node and nodes, as torchrun or SLURM has them; UserError where the nodes have different numbers."""
    if launched_by_srun():
        processes, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
        if processes % nodes:
            raise UserError(f"srun has started {processes} tasks on {nodes} nodes: every node needs the same number.")
        return processes // nodes, nodes
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return devices, int(os.environ["WORLD_SIZE"]) // devices


def global_rank() -> int:
    """The number of this process among all of the run, by the variables of who has started it."""
    if is_worker() or launched_by_torchrun():
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if launched_by_srun() else 0


def is_first_rank() -> bool:
    """Whether this process is rank 0."""
    return global_rank() == 0
