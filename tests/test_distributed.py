"""Several processes: one run, one directory, and the numbers of one process."""

import sys

import pytest

from test_train import metrics, ran

TWO = ("trainer.devices=2",)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_compute_what_one_does(user, strategy):
    ran(user.train("name=one"))
    ran(user.train("name=two", f"trainer={strategy}", *TWO, "train.micro_batch_size=2"))
    one, two = user.only_run("one"), user.only_run("two")  # only_run: there is one directory each
    for name in ("train/loss", "val/loss"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), abs=1e-5), name
    assert metrics(two, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), abs=1e-4)
    assert (two / "samples" / "step_000006.txt").exists()
    sampled = user.python("gptlab.sample", f"run={two}", "max_new_tokens=5")
    ran(sampled)


@pytest.mark.slow  # a sharded resume is in test_resume, too
def test_a_sharded_run_goes_on_bit_for_bit(user):
    same = ("trainer=fsdp", *TWO, "schedule.decay_steps=9")
    ran(user.train("name=whole", "train.max_steps=9", *same))
    ran(user.train("name=halted", "train.max_steps=6", *same))
    whole, halted = user.only_run("whole"), user.only_run("halted")
    ran(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9"))
    assert metrics(halted, "train/loss") == metrics(whole, "train/loss")


def test_torchrun_starts_one_run(user):
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "gptlab.train", "trainer=ddp")
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=2", "train.eval_windows=4")
    done = user.run(*command, *small, "name=torchrun")
    ran(done)
    assert list(metrics(user.only_run("torchrun"), "train/loss")) == [1, 2]
    assert done.stdout.count("2 device(s) x") == 1


def test_a_sweep_over_processes_runs_each_job_once(user):
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=2", "train.eval_windows=4")
    done = user.python("gptlab.train", "-m", "name=sweep", "trainer=ddp", "trainer.devices=1,2", *small)
    ran(done)
    directory = user.only_run("sweep")
    jobs = [directory / "0", directory / "1"]
    assert sorted(path for path in directory.iterdir() if path.is_dir()) == jobs
    assert metrics(jobs[0], "train/loss") == pytest.approx(metrics(jobs[1], "train/loss"), abs=1e-5)
    assert done.stdout.count("of the sweep:") == 2
