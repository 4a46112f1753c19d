"""A run that SLURM has asked to stop goes on in the same job. Imports no torch."""

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gptlab.tracking.environment import ENVIRONMENT
from gptlab.training.distributed.processes import is_first_rank, is_worker

log = logging.getLogger(__name__)


def requeue() -> None:
    """Put the job of this process back into the queue, once for all ranks; nothing outside of SLURM."""
    if "SLURM_JOB_ID" not in os.environ or is_worker() or not is_first_rank():  # a worker's supervisor does it
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(("scontrol", "requeue", job), capture_output=True, text=True, check=False)
        problem = done.stderr.strip()
    except OSError as error:
        problem = str(error)
    if problem:
        log.warning("SLURM job %s is not in the queue again: %s", job, problem)
    else:
        log.info("SLURM job %s is in the queue again, and goes on by itself.", job)


def runs_of_this_job(folder: Path) -> Iterator[Path]:
    """Yield the run directories in ``folder`` that this SLURM job made before it was requeued, the newest first."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        return
    found = [*folder.glob(f"*/{ENVIRONMENT}"), *folder.glob(f"*/*/{ENVIRONMENT}")]  # a run's own, or of a sweep
    for path in sorted(found, reverse=True):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # half written when the job was ended
            continue
        if record.get("slurm_job") == os.environ["SLURM_JOB_ID"]:
            yield path.parent
