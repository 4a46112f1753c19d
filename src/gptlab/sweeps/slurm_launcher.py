"""Launcher that runs trials as SLURM jobs through submitit; the jobs outlive this process. Imports no torch."""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError, install_extra
from gptlab.exit_codes import DONE, FAILED, PREEMPTED, PRUNED, exit_status
from gptlab.files import open_regular
from gptlab.launch.signals import run_stoppable
from gptlab.launch.supervisor import WORKER, Job
from gptlab.parsing import unpickle_plain
from gptlab.sweeps.config import SlurmLauncherConfig
from gptlab.sweeps.local_launcher import JOB
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.sweeps import Trial, ended_status, read_trial

log = logging.getLogger(__name__)

FOLDER = ".submitit"
POLL_SECONDS = 5.0
SLURM_TIMEOUT = 60.0  # seconds to wait for squeue, whose own timeout (MessageTimeout) is 10 seconds by default
PATIENCE = 3  # consecutive squeue calls before a job without a result counts as ended
RECORD_SECONDS = 60.0  # seconds that a job waits for the sweep to record it, which takes milliseconds
HELD = re.compile("[Hh]eld|Hold")  # reason of a pending job, such as JobHeldUser or "launch failed requeued held"
UNKNOWN = "unknown to squeue"
ENDED_JOB_STATES = (
    UNKNOWN,
    "CANCELLED",
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


class TrialJob:
    """Callable that a SLURM job runs; submitit pickles it.

    Args:
        file: Job file of the trial.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> int:
        """Runs the trial and returns its exit code, which submitit stores as the result of the job.

        A preempted trial stores no result: SystemExit, raised by submitit's signal handler or by this method, ends the
        process. submitit or SLURM may requeue the job. Otherwise the sweep reads the job's state from squeue.

        Signals are handled from the beginning: processes that prepare data end with them, which is not a failure.
        """
        try:
            status = run_stoppable(lambda: exit_status(self._run))
        except subprocess.SubprocessError as error:
            if tuple(error.cmd)[:1] != ("scontrol",):  # type: ignore[attr-defined]
                raise
            log.warning("The job cannot be requeued, so the sweep must submit it again. %s", error)
            status = PREEMPTED
        if status == PREEMPTED:
            sys.exit(status)
        return status

    def checkpoint(self) -> Any:
        """Returns the submission that resumes the trial; submitit calls this when the job is preempted or times out."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _run(self) -> int:
        job, run_dir = os.environ["SLURM_JOB_ID"], self.file.parent
        if not self._is_recorded(job):
            log.warning(
                "SLURM job %s is not the one that the sweep recorded in %s. It ends without training.", job, run_dir
            )
            return PREEMPTED
        return int(import_module(WORKER).run_job(self.file))  # by name: the module is in a layer above this package

    def _is_recorded(self, job: str) -> bool:
        """Whether the sweep has recorded this job. If it was killed while submitting it, it submits another one."""
        until = time.monotonic() + RECORD_SECONDS
        while (trial := read_trial(Run(self.file.parent))) is None or trial.job != job:
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True


class SlurmLauncher:
    """Runs trials as SLURM jobs.

    Looks for the result file of a job (``JobPaths.result_pickle``, as in submitit 1.5.4) instead of calling submitit's
    ``Job.done``, which needs SLURM accounting (sacct). Many clusters do not have it. ``Job.result`` would also unpickle
    any object from the file, which may come from somebody else.

    Args:
        config: Resources of a job, and the number of concurrent jobs.
        folder: Sweep directory.
    """

    def __init__(self, config: SlurmLauncherConfig, folder: Path) -> None:
        import submitit

        self.at_once = config.at_once
        self._folder = folder
        self._logs = folder / FOLDER
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)  # jobs unpickle what is in it
        self._executor = submitit.AutoExecutor(
            folder=self._logs / "%j", cluster="slurm", slurm_max_num_timeout=config.max_num_timeout
        )
        resources = config.model_dump(exclude={"at_once", "max_num_timeout", "partition"}, exclude_none=True)
        general = ("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb")
        self._executor.update_parameters(
            name="gptlab",
            **{key if key in general else f"slurm_{key}": value for key, value in resources.items()},
            **({"slurm_partition": config.partition} if config.partition else {}),
        )
        self._running: dict[int, Any] = {}
        self._polls: dict[int, int] = {}  # consecutive squeue calls since the job of a trial ended
        self._logged: set[str] = set()  # jobs that failed or are held
        self._asked = 0.0
        self._reported = False
        self._warned = False
        self._stopped = False

    @property
    def has_room(self) -> bool:
        """Whether another trial can be submitted."""
        return len(self._running) < self.at_once and not self._stopped

    @property
    def is_busy(self) -> bool:
        """Whether the sweep is waiting for a job."""
        return bool(self._running) and not self._stopped

    def start(self, trial: Trial, config: RunConfig, run_dir: Path) -> Trial:
        """Submits a trial; raises UserError with the reason if SLURM rejects the job."""
        import submitit

        run_dir.mkdir(parents=True, exist_ok=True)
        Job(config, run_dir).write(run_dir / JOB)
        try:
            job = self._executor.submit(TrialJob(run_dir / JOB))
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"SLURM rejected the job of trial {trial.number}: {reason}") from None
        job.paths.result_pickle.unlink(missing_ok=True)  # of a job that had this ID before the cluster was set up again
        self._running[trial.number] = job
        return trial.model_copy(update={"job": str(job.job_id)})

    def reattach(self, trial: Trial) -> bool:
        """Reattaches to the job of a trial that an earlier process submitted; returns whether there is one.

        A job that is running or queued is reattached in any state of the trial. It may have been requeued by hand.

        Raises:
            UserError: squeue fails. Submitting again might start a second job in the same run directory.
        """
        import submitit

        if trial.job is None:
            return False
        job: Any = submitit.SlurmJob(folder=self._logs / "%j", job_id=trial.job)
        is_new_result = trial.state == "running" and job.paths.result_pickle.exists()  # otherwise, this is a retry
        if not is_new_result and not self._is_active(trial):
            return False
        self._running[trial.number] = job
        return True

    def _is_active(self, trial: Trial) -> bool:
        """Whether the job of a trial is running or queued."""
        for attempt in range(PATIENCE):
            if attempt:
                time.sleep(POLL_SECONDS)
            if (states := _states()) is not None:
                return states.get(str(trial.job), (UNKNOWN, ""))[0] not in ENDED_JOB_STATES
        raise UserError(
            f"hydra/launcher=slurm: squeue failed, so it is unknown whether job {trial.job} of trial {trial.number} is "
            "still running. Run the same command again when squeue works."
        )

    def ended(self) -> list[tuple[int, int]]:
        """Returns (trial number, exit code) of each trial that ended since the last call.

        A trial that failed ends with its job, which SLURM may requeue.
        """
        results = {number: self._result(job) for number, job in self._running.items()}
        ended = [(number, status) for number, status in results.items() if status in (DONE, PRUNED)]
        if not ended and time.monotonic() - self._asked >= POLL_SECONDS:
            ended = [(number, self._status(number, results[number], state)) for number, state in self._gone().items()]
        for number, _ in ended:
            del self._running[number]
        return ended

    def forward_signal(self, number: int) -> None:
        """Stops waiting for the jobs, which keep running."""
        self._stopped = True

    def close(self) -> None:
        """Logs which jobs keep running."""
        if self._running and not self._reported:
            self._reported = True
            jobs = " ".join(str(job.job_id) for job in self._running.values())
            log.info(
                "%d SLURM jobs keep running. To wait for them, run the same command again. To cancel them: scancel %s",
                len(self._running),
                jobs,
            )

    def _gone(self) -> dict[int, str]:
        """Returns the trials whose jobs have ended, with the SLURM states of the jobs."""
        self._asked = time.monotonic()
        if (states := _states()) is None:
            if not self._warned:
                log.warning("hydra/launcher=slurm: squeue failed. The sweep keeps waiting for its jobs.")
            self._warned = True
            return {}
        self._warned = False
        gone = {}
        for number, job in self._running.items():
            state, reason = states.get(str(job.job_id), (UNKNOWN, ""))
            if state == "PENDING" and HELD.search(reason):
                self._warn_once(
                    job, "is held (%s), so its trial waits. To release it: scontrol release %s", reason, job.job_id
                )
            self._polls[number] = self._polls.get(number, 0) + 1 if state in ENDED_JOB_STATES else 0
            if self._polls[number] >= (1 if job.paths.result_pickle.exists() else PATIENCE):
                gone[number] = state
        return gone

    def _status(self, number: int, result: int | None, state: str) -> int:
        """Returns the exit code of a trial whose job has ended: its result, or what its run recorded."""
        if result is not None:
            return result
        job = self._running[number]
        if (recorded := ended_status(self._folder / str(number))) is not None:
            return recorded
        log.warning(
            "SLURM job %s of trial %d ended without a result; its state is %s. See %s.",
            *(job.job_id, number, state, job.paths.stderr),
        )
        return PREEMPTED  # canceled, or its node failed: it can be resumed

    def _result(self, job: Any) -> int | None:
        """Returns the exit code in the result file of a job; None if there is no file, FAILED for an exception.

        The file is a pickle of ("success", exit code) or ("error", traceback).
        """
        path = job.paths.result_pickle
        if not path.exists():
            return None
        try:
            with open_regular(path) as file:
                outcome, result = unpickle_plain(file.read())
            if outcome == "success":
                return int(result)
        except Exception as error:  # a damaged pickle can raise any exception
            result = f"{path} cannot be read: {error}"
        self._warn_once(job, "failed: %s", str(result).strip().splitlines()[-1])
        return FAILED

    def _warn_once(self, job: Any, message: str, *values: str) -> None:
        if job.job_id not in self._logged:
            log.warning(f"SLURM job %s {message}", job.job_id, *values)
        self._logged.add(job.job_id)


def _states() -> dict[str, tuple[str, str]] | None:
    """Returns (state, reason) of this user's jobs by job ID, or None if squeue fails.

    squeue lists ended jobs for a while (``MinJobAge``). It is called for all jobs of the user, because for a single job
    the error of an expired job ID cannot be distinguished from that of an unreachable controller.
    """
    command = ("squeue", "--noheader", "--states=all", "--format=%i|%T|%r", f"--user={os.getuid()}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SLURM_TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def check_cluster(config: SlurmLauncherConfig) -> None:
    """Raises UserError if submitit or SLURM is not installed, or if the partition does not exist or accepts no jobs."""
    if find_spec("submitit") is None:
        raise UserError(f"hydra/launcher=slurm needs the submitit package: {install_extra('slurm')}")
    partition = config.partition
    if shutil.which("sbatch") is None:
        raise UserError("hydra/launcher=slurm: SLURM is not installed on this machine (sbatch is not on the PATH).")
    done = subprocess.run(("sinfo", "--noheader", "--format=%R %a %P"), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"hydra/launcher=slurm: sinfo failed: {' '.join(done.stderr.split())}")
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 3]
    names = sorted({name for name, _, _ in rows})
    asked = [state for name, state, starred in rows if name == partition or (not partition and starred.endswith("*"))]
    if partition and not asked:
        raise UserError(
            f"hydra.launcher.partition={partition}: SLURM has no such partition. Available: {', '.join(names)}."
        )
    if asked and not any(state == "up" for state in asked):
        raise UserError(
            f"hydra.launcher.partition={partition or 'null (the default partition)'} accepts no jobs: its state is "
            f"{asked[0]}. Choose another partition: hydra.launcher.partition=<name>"
        )
