"""What the environment says of this process, before Lightning does."""

import os


def started_from_outside() -> bool:
    """Whether torchrun or srun has started this process as one of several ranks."""
    on_slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ
    return "TORCHELASTIC_RUN_ID" in os.environ or on_slurm


def is_first_rank() -> bool:
    """Whether this process is rank 0, asked before Lightning knows: by torchrun's, Lightning's or SLURM's variables."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0
    return int(rank) == 0
