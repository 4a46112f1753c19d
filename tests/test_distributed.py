"""Training in several processes: one run directory, and the losses of one process."""

import sys

import pytest
import torch

from commands import assert_success, averages, metrics, newest_state
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model

TWO = ("trainer.devices=2",)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one(user, runs, strategy):
    one = runs.give(user, "first")
    assert_success(user.train("name=two", f"trainer={strategy}", *TWO, "train.micro_batch_size=2"))
    two = user.only_run("two")  # exactly one directory
    for name in ("train/loss", "val/loss"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), abs=1e-5), name
    assert metrics(two, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), abs=1e-4)
    assert (two / "samples" / "step_000006.txt").exists()
    sampled = user.python("gptlab.sample", f"run={two}", "max_new_tokens=5")
    assert_success(sampled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "ranks", "windows"), [("ddp", 2, 3), ("fsdp", 2, 3), ("ddp", 3, 10), ("ddp", 4, 2)]
)
def test_an_evaluation_of_single_windows_that_ranks_do_not_divide_equals_one_process(user, strategy, ranks, windows):
    same = ("callbacks=none", "train.max_steps=2", "train.global_batch_size=12", f"train.eval_windows={windows}")
    assert_success(user.train("name=one", *same))
    devices = (f"trainer={strategy}", f"trainer.devices={ranks}", "train.micro_batch_size=1")
    assert_success(user.train("name=several", *same, *devices))
    one, several = (user.only_run(name) for name in ("one", "several"))
    for name in ("val/loss", "val/bits_per_byte"):
        assert metrics(several, name) == pytest.approx(metrics(one, name), abs=1e-5), name


LAYOUTS = {
    "ddp": ("trainer=ddp", *TWO, "train.micro_batch_size=3"),
    "fsdp": ("trainer=fsdp", *TWO, "train.micro_batch_size=3"),
    "fsdp, CPU offload, not resharded": (
        "trainer=fsdp",
        *TWO,
        "trainer.cpu_offload=true",
        "trainer.reshard_after_forward=false",
    ),
    "fsdp, compiled": ("trainer=fsdp", *TWO, "train.compile=true", "model.activation_checkpointing=true"),
    "fsdp, uneven shards": ("trainer=fsdp", "trainer.devices=3"),
    "fsdp_tp, 1 x 2": ("trainer=fsdp_tp", *TWO, "train.micro_batch_size=4"),
    "fsdp_tp, 2 x 2": ("trainer=fsdp_tp", "trainer.devices=4", "train.micro_batch_size=3"),
}


# Muon in float32, since bfloat16 would turn a difference in the last bit into 2**-8. Epsilon is large compared with the
# gradient of the key biases, which is only rounding (softmax is invariant to them). Gradients are clipped to a smaller
# norm, so that every step is clipped. With the default seed, step 16 amplifies rounding a hundredfold, also if only the
# micro-batch of a single process is changed.
MUON = ("optimizer=muon", "optimizer.ns_dtype=float32", "optimizer.eps=1e-6", "train.grad_clip=0.1", "seed=3")
# The compiled model is also averaged, since compiling takes a minute (test_averages tests the other layouts).
OPTIMIZERS = {"adamw": (), "muon": MUON, "adamw, average": ("train.ema_decay=0.3",)}
CASES = [
    *((optimizer, layout) for optimizer in ("adamw", "muon") for layout in LAYOUTS if layout != "fsdp, compiled"),
    ("adamw, average", "fsdp, compiled"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_twenty_distributed_steps_have_the_losses_of_one_process(user, runs, optimizer, layout):
    length = ("train.max_steps=20", "train.eval_every=10", "schedule.warmup_steps=4", "trainer.precision=32-true")
    same = (*length, *OPTIMIZERS[optimizer])
    one = runs.give(user, "twenty", *same, "train.micro_batch_size=4")
    assert_success(user.train("name=distributed", *same, *LAYOUTS[layout], timeout=600))
    distributed = user.only_run("distributed")
    for name in ("train/loss", "val/loss", "val/bits_per_byte"):
        assert metrics(distributed, name) == pytest.approx(metrics(one, name), abs=1e-5), name
    assert metrics(distributed, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-5)
    assert min(metrics(one, "grad_norm").values()) > (0.1 if optimizer == "muon" else 1)  # every step was clipped
    assert len(metrics(one, "train/loss")) == 20
    assert (distributed / "samples" / "step_000020.txt").exists()
    states = [newest_state(directory)["state_dict"] for directory in (one, distributed)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-4, rtol=0, msg=name)
    if optimizer == "adamw, average":
        kept = [averages(directory) for directory in (one, distributed)]
        assert kept[0].keys() == kept[1].keys() == states[0].keys() - {"lm_head.weight"}
        for name, tensor in kept[0].items():
            torch.testing.assert_close(kept[1][name], tensor, atol=1e-4, rtol=0, msg=name)
        model = load_model(open_model_source(str(distributed)))
        assert all(torch.equal(parameter, kept[1][name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_torchrun_starts_one_run(user):
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "gptlab.train", "trainer=ddp")
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=2", "train.eval_windows=4")
    done = user.run(*command, *small, "name=torchrun")
    assert_success(done)
    assert list(metrics(user.only_run("torchrun"), "train/loss")) == [1, 2]
    assert done.stdout.count("tokens: 2 x") == 1


@pytest.mark.slow
def test_a_sweep_over_the_number_of_devices_runs_each_trial_once(user):
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=2", "train.eval_windows=4")
    done = user.python("gptlab.train", "-m", "name=sweep", "trainer=fsdp", "trainer.devices=2,1,3", *small, timeout=400)
    assert_success(done)
    directory = user.only_run("sweep")
    trials = [directory / number for number in ("0", "1", "2")]
    assert sorted(path for path in directory.iterdir() if path.is_dir()) == trials
    for trial, devices in zip(trials, (2, 1, 3), strict=True):
        assert metrics(trial, "train/loss") == pytest.approx(metrics(trials[0], "train/loss"), abs=1e-5)
        assert f"tokens: {devices} x" in (trial / "train.log").read_text()
    assert done.stdout.count("done · ") == 3
