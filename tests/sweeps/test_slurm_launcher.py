"""Trials on SLURM, without a SLURM: what is a job's result, and which jobs are waited for."""

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
def test_the_result_of_a_job_is_the_exit_status_of_its_trial(monkeypatch, status):
    monkeypatch.setattr(worker, "run_job", lambda path: status)
    assert TrialJob(Path("job.json"))() == status


def test_a_mistake_is_a_result(monkeypatch, capsys):
    def refused(path):
        raise UserError("no data")

    monkeypatch.setattr(worker, "run_job", refused)
    assert TrialJob(Path("job.json"))() == CONFIG_ERROR
    assert "no data" in capsys.readouterr().err


def test_a_trial_that_was_stopped_leaves_no_result(monkeypatch):
    monkeypatch.setattr(worker, "run_job", lambda path: PREEMPTED)
    with pytest.raises(SystemExit, match=rf"^{PREEMPTED}$"):
        TrialJob(Path("job.json"))()


def test_nor_does_one_that_submitit_has_put_back_into_the_queue(monkeypatch):
    monkeypatch.setattr(worker, "run_job", lambda path: sys.exit(-1))  # as submitit's handler ends the process
    with pytest.raises(SystemExit, match=r"^-1$"):
        TrialJob(Path("job.json"))()


class Slurm:
    """Fakes of SLURM's programs on the PATH; ``queue`` sets the output of squeue."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        for name in ("squeue", "sbatch", "srun"):
            self.say(name, "exit 1")
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm_launcher, "POLL_SECONDS", 0.0)

    def say(self, name: str, line: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.folder / name).chmod(0o755)

    def queue(self, *rows: str) -> None:
        self.say("squeue", "; ".join(f"echo {row}" for row in rows) or "true")


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
@pytest.mark.parametrize("of_slurm", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED"])
def test_a_job_that_slurm_has_is_waited_for_whatever_the_sweep_thinks_of_it(trials, slurm, tmp_path, state, of_slurm):
    slurm.queue("6 RUNNING", f"7 {of_slurm}")
    assert trials.reattach(trial(state))
    assert trials.is_busy
    assert [trials.ended() for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("rows", [("7 CANCELLED",), ("7 TIMEOUT", "6 RUNNING"), ()])
def test_a_job_that_is_over_is_not(trials, slurm, tmp_path, rows):
    slurm.queue(*rows)
    assert not trials.reattach(trial())
    assert not trials.is_busy


def test_a_trial_without_a_job_is_not_asked_about(trials, tmp_path):
    assert not trials.reattach(trial(job=None))


def test_a_result_that_was_left_while_the_sweep_was_away_counts(trials, slurm, tmp_path):
    slurm.queue()
    leave_result(trials, tmp_path, DONE)
    assert trials.reattach(trial())
    assert trials.ended() == [(3, DONE)]
    assert not trials.reattach(trial("failed"))  # it is to be run again


def test_no_second_job_is_submitted_while_slurm_does_not_answer(trials, slurm, tmp_path):
    with pytest.raises(UserError, match=r"squeue failed.* whether job 7 of trial 3 is"):
        trials.reattach(trial())


def test_a_job_is_not_given_up_while_slurm_does_not_answer(trials, slurm, tmp_path):
    slurm.queue("7 RUNNING")
    assert trials.reattach(trial())
    slurm.say("squeue", "exit 1")
    assert [trials.ended() for _ in range(5)] == [[]] * 5
    slurm.queue()
    ended = [status for _ in range(3) for status in trials.ended()]
    assert ended == [(3, PREEMPTED)]


def test_what_slurm_says_of_a_job_that_it_does_not_take_is_told(trials, slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_launcher.Job, "write", lambda *_: None)
    slurm.say("sbatch", "echo the partition is full >&2; exit 1")
    with pytest.raises(UserError, match=r"rejected the job of trial 3: .*the partition is full"):
        trials.start(trial(), None, tmp_path / "3")
