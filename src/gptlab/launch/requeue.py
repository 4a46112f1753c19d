"""Requeues SLURM jobs, and finds the run that a restarted job or a trial of a sweep resumes. Imports no torch."""

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gptlab.config.locations import outputs_folder
from gptlab.config.resume import identity_changes, resume_as
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.files import read_regular
from gptlab.parsing import parse_json
from gptlab.tracking.environment import ENVIRONMENT
from gptlab.tracking.run_directory import has_checkpoint, load_config
from gptlab.tracking.run_store.runs import CONFIG
from gptlab.training.distributed.processes import is_first_rank, is_worker, torchrun_job

log = logging.getLogger(__name__)


def requeue_slurm_job() -> None:
    """Requeues the SLURM job of this process, once for all ranks; does nothing outside of SLURM."""
    if "SLURM_JOB_ID" not in os.environ or is_worker() or not is_first_rank():  # a worker's supervisor requeues the job
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
        log.warning("SLURM job %s cannot be requeued: %s", job, problem)
    else:
        log.info("SLURM job %s has been requeued and will resume the run automatically.", job)


def find_resumable_run(config: RunConfig, run_dir: Path | None) -> tuple[RunConfig, Path | None]:
    """Finds an earlier run to resume: that of the same trial of a sweep, or of this job before it was restarted.

    Args:
        config: Validated configuration.
        run_dir: Run directory assigned by a sweep, if any.

    Returns:
        The configuration, which resumes the earlier run if that has a checkpoint, and the run directory, or None
        for a new run without an assigned directory.

    Raises:
        UserError: ``run_dir`` contains a different run.
    """
    if config.resume:
        return config, run_dir
    if run_dir is not None and (run_dir / CONFIG).is_file() and has_checkpoint(run_dir):
        earlier = load_config(run_dir)
        if changes := identity_changes(config, earlier):
            raise UserError(
                f"{run_dir} contains a different run: {', '.join(changes)} would change. Use another hydra.sweep.dir "
                "or remove that directory."
            )
        return resume_as(config, run_dir, earlier), run_dir
    for earlier_dir in _runs_of_this_job(outputs_folder() / config.name):
        if not (earlier_dir / CONFIG).is_file():
            continue
        earlier = load_config(earlier_dir)
        if not identity_changes(config, earlier):
            return (resume_as(config, earlier_dir, earlier) if has_checkpoint(earlier_dir) else config), earlier_dir
    return config, run_dir


def _runs_of_this_job(folder: Path) -> Iterator[Path]:
    """Yields the run directories that this SLURM job, or call of torchrun, created before a restart, newest first."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0:
        key, job = "slurm_job", os.environ["SLURM_JOB_ID"]
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        key, job = "torchrun_job", torchrun_job() or ""
    else:
        return
    found = [*folder.glob(f"*/{ENVIRONMENT}"), *folder.glob(f"*/*/{ENVIRONMENT}")]  # of single runs and of trials
    for path in sorted(found, reverse=True):
        try:
            record = parse_json(read_regular(path))
        except (OSError, ValueError):  # incomplete: the job was killed while writing it
            continue
        if record.get(key) == job:
            yield path.parent
