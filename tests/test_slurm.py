"""Runs on a real SLURM cluster: srun, requeued jobs, and sweeps whose trials are jobs."""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import assert_config_error, assert_same_run, assert_success, metrics
from faults import break_steps
from gptlab.exit_codes import CONFIG_ERROR, FAILED, PREEMPTED
from gptlab.training.checkpoints.records import checkpoint_step, list_checkpoints
from slurm_cluster import Cluster, unavailable_reason

pytestmark = pytest.mark.slow
SMALL = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=2", "train.eval_windows=4")
LONG = (*SMALL[:3], "train.max_steps=1000000", "train.eval_every=5", "train.eval_windows=4", "callbacks=checkpoint")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := unavailable_reason():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster, user) -> Cluster:
    user.environment["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    return cluster


def wait_for(condition, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def evaluated(directory: Path) -> int:
    """Returns the last evaluated step, or 0 while a resumed run rewrites its metrics."""
    try:
        return max(metrics(directory, "val/loss"), default=0)
    except FileNotFoundError:
        return 0


def submit(user, *arguments: str, options: str = "") -> str:
    """Submits a batch script that starts a run with srun; returns the job ID."""
    command = " ".join((sys.executable, "-m", "gptlab.train", *arguments))
    script = f"#!/bin/bash\n#SBATCH --output={user.folder}/job.log --open-mode=append --requeue {options}\n"
    (user.folder / "job.sh").write_text(f"{script}srun {command}\n")
    done = user.run("sbatch", "--parsable", "job.sh")
    assert_success(done)
    return done.stdout.strip()


def state(slurm: Cluster, job: str) -> str:
    return slurm.run("squeue", "--noheader", "--format=%T", f"--jobs={job}").stdout.strip()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_srun_starts_one_run(slurm, user, strategy):
    command = (sys.executable, "-m", "gptlab.train", f"trainer={strategy}", "name=srun", *SMALL)
    done = user.run("srun", "--ntasks=2", "--overcommit", *command, timeout=240)
    assert_success(done)
    assert list(metrics(user.only_run("srun"), "train/loss")) == [1, 2]
    assert done.stdout.count("tokens: 2 x") == 1
    assert json.loads((user.only_run("srun") / "environment.json").read_text())["slurm_job"]


def test_ranks_of_srun_print_an_error_once(slurm, user):
    command = (sys.executable, "-m", "gptlab.train", "trainer=ddp", "train.global_batch_size=7", *SMALL)
    done = user.run("srun", "--ntasks=2", "--overcommit", *command, timeout=240)
    assert done.returncode == CONFIG_ERROR
    assert done.stderr.count("is not divisible by") == 1
    assert not (user.folder / "outputs").exists()


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ("--ntasks=1", ("trainer=cpu",)),
        ("--ntasks=1", ("trainer=ddp", "trainer.devices=2")),
        ("--ntasks=2 --overcommit", ("trainer=ddp",)),
    ],
    ids=["one process", "two workers", "two ranks of srun"],
)
def test_a_signaled_job_is_requeued_and_resumed_in_the_same_directory(slurm, user, options, trainer):
    job = submit(user, *trainer, *LONG, options=options)
    wait_for(lambda: list(user.folder.glob("outputs/*/*/checkpoints/*")))
    directory = user.only_run()
    assert slurm.run("scancel", "--signal=USR1", job).returncode == 0  # as --signal=USR1@<seconds> does
    wait_for(lambda: (directory / "train.log").read_text().count("INFO model ") == 2)  # it was restarted
    assert "SLURM job" in (user.folder / "job.log").read_text()
    before = max(map(checkpoint_step, list_checkpoints(directory / "checkpoints")))
    wait_for(lambda: evaluated(directory) > before)
    steps = list(metrics(directory, "train/loss"))
    assert steps == sorted(set(steps))
    assert directory == user.only_run()
    slurm.run("scancel", job)
    wait_for(lambda: state(slurm, job) in ("", "CANCELLED", "COMPLETED", "FAILED"))  # SIGTERM ends it without a requeue
    assert directory == user.only_run()


SWEEP = ("-m", "hydra/launcher=slurm", "trainer=ddp", "trainer.devices=2")


def test_every_trial_of_a_sweep_is_one_job_with_one_directory(slurm, user):
    assert_success(user.python("gptlab.train", *SWEEP, "name=sweep", "seed=1,2,3", *SMALL, timeout=400))
    directory = user.only_run("sweep")
    trials = sorted(path for path in directory.iterdir() if path.is_dir() and path.name != ".submitit")
    assert [path.name for path in trials] == ["0", "1", "2"]
    assert [list(metrics(path, "train/loss")) for path in trials] == [[1, 2]] * 3
    numbers = {json.loads((path / "environment.json").read_text())["slurm_job"] for path in trials}
    assert len(numbers) == 3
    assert len({metrics(path, "train/loss")[2] for path in trials}) == 3


def test_a_failed_trial_sets_the_exit_code_of_the_sweep(slurm, user):
    break_steps(user, "if self.config.seed == 1: raise RuntimeError('broken')")
    done = user.python("gptlab.train", *SWEEP, "name=sweep", "seed=1,2", *SMALL, timeout=400)
    assert done.returncode == FAILED
    trials = [json.loads((user.only_run("sweep") / number / "trial.json").read_text()) for number in ("0", "1")]
    assert [trial["state"] for trial in trials] == ["failed", "done"]


@pytest.mark.parametrize("by", ["submitit", "SLURM"])
def test_a_sweep_waits_for_a_requeued_trial(slurm, user, by):
    """submitit requeues a job at its time limit, on SIGUSR2. SLURM requeues a preempted job."""
    length = ("train.max_steps=1500", "train.eval_every=100", "train.eval_windows=4", "callbacks=checkpoint")
    sweep = user.begin("gptlab.train", *SWEEP, "name=sweep", *SMALL[:3], *length)
    sweep.until(lambda: list(user.folder.glob("outputs/sweep/*/0/checkpoints/step_*")))
    directory = user.only_run("sweep") / "0"
    job = json.loads((directory / "environment.json").read_text())["slurm_job"]
    requeue = ("scancel", "--signal=USR2") if by == "submitit" else ("scontrol", "requeue")
    assert slurm.run(*requeue, job).returncode == 0
    wait_for(lambda: (directory / "train.log").read_text().count("INFO model ") == 2)  # the trial was restarted
    assert sweep.poll() is None
    assert json.loads((directory / "trial.json").read_text())["state"] == "running"
    done = sweep.ended(seconds=300)
    assert "failed" not in done.stdout + done.stderr
    trial = json.loads((directory / "trial.json").read_text())
    assert (trial["state"], trial["status"], trial["starts"], trial["job"]) == ("done", 0, 1, job)
    again = (directory / "train.log").read_text().split("INFO model ")[2]
    assert int(re.search(r"step +(\d+)/1500", again)[1]) > 100  # it was resumed
    assert list(metrics(directory, "val/loss")) == list(range(100, 1501, 100))


def test_a_restarted_sweep_adopts_the_running_jobs_of_a_killed_one(slurm, user):
    length = ("train.max_steps=300", "train.eval_every=5", "train.eval_windows=4")
    sweep = ("-m", "hydra/launcher=slurm", "name=sweep", "seed=1,2", *SMALL[:3], *length)
    run = user.begin("gptlab.train", *sweep)
    run.until(lambda: list(user.folder.glob("outputs/sweep/*/0/metrics.csv")))
    run.kill()
    run.ended(-signal.SIGKILL)
    jobs = [json.loads((user.only_run("sweep") / number / "trial.json").read_text())["job"] for number in ("0", "1")]
    assert_success(user.python("gptlab.train", *sweep, timeout=400))
    directory = user.only_run("sweep")
    found = [json.loads((directory / number / "trial.json").read_text()) for number in ("0", "1")]
    assert [(trial["state"], trial["starts"], trial["job"]) for trial in found] == [("done", 1, job) for job in jobs]
    assert [(directory / number / "train.log").read_text().count("INFO model ") for number in ("0", "1")] == [1, 1]


def requeue_job(slurm: Cluster, directory: Path, *command: str) -> None:
    """Requeues the job of a trial as soon as it has saved a checkpoint, and waits until SLURM has ended its process."""
    wait_for(lambda: list_checkpoints(directory / "checkpoints"))
    job = json.loads((directory / "trial.json").read_text())["job"]
    assert slurm.run(*command, job).returncode == 0
    wait_for(lambda: state(slurm, job) == "PENDING")


def test_killed_sweep_with_requeued_jobs_equals_single_runs(slurm, user):
    """One job is requeued by submitit, as at its time limit, the other by SLURM, while no process of the sweep runs."""
    length = ("train.max_steps=120", "train.eval_every=20", "train.eval_windows=4", "callbacks=checkpoint")
    small = ("trainer=cpu", *SMALL[:3], *length, "callbacks.checkpoint.every=20")
    sweep = ("-m", "name=sweep", "seed=1,2", "hydra/launcher=slurm", *small)
    break_steps(user, "import time; time.sleep(0.1)")  # no job ends before it is requeued
    run = user.begin("gptlab.train", *sweep)
    run.until(lambda: len(list(user.folder.glob("outputs/sweep/*/*/checkpoints"))) == 2)
    run.kill()
    run.ended(-signal.SIGKILL)
    directory = user.only_run("sweep")
    requeue_job(slurm, directory / "0", "scancel", "--signal=USR2")
    requeue_job(slurm, directory / "1", "scontrol", "requeue")
    assert_success(user.python("gptlab.train", *sweep, timeout=400))
    assert directory == user.only_run("sweep")
    for number in ("0", "1"):
        seed = int(number) + 1
        assert_success(user.python("gptlab.train", f"name=seed_{seed}", f"seed={seed}", *small))
        trial = json.loads((directory / number / "trial.json").read_text())
        assert (trial["state"], trial["starts"]) == ("done", 1)
        assert trial["value"] == min(metrics(user.only_run(f"seed_{seed}"), "val/loss").values())
        assert (directory / number / "train.log").read_text().count("INFO model ") == 2  # its job was restarted once
        assert_same_run(directory / number, user.only_run(f"seed_{seed}"))


@pytest.mark.parametrize("requeue", [("scontrol", "requeue"), ("scancel", "--signal=USR2")], ids=["SLURM", "submitit"])
def test_job_requeued_while_it_prepares_data_is_waited_for(slurm, user, requeue):
    """The processes that prepare data end with the signal, which is no failure of the trial."""
    text = user.folder / "text.txt"
    text.write_text(text.read_text() * 300)
    data = ("tokenizer=bpe", "tokenizer.train_mb=0.1", "data.task_bytes=100000", "data.val_fraction=0.1")
    sweep = user.begin("gptlab.train", "-m", "hydra/launcher=slurm", "trainer=cpu", "name=sweep", *SMALL, *data)
    sweep.until(lambda: list(user.folder.glob("cache/text-bpe-*/*.bin*")))
    job = json.loads((user.only_run("sweep") / "0" / "trial.json").read_text())["job"]
    assert slurm.run(*requeue, job).returncode == 0
    assert not list(user.folder.glob("cache/text-bpe-*/manifest.json"))  # it was preparing
    sweep.ended(seconds=300)
    trial = json.loads((user.only_run("sweep") / "0" / "trial.json").read_text())
    assert (trial["state"], trial["starts"], trial["job"]) == ("done", 1, job)


def test_canceled_job_is_reported_and_submitted_again(slurm, user):
    sweep = ("-m", "hydra/launcher=slurm", "trainer=cpu", "name=sweep", *LONG)
    run = user.begin("gptlab.train", *sweep)
    run.until(lambda: list(user.folder.glob("outputs/sweep/*/0/checkpoints/step_*")))
    directory = user.only_run("sweep") / "0"
    job = json.loads((directory / "trial.json").read_text())["job"]
    assert slurm.run("scancel", job).returncode == 0
    assert f"SLURM job {job} of trial 0 ended without a result; its state is CANCELLED" in run.ended(PREEMPTED).stdout
    assert json.loads((directory / "trial.json").read_text())["state"] == "stopped"
    run = user.begin("gptlab.train", *sweep)
    run.until(lambda: json.loads((directory / "trial.json").read_text())["job"] not in (None, job))
    assert json.loads((directory / "trial.json").read_text())["starts"] == 2
    run.kill()
    slurm.run("scancel", "--user=root")


def test_an_unknown_or_closed_partition_is_an_error(slurm, user):
    sweep = ("-m", "hydra/launcher=slurm", "seed=1,2", *SMALL)
    assert_config_error(
        user.python("gptlab.train", *sweep, "hydra.launcher.partition=gpu"), "no such partition. Available: tests"
    )
    assert slurm.run("scontrol", "update", "PartitionName=tests", "State=DOWN").returncode == 0
    try:
        assert_config_error(user.python("gptlab.train", *sweep), "accepts no jobs: its state is down")
    finally:
        slurm.run("scontrol", "update", "PartitionName=tests", "State=UP")
