"""What the environment says of this process, before Lightning does. Imports no torch."""

import os


def started_from_outside() -> bool:
    """Whether torchrun or srun has started this process as one of several ranks."""
    return under_torchrun() or on_slurm()


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_slurm() -> bool:
    """Whether this process is one of several that srun has started."""
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ


def devices_from_outside() -> tuple[int, int]:
    """Processes a node and nodes, as torchrun or SLURM has them."""
    if on_slurm():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return devices, int(os.environ["WORLD_SIZE"]) // devices


def is_first_rank() -> bool:
    """Whether this process is rank 0, by torchrun's, Lightning's or SLURM's variables."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0
    return int(rank) == 0
