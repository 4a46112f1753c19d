"""Resumed runs: bit-identical, on other devices, in another directory, and with another length."""

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import yaml

from commands import assert_config_error, assert_same_run, assert_success, metrics, newest_state
from faults import break_steps
from gptlab.exit_codes import CONFIG_ERROR
from gptlab.tracking.run_lock import LOCK
from gptlab.training.checkpoints.records import checkpoint_step, list_checkpoints

DECAY = "schedule.decay_steps=9"
OPTIONS = {
    "none": (DECAY,),
    "dropout": (DECAY, "model.dropout=0.1"),
    "muon": (DECAY, "optimizer=muon", "optimizer.ns_dtype=float32"),
    "muon and dropout": (DECAY, "optimizer=muon", "optimizer.ns_dtype=float32", "model.dropout=0.1"),
    "average": ("schedule=constant", "schedule.warmup_steps=0", "train.ema_decay=0.3"),
    "growing": (DECAY, "train.batch_schedule=[[4,4],[8,8]]"),  # the halted run ends in the middle of a stage
}
STRATEGIES = {
    "one device": (),
    "ddp": ("trainer=ddp", "trainer.devices=2"),
    "fsdp": ("trainer=fsdp", "trainer.devices=2"),
    "fsdp, one file": ("trainer=fsdp", "trainer.devices=2", "callbacks.checkpoint.sharded=false"),
    "fsdp_tp": ("trainer=fsdp_tp", "trainer.devices=2"),
}
TENSORS = {"dropout": 3, "muon": 1, "muon and dropout": 1, "average": 4, "growing": 3}  # optimizer state per matrix
RESUMED = [
    *((options, "one device") for options in ("dropout", "muon", "average", "growing")),
    *(("average", strategy) for strategy in STRATEGIES if strategy != "one device"),
    *(("muon and dropout", strategy) for strategy in ("fsdp", "fsdp_tp")),
]


def halted_and_whole(user, runs, options: str, strategy: str) -> tuple[Path, Path]:
    """Returns a run of six steps, and the same run of nine steps without an interruption."""
    same = (*OPTIONS[options], "callbacks=checkpoint", *STRATEGIES[strategy])
    kind = "" if options == "none" else f"_{options}_{strategy}".replace(",", "").replace(" ", "_")  # as in conftest
    halted = runs.give(user, f"halted{kind}", "train.max_steps=6", *same)
    return halted, runs.give(user, f"whole{kind}", "train.max_steps=9", *same)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "strategy"), RESUMED)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(user, runs, options, strategy):
    halted, whole = halted_and_whole(user, runs, options, strategy)
    resumed = (sys.executable, "-m", "gptlab.train", f"resume={halted}", "train.max_steps=9")
    # once in a new interpreter, whose hashes and addresses differ from those of the forks
    assert_success(user.run(*resumed) if (options, strategy) == RESUMED[0] else user.python(*resumed[2:]))
    assert_same_run(whole, halted)
    (optimizer,) = newest_state(halted)["optimizer_states"]
    assert len(optimizer["state"]) == 28  # all parameters of two blocks, by GPT-2's names
    assert len(optimizer["state"]["h.1.mlp.c_fc.weight"]) == TENSORS[options]
    assert len(list(halted.parent.iterdir())) == 1  # it is resumed in its directory


CHANGES = {
    "smaller micro-batches": ("train.micro_batch_size=3",),
    **{name: STRATEGIES[name] for name in ("ddp", "fsdp", "fsdp, one file")},
    "fsdp, smaller micro-batches": ("trainer=fsdp", "trainer.devices=2", "train.micro_batch_size=2"),
}
CHANGED = [
    *(("none", change) for change in ("smaller micro-batches", "ddp", "fsdp, smaller micro-batches")),
    ("muon", "fsdp"),
    *(("average", change) for change in ("ddp", "fsdp", "fsdp, one file")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "change"), CHANGED)
def test_a_run_resumed_on_other_devices_has_the_same_losses(user, runs, options, change):
    halted, whole = halted_and_whole(user, runs, options, "one device")
    assert_success(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9", *CHANGES[change]))
    for name in ("train/loss", "val/loss"):
        assert metrics(halted, name) == pytest.approx(metrics(whole, name), abs=1e-5), name
    assert yaml.safe_load((halted / "config.yaml").read_text())["train"]["max_steps"] == 9  # the new value
    (optimizer,) = newest_state(halted)["optimizer_states"]
    if options == "muon":
        kept = {name: set(moments) for name, moments in optimizer["state"].items()}
        assert kept["h.1.mlp.c_fc.weight"] == {"momentum_buffer"}
        assert kept["wte.weight"] == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("length", "needed"),
    [("train.max_steps=39", "train.max_steps=40 or more"), ("train.max_tokens=100", "train.max_tokens=10240 or more")],
)
def test_a_resume_to_fewer_steps_than_done_is_an_error_and_writes_nothing(without_torch, length, needed):
    run = without_torch.folder / "outputs" / "run" / "1"
    shutil.copytree(Path(__file__).parent / "compatibility" / "single", run)  # 40 steps of 16 x 16 tokens
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = without_torch.python("gptlab.train", f"resume={run}", length)
    assert_config_error(done, needed)
    assert "has been trained for 40 steps already" in done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_moved_run_keeps_its_best_checkpoint(user, halted):
    moved = user.folder / "moved"
    shutil.copytree(halted, moved)
    (best,) = moved.glob("checkpoints/step_000006/state.pt")
    # a learning rate at which the next evaluations are worse
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["optimizer"]["lr"] = 5.0
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    assert_success(user.python("gptlab.train", f"resume={moved}", "train.max_steps=12", "trust_paths=true"))
    values = metrics(moved, "val/loss")
    assert values[12] > values[6]
    assert best.exists()
    assert [path.name for path in sorted(moved.glob("checkpoints/*"))] == [f"step_0000{n}" for n in ("06", "09", "12")]


@pytest.mark.slow
def test_a_run_forced_to_another_batch_size_continues_with_the_next_window(user):
    same = ("callbacks=checkpoint", DECAY)
    assert_success(user.train("name=whole", *same, "train.max_steps=9", "train.batch_schedule=[[6,4]]"))
    assert_success(user.train("name=halted", *same, "train.max_steps=6", "train.global_batch_size=4"))
    whole, halted = user.only_run("whole"), user.only_run("halted")
    changed = ("train.max_steps=9", "train.global_batch_size=12")
    assert_config_error(user.python("gptlab.train", f"resume={halted}", *changed), "cannot change when a run is")
    assert_success(user.python("gptlab.train", f"resume={halted}", *changed, "force_resume=true"))
    assert_same_run(whole, halted)
    assert metrics(halted, "tokens") == metrics(whole, "tokens")
    assert yaml.safe_load((halted / "config.yaml").read_text())["train"]["past_batches"] == [[6, 4]]


@pytest.mark.slow
def test_a_run_from_other_weights_with_a_shorter_block_can_be_resumed(user, halted):
    assert_success(user.train("name=second", f"init_from={halted}", "model.block_size=16", "train.max_steps=3"))
    second = user.only_run("second")
    assert_success(user.python("gptlab.train", f"resume={second}", "train.max_steps=6"))
    assert list(metrics(second, "val/loss")) == [3, 6]


def test_a_refused_resume_does_not_change_the_metrics(user, halted):
    before = (halted / "metrics.csv").read_text()
    done = user.python("gptlab.train", f"resume={halted}", "train.max_steps=9", "trainer=gpu")
    assert done.returncode == CONFIG_ERROR
    assert (halted / "metrics.csv").read_text() == before


@pytest.mark.slow
def test_a_resume_accepts_new_callbacks_and_another_length(user, halted):
    named = ("callbacks=default", "callbacks.samples.num_samples=2", "train.max_steps=null", "train.max_tokens=2700")
    assert_success(user.python("gptlab.train", f"resume={halted}", *named))
    assert max(metrics(halted, "tokens")) == 8  # 384 tokens per step
    assert_success(user.python("gptlab.train", f"resume={halted}", "train.max_steps=9"))
    assert max(metrics(halted, "tokens")) == 9


@pytest.mark.slow
def test_a_killed_worker_fails_the_run(user):
    endless = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=1000000", "callbacks=none")
    run = user.begin("gptlab.train", "trainer=ddp", "trainer.devices=1", *endless)
    run.until(lambda: list(user.folder.glob("outputs/*/*/metrics.csv")))
    (worker,) = run.children()
    os.kill(worker, signal.SIGKILL)
    run.ended(128 + signal.SIGKILL)


@pytest.mark.slow
def test_only_one_process_at_a_time_writes_a_run(user, halted):
    """A second process that resumes a run ends with exit code 2 and writes no row, until the first one is killed."""
    command = (f"resume={halted}", "train.max_steps=100000")
    first = user.begin("gptlab.train", *command)
    first.until(lambda: (halted / "metrics.csv").exists() and max(metrics(halted, "train/loss")) > 8)
    second = user.python("gptlab.train", *command)
    assert_config_error(second, f"{halted} is being written by process {first.pid} on ")
    assert first.poll() is None
    first.kill()
    first.wait()
    last = max(map(checkpoint_step, list_checkpoints(halted / "checkpoints"))) + 3
    assert_success(user.python("gptlab.train", f"resume={halted}", f"train.max_steps={last}"))
    assert list(metrics(halted, "train/loss")) == list(range(1, last + 1))


@pytest.mark.slow
def test_of_two_processes_that_resume_a_run_one_is_refused_by_name(user, halted):
    break_steps(user, "if step == 8: import time; time.sleep(30)")
    resume = ("gptlab.train", f"resume={halted}", "train.max_steps=9")
    owner = user.begin(*resume)
    owner.until((halted / LOCK).exists)
    done = user.python(*resume)
    assert_config_error(done, f"{halted} is being written by process {owner.pid} on {socket.gethostname()}")
    owner.ended(seconds=120)
    assert_same_run(halted, user.only_run("whole"))
