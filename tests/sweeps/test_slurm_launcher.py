"""SlurmLauncher with fake SLURM programs: results of jobs, and which jobs are waited for."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptlab import worker
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, PREEMPTED
from gptlab.launch.signals import run_stoppable
from gptlab.sweeps import slurm_launcher
from gptlab.sweeps.config import SlurmLauncherConfig
from gptlab.sweeps.local_launcher import JOB
from gptlab.sweeps.slurm_launcher import SlurmLauncher, TrialJob
from gptlab.tracking.run_store.state import RunState
from gptlab.tracking.run_store.sweeps import Trial

CONFIG = {
    **{"at_once": 2, "timeout_min": 60, "signal_delay_s": 60, "max_num_timeout": 3, "nodes": 1, "tasks_per_node": 1},
    **{"cpus_per_task": None, "gpus_per_node": None, "mem_gb": None, "partition": None, "account": None, "qos": None},
    **{"setup": [], "use_srun": True, "additional_parameters": {}},
}


@pytest.fixture
def job(tmp_path, monkeypatch) -> TrialJob:
    """Job 7, which the sweep has recorded as that of trial 3."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    trial().save(tmp_path)
    return TrialJob(tmp_path / "3" / JOB)


@pytest.mark.parametrize("status", [DONE, FAILED])
def test_result_of_a_job_is_the_exit_code_of_its_trial(monkeypatch, job, status):
    monkeypatch.setattr(worker, "run_job", lambda path: status)
    assert job() == status


def test_config_error_is_a_result(monkeypatch, job, capsys):
    def reject(path):
        raise UserError("no data")

    monkeypatch.setattr(worker, "run_job", reject)
    assert job() == CONFIG_ERROR
    assert "no data" in capsys.readouterr().err


def test_preempted_trial_stores_no_result(monkeypatch, job):
    monkeypatch.setattr(worker, "run_job", lambda path: PREEMPTED)
    with pytest.raises(SystemExit, match=rf"^{PREEMPTED}$"):
        job()


def test_trial_requeued_by_submitit_stores_no_result(monkeypatch, job):
    monkeypatch.setattr(worker, "run_job", lambda path: sys.exit(-1))  # as in submitit's signal handler
    with pytest.raises(SystemExit, match=r"^-1$"):
        job()


@pytest.fixture
def requeue(monkeypatch) -> Iterator[list[int]]:
    """Installs a handler in place of submitit's; returns the signals for which it was called."""
    calls: list[int] = []
    earlier = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGUSR2, earlier)


@pytest.mark.parametrize("is_nested", [False, True], ids=["preparing data", "training"])
def test_signal_before_training_requeues_the_job_and_stores_no_result(monkeypatch, job, requeue, is_nested):
    """The worker processes of a preparation end with the signal. What the trial raises then is no failure."""

    def prepare(path):
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(10)
        finally:
            if not is_nested:
                raise UserError("A worker process was killed.")
        return DONE

    monkeypatch.setattr(
        worker, "run_job", (lambda path: run_stoppable(lambda: prepare(path))) if is_nested else prepare
    )
    with pytest.raises(SystemExit, match=rf"^{PREEMPTED}$"):
        job()
    assert requeue == [signal.SIGUSR2]


def test_trial_that_cannot_be_requeued_stores_no_result(monkeypatch, job, requeue):
    def run(path):
        subprocess.run(("scontrol", "requeue", "7"), check=True)

    slurm = Slurm(job.file.parent, monkeypatch)
    slurm.install("scontrol", "exit 1")
    monkeypatch.setattr(worker, "run_job", run)
    with pytest.raises(SystemExit, match=rf"^{PREEMPTED}$"):
        job()


@pytest.mark.parametrize("recorded", [None, "8"])
def test_job_that_its_sweep_did_not_record_does_not_run(monkeypatch, job, tmp_path, recorded):
    """The sweep was killed while it submitted the job. When it is run again, it submits another one."""
    monkeypatch.setattr(slurm_launcher, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(worker, "run_job", lambda path: pytest.fail("two jobs write one run directory"))
    trial(job=recorded).save(tmp_path)
    with pytest.raises(SystemExit, match=rf"^{PREEMPTED}$"):
        job()


def test_job_that_starts_before_it_is_recorded_waits(monkeypatch, job, tmp_path):
    trial(job=None).save(tmp_path)
    recording = threading.Timer(0.3, lambda: trial().save(tmp_path))
    recording.start()
    monkeypatch.setattr(worker, "run_job", lambda path: DONE)
    assert job() == DONE
    recording.join()


class Slurm:
    """Fake SLURM programs on the PATH; ``queue`` sets the output of squeue."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        for name in ("squeue", "sbatch", "srun"):
            self.install(name, "exit 1")
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm_launcher, "POLL_SECONDS", 0.0)

    def install(self, name: str, line: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.folder / name).chmod(0o755)

    def queue(self, *rows: str) -> None:
        """Sets the job IDs, states and reasons in the queue, separated by spaces; a reason may be missing."""
        lines = ("|".join([*row.split(maxsplit=2), ""][:3]) for row in rows)
        self.install("squeue", "; ".join(f"echo '{line}'" for line in lines) or "true")


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    return Slurm(tmp_path, monkeypatch)


@pytest.fixture
def trials(tmp_path, slurm) -> SlurmLauncher:
    return SlurmLauncher(SlurmLauncherConfig(**CONFIG), tmp_path)


def trial(state: str = "running", job: str | None = "7") -> Trial:
    return Trial(number=3, overrides={}, config_hash="", state=state, job=job)


def leave_result(trials: SlurmLauncher, folder: Path, status: int) -> None:
    import cloudpickle

    path = folder / slurm_launcher.FOLDER / "7" / "7_0_result.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cloudpickle.dumps(("success", status)))


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
@pytest.mark.parametrize("slurm_state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED"])
def test_active_job_is_reattached_in_any_trial_state(trials, slurm, tmp_path, state, slurm_state):
    slurm.queue("6 RUNNING", f"7 {slurm_state}")
    assert trials.reattach(trial(state))
    assert trials.is_busy
    assert [trials.ended() for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("rows", [("7 CANCELLED",), ("7 TIMEOUT", "6 RUNNING"), ()])
def test_ended_job_is_not_reattached(trials, slurm, tmp_path, rows):
    slurm.queue(*rows)
    assert not trials.reattach(trial())
    assert not trials.is_busy


def test_trial_without_a_job_is_not_reattached(trials, tmp_path):
    assert not trials.reattach(trial(job=None))


def test_result_stored_while_no_sweep_process_ran_is_used(trials, slurm, tmp_path):
    slurm.queue()
    leave_result(trials, tmp_path, DONE)
    assert trials.reattach(trial())
    assert trials.ended() == [(3, DONE)]
    assert not trials.reattach(trial("failed"))  # a retry


def test_failure_of_a_job_that_is_requeued_is_no_result(trials, slurm, tmp_path):
    slurm.queue("7 PENDING")
    leave_result(trials, tmp_path, CONFIG_ERROR)
    assert trials.reattach(trial())
    assert [trials.ended() for _ in range(5)] == [[]] * 5
    leave_result(trials, tmp_path, DONE)
    assert trials.ended() == [(3, DONE)]


@pytest.mark.parametrize("rows", [("7 FAILED",), ("7 COMPLETED",), ()])
def test_failure_of_a_job_that_ended_is_its_result(trials, slurm, tmp_path, rows):
    slurm.queue(*rows)
    leave_result(trials, tmp_path, DIVERGED)
    assert trials.reattach(trial())
    assert trials.ended() == [(3, DIVERGED)]


@pytest.mark.parametrize(
    ("state", "status", "expected"),
    [("done", DONE, DONE), ("failed", FAILED, FAILED), ("stopped", PREEMPTED, PREEMPTED), ("running", None, PREEMPTED)],
)
def test_record_of_the_run_decides_if_its_job_left_no_result(trials, slurm, tmp_path, caplog, state, status, expected):
    slurm.queue("7 RUNNING")
    assert trials.reattach(trial())
    (tmp_path / "3").mkdir()
    RunState(state=state, status=status, pid=os.getpid()).save(tmp_path / "3")
    slurm.queue("7 NODE_FAIL")
    assert [ended for _ in range(3) for ended in trials.ended()] == [(3, expected)]
    assert ("its state is NODE_FAIL" in caplog.text) == (expected == PREEMPTED)


@pytest.mark.parametrize("reason", ["JobHeldUser", "launch failed requeued held", "JobHoldMaxRequeue"])
def test_held_job_is_waited_for_and_reported_once(trials, slurm, tmp_path, caplog, reason):
    slurm.queue(f"7 PENDING {reason}")
    assert trials.reattach(trial())
    assert [trials.ended() for _ in range(5)] == [[]] * 5
    assert [f"({reason})" in message for message in caplog.messages] == [True]


def test_result_of_an_earlier_job_with_the_same_id_is_deleted(trials, slurm, tmp_path, monkeypatch):
    """A cluster that is set up again starts with job ID 1."""
    monkeypatch.setattr(slurm_launcher.Job, "write", lambda *_: None)
    slurm.install("sbatch", "echo Submitted batch job 7")
    slurm.queue("7 PENDING")
    leave_result(trials, tmp_path, DONE)
    assert trials.start(trial(job=None), None, tmp_path / "3").job == "7"
    assert trials.ended() == []


def test_reattach_raises_when_squeue_fails(trials, slurm, tmp_path):
    with pytest.raises(UserError, match=r"squeue failed.* whether job 7 of trial 3 is"):
        trials.reattach(trial())


def test_job_is_waited_for_while_squeue_fails(trials, slurm, tmp_path):
    slurm.queue("7 RUNNING")
    assert trials.reattach(trial())
    slurm.install("squeue", "exit 1")
    assert [trials.ended() for _ in range(5)] == [[]] * 5
    slurm.queue()
    ended = [status for _ in range(3) for status in trials.ended()]
    assert ended == [(3, PREEMPTED)]


def test_rejected_job_raises_with_the_reason(trials, slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_launcher.Job, "write", lambda *_: None)
    slurm.install("sbatch", "echo the partition is full >&2; exit 1")
    with pytest.raises(UserError, match=r"rejected the job of trial 3: .*the partition is full"):
        trials.start(trial(), None, tmp_path / "3")
