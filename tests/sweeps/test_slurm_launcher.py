"""SlurmLauncher with fake SLURM programs: results of jobs, and which jobs are waited for."""

import os
import sys
from pathlib import Path

import pytest

from gptlab import worker
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DONE, FAILED, PREEMPTED
from gptlab.sweeps import slurm_launcher
from gptlab.sweeps.config import SlurmLauncherConfig
from gptlab.sweeps.slurm_launcher import SlurmLauncher, TrialJob
from gptlab.tracking.run_store.sweeps import Trial

CONFIG = {
    **{"at_once": 2, "timeout_min": 60, "signal_delay_s": 60, "max_num_timeout": 3, "nodes": 1, "tasks_per_node": 1},
    **{"cpus_per_task": None, "gpus_per_node": None, "mem_gb": None, "partition": None, "account": None, "qos": None},
    "additional_parameters": {},
}


@pytest.mark.parametrize("status", [DONE, FAILED])
def test_result_of_a_job_is_the_exit_code_of_its_trial(monkeypatch, status):
    monkeypatch.setattr(worker, "run_job", lambda path: status)
    assert TrialJob(Path("job.json"))() == status


def test_config_error_is_a_result(monkeypatch, capsys):
    def reject(path):
        raise UserError("no data")

    monkeypatch.setattr(worker, "run_job", reject)
    assert TrialJob(Path("job.json"))() == CONFIG_ERROR
    assert "no data" in capsys.readouterr().err


def test_preempted_trial_stores_no_result(monkeypatch):
    monkeypatch.setattr(worker, "run_job", lambda path: PREEMPTED)
    with pytest.raises(SystemExit, match=rf"^{PREEMPTED}$"):
        TrialJob(Path("job.json"))()


def test_trial_requeued_by_submitit_stores_no_result(monkeypatch):
    monkeypatch.setattr(worker, "run_job", lambda path: sys.exit(-1))  # as in submitit's signal handler
    with pytest.raises(SystemExit, match=r"^-1$"):
        TrialJob(Path("job.json"))()


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
        self.install("squeue", "; ".join(f"echo {row}" for row in rows) or "true")


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
    path.parent.mkdir(parents=True)
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
