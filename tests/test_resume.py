"""A run that goes on is the run it was: on other devices, in another place, to another length."""

import os
import shutil
import signal

import pytest
import yaml

from gptlab.experiments.exits import MISTAKEN
from test_faults import newest_state, same_run
from test_train import metrics, mistaken, ran


@pytest.mark.parametrize(
    "change",
    [
        ("train.micro_batch_size=3",),
        pytest.param(("trainer=ddp", "trainer.devices=2"), marks=pytest.mark.slow),
        pytest.param(("trainer=fsdp", "trainer.devices=2", "train.micro_batch_size=2"), marks=pytest.mark.slow),
    ],
    ids=["smaller micro-batches", "two processes", "sharded"],
)
def test_the_batches_and_losses_are_the_same_however_it_goes_on(user, halted, change):
    ran(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9", *change))
    whole = user.only_run("whole")
    for name in ("train/loss", "val/loss"):
        assert metrics(halted, name) == pytest.approx(metrics(whole, name), abs=1e-5), name
    assert yaml.safe_load((halted / "config.yaml").read_text())["train"]["max_steps"] == 9  # what is true from here on


@pytest.mark.slow
@pytest.mark.parametrize("change", [(), ("trainer=fsdp", "trainer.devices=2")], ids=["as it was", "sharded"])
def test_so_it_is_with_muon(user, runs, change):
    same = ("optimizer=muon", "optimizer.ns_dtype=float32", "schedule.decay_steps=9", "callbacks=checkpoint")
    for name, steps in (("whole", 9), ("halted", 6)):
        runs.give(user, f"{name}_muon", f"train.max_steps={steps}", *same)
    whole, halted = (user.only_run(f"{name}_muon") for name in ("whole", "halted"))
    ran(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9", *change))
    if not change:
        same_run(whole, halted)
    for name in ("train/loss", "val/loss"):
        assert metrics(halted, name) == pytest.approx(metrics(whole, name), abs=1e-5), name
    (optimizer,) = newest_state(halted)["optimizer_states"]
    kept = {name: set(moments) for name, moments in optimizer["state"].items()}
    assert kept["h.1.mlp.c_fc.weight"] == {"momentum_buffer"}
    assert kept["wte.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert len(kept) == 28  # all parameters of two blocks, by GPT-2's names


@pytest.mark.slow
def test_a_moved_run_keeps_its_best(user, halted):
    moved = user.folder / "moved"
    shutil.copytree(halted, moved)
    (best,) = moved.glob("checkpoints/step_000006/state.pt")
    # a rate at which the next evaluations are worse
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["optimizer"]["lr"] = 5.0
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    ran(user.python("gptlab.train", f"resume={moved}", "train.max_steps=12"))
    values = metrics(moved, "val/loss")
    assert values[12] > values[6]
    assert best.exists()
    assert [path.name for path in sorted(moved.glob("checkpoints/*"))] == [f"step_0000{n}" for n in ("06", "09", "12")]


@pytest.mark.slow
def test_a_run_from_other_weights_goes_on_and_a_shorter_block_takes_them(user, halted):
    ran(user.train("name=second", f"init_from={halted}", "model.block_size=16", "train.max_steps=3"))
    second = user.only_run("second")
    ran(user.python("gptlab.train", f"resume={second}", "train.max_steps=6"))
    assert list(metrics(second, "val/loss")) == [3, 6]


def test_a_refused_resume_leaves_the_metrics_alone(user, halted):
    before = (halted / "metrics.csv").read_text()
    done = user.python("gptlab.train", f"resume={halted}", "train.max_steps=9", "trainer=gpu")
    assert done.returncode == MISTAKEN
    assert (halted / "metrics.csv").read_text() == before


@pytest.mark.slow
def test_groups_and_lengths_that_the_run_did_not_have_can_be_named(user, halted):
    named = ("callbacks=default", "callbacks.samples.num_samples=2", "train.max_steps=null", "train.max_tokens=2700")
    ran(user.python("gptlab.train", f"resume={halted}", *named))
    assert max(metrics(halted, "tokens")) == 8  # 384 tokens a step
    ran(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9"))
    assert max(metrics(halted, "tokens")) == 9


def test_a_killed_worker_is_no_success(user):
    endless = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=1000000", "callbacks=none")
    run = user.begin("gptlab.train", "trainer=ddp", "trainer.devices=1", *endless)
    run.until(lambda: list(user.folder.glob("outputs/*/*/metrics.csv")))
    (worker,) = run.children()
    os.kill(worker, signal.SIGKILL)
    run.ended(128 + signal.SIGKILL)


@pytest.mark.slow
def test_a_run_has_one_writer(user, halted):
    """A second process that resumes a run ends with status 2, and leaves no row; when the first is killed, it may."""
    command = (f"resume={halted}", "train.max_steps=100000", "train.eval_every=1000")
    first = user.begin("gptlab.train", *command)
    first.until(lambda: (halted / "metrics.csv").exists() and max(metrics(halted, "train/loss")) > 8)
    second = user.python("gptlab.train", *command)
    mistaken(second, f"{halted} is being written by process {first.pid} on ")
    assert first.poll() is None
    first.kill()
    first.wait()
    ran(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9"))
    assert list(metrics(halted, "train/loss")) == list(range(1, 10))
