"""Steps with non-finite gradients, loss spikes, and processes that hang."""

import json
import math
import time

import pytest
import torch

from commands import assert_success, metrics, newest_state
from faults import break_steps
from gptlab.exit_codes import DIVERGED, FAILED, HUNG
from processes import processes_of

TWO = ("trainer.devices=2",)
# also the loss, as if the model itself overflowed
NAN_FROM = "if step >= {first}: self.step_loss.fill_(float('nan')); loss = loss * float('nan')"


@pytest.mark.slow
def test_a_run_with_non_finite_gradients_ends_and_names_the_first_bad_batch(user):
    break_steps(user, NAN_FROM.format(first=4))
    done = user.train("train.max_steps=50", "train.max_bad_steps=2", "train.eval_every=2", "callbacks=checkpoint")
    directory = user.only_run()
    replay = f"python -m gptlab.prepare replay=outputs/quickstart/{directory.name}"
    assert done.returncode == DIVERGED
    assert done.stderr == (
        "gptlab: The gradient was not finite for 2 steps in a row (train.max_bad_steps), up to step 5. "
        f"To print the batch of the first of them: {replay} step=4\n"
    )
    assert f"Bad steps in a row: 1 of at most 2. To print its batch: {replay} step=4\n" in done.stdout
    assert metrics(directory, "bad_steps") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2}
    losses, norms = metrics(directory, "train/loss"), metrics(directory, "grad_norm")
    for step in range(1, 6):
        assert math.isfinite(losses[step]) == math.isfinite(norms[step]) == (step < 4)
    evaluations = metrics(directory, "val/loss")
    assert math.isfinite(evaluations[4])
    shown = user.python("gptlab.prepare", *replay.split()[3:], "step=4")
    assert_success(shown)


def val_loss(checkpoint):
    """Returns the val loss in the record of a checkpoint, by which the best one is selected."""
    return json.loads((checkpoint / "record.json").read_text())["facts"]["val_loss"]


def kept(directory):
    """Returns all tensors of the last checkpoint, weights and optimizer state, by name."""
    checkpoint = newest_state(directory)
    (optimizer,) = checkpoint["optimizer_states"]
    state = {f"{number}.{name}": value for number, one in optimizer["state"].items() for name, value in one.items()}
    return checkpoint["state_dict"] | state


@pytest.mark.slow
def test_samples_of_nan_weights_do_not_hide_the_divergence(user):
    break_steps(user, "if step == 3: self.model.ln_f.weight.data.fill_(float('nan'))")
    done = user.train("train.max_steps=50", "train.max_bad_steps=4", "train.eval_every=2", "callbacks=default")
    assert done.returncode == DIVERGED, done.stderr
    directory = user.only_run()
    assert "step 4: no samples, because the logits of the model are not finite" in (directory / "train.log").read_text()
    assert [path.name for path in (directory / "samples").iterdir()] == ["step_000002.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [("trainer=cpu",), ("trainer=fsdp", *TWO)])
def test_callbacks_of_a_model_with_nan_weights_do_not_hide_the_divergence(user, trainer):
    example = {"ctx": "the king", "endings": ["goes", "eats", "sings", "runs"], "label": 0}
    (user.folder / "hellaswag.jsonl").write_text(json.dumps(example) + "\n")
    names = "[default,activation_stats,watch,gradient_stats,eval_corpora,hellaswag,early_stopping,trace]"
    done = user.train(
        f"callbacks={names}",
        "logger=tensorboard",
        "callbacks.hellaswag.path=hellaswag.jsonl",
        "+callbacks.eval_corpora.corpora.other.source=text.txt",
        *(f"callbacks.{name}.every=1" for name in ("activation_stats", "watch", "gradient_stats")),
        *("train.max_steps=6", "train.eval_every=2", "train.ema_decay=0.9", "optimizer.lr=1e38", *trainer),
        timeout=300,
    )
    assert done.returncode == DIVERGED, done.stderr
    assert "Traceback" not in done.stderr
    assert set(metrics(user.only_run(), "hellaswag/acc").values()) == {0.0}  # no ending has the lowest loss


@pytest.mark.slow
def test_a_trial_whose_loss_blew_up_is_done_and_told(user):
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.eval_windows=4", "train.log_every=1")
    changes = ("name=sweep", "optimizer.lr=50,0.001", "train.max_steps=8", "train.eval_every=4", "schedule=constant")
    done = user.python("gptlab.train", "-m", *changes, *small, "trainer=cpu", timeout=300)
    assert_success(done)
    blown, other = (json.loads((user.only_run("sweep") / str(n) / "trial.json").read_text()) for n in (0, 1))
    assert (blown["state"], blown["blew_up"]) == ("done", True)
    assert (other["state"], other["blew_up"], other["message"]) == ("done", False, None)
    losses = metrics(user.only_run("sweep") / "0", "val/loss")
    assert f"The loss blew up: the last val/loss is {losses[8]:.4f}" in blown["message"]
    text = " ".join(done.stdout.split())
    assert text.count("trial 0 done, blew up") == 2  # when it ends and in the summary
    assert "2 trials: 2 done (1 of the done trials blew up)" in text
    assert json.loads((user.only_run("sweep") / "0" / "state.json").read_text())["blew_up"] == blown["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "optimizer"),
    [
        (("trainer=cpu",), ("optimizer.fused=true",)),
        (("trainer=ddp", *TWO), ("optimizer.fused=true",)),
        (("trainer=fsdp", *TWO), ("optimizer.fused=true",)),
        (("trainer=fsdp", *TWO), ("optimizer.fused=false",)),
        (("trainer=cpu",), ("optimizer=muon", "optimizer.fused=true")),
        (("trainer=fsdp", *TWO), ("optimizer=muon", "optimizer.fused=true")),
        (("trainer=fsdp", *TWO), ("optimizer=muon", "optimizer.fused=false")),
        (("trainer=fsdp", *TWO), ("train.ema_decay=0.9", "optimizer.fused=true")),
        (("trainer=ddp", *TWO), ("train.ema_decay=0.9", "optimizer.fused=false")),
    ],
)
def test_a_bad_step_of_one_rank_is_skipped_by_all(user, trainer, optimizer):
    same = (*trainer, *optimizer, "train.eval_every=50", "callbacks=checkpoint")
    same = (*same, "train.micro_batch_size=3", "schedule.decay_steps=9")
    assert_success(user.train("name=before", "train.max_steps=3", *same, timeout=300))
    break_steps(user, "if step == 4 and rank == self.trainer.world_size - 1: loss = loss * float('nan')")
    assert_success(user.train("name=after", "train.max_steps=4", *same, timeout=300))
    before, after = (kept(user.only_run(name)) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert len(before) > 50  # weights, and one or three state tensors of each
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert metrics(user.only_run("after"), "bad_steps") == {1: 0, 2: 0, 3: 0, 4: 1}
    assert metrics(user.only_run("after"), "tokens")[4] == 4 * 12 * 32


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [("trainer=cpu",), ("trainer=ddp", *TWO)])
def test_a_diverged_trial_does_not_stop_the_other_trials(user, trainer):
    break_steps(user, "if self.max_steps == 7: loss = loss * float('nan')")
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.eval_windows=4", "train.log_every=1", *trainer)
    changes = ("name=sweep", "train.max_bad_steps=2", "train.max_steps=7,4")
    done = user.python("gptlab.train", "-m", *changes, *small, timeout=300)
    assert done.returncode == DIVERGED
    line = "trial 0 diverged · train.max_steps=7: The gradient was not finite for 2 steps in a row"
    assert done.stdout.count(line) == 2  # when it happens and in the summary
    assert "Traceback" not in done.stderr
    assert list(metrics(user.only_run("sweep") / "1", "train/loss")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_evaluation_with_a_nan_loss_is_never_the_best(user):
    # an infinite weight makes every evaluation NaN, until a later step replaces it with a finite one
    break_steps(user, "self.model.wte.weight.data[0, 0] = 0.01 if step >= 5 else float('inf')")
    done = user.train("train.max_steps=4", "train.eval_every=2", "callbacks=checkpoint", "train.max_bad_steps=50")
    assert done.returncode == DIVERGED
    assert "last evaluation, at step 4, is not finite" in done.stderr
    directory = user.only_run()
    assert all(math.isnan(loss) for loss in metrics(directory, "val/loss").values())
    assert {val_loss(checkpoint) for checkpoint in directory.glob("checkpoints/*")} == {None}
    assert "the best so far" not in done.stdout
    assert user.python("gptlab.train", f"resume={directory}").returncode == DIVERGED  # without another step
    assert_success(user.python("gptlab.train", f"resume={directory}", "train.max_steps=6"))
    assert math.isfinite(metrics(directory, "val/loss")[6])
    assert val_loss(directory / "checkpoints" / "step_000006") == metrics(directory, "val/loss")[6]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [("trainer=cpu",), ("trainer=ddp", *TWO)])
def test_a_resumed_run_detects_the_same_loss_spikes(user, trainer):
    # only on rank 0: the mean over the ranks is what counts
    break_steps(user, "if step in (8, 11) and rank == 0: self.step_loss += 5.0 * self.trainer.accumulate_grad_batches")
    same = ("schedule.decay_steps=12", "train.log_every=6", "train.spike_window=12", "train.eval_every=7")
    same = (*same, "callbacks=checkpoint", *trainer)
    whole = user.train("name=whole", "train.max_steps=12", *same, timeout=300)
    assert_success(whole)
    assert_success(user.train("name=halted", "train.max_steps=7", *same, timeout=300))
    halted = user.only_run("halted")
    resumed = user.python("gptlab.train", f"resume={halted}", "train.max_steps=12", timeout=300)
    assert_success(resumed)
    for step in (8, 11):  # so soon after the resume that the steps since then would not suffice
        (expected,) = [line for line in whole.stdout.splitlines() if line.startswith(f"step {step}: the loss ")]
        (warning,) = [line for line in resumed.stdout.splitlines() if line.startswith(f"step {step}: the loss ")]
        assert warning.partition(" To print")[0] == expected.partition(" To print")[0]
    states = [
        newest_state(directory)["callbacks"]["TrainingHealthMonitor"] for directory in (halted, user.only_run("whole"))
    ]
    assert states[0] == states[1]
    assert states[0]["loss_spikes"] == 2
    assert len(states[0]["spikes"]["losses"]) == 12


HANGS = "if step == 3 and rank == self.trainer.world_size - 1: import time; time.sleep(3600)  # forever"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [("trainer=cpu",), ("trainer=ddp", *TWO)])
def test_a_hanging_run_writes_its_stacks_and_ends(user, trainer):
    break_steps(user, HANGS)
    timeout = 30.0  # long enough for the processes to start
    start = time.monotonic()
    done = user.train("train.max_steps=50", f"trainer.hang_timeout={timeout}", *trainer, timeout=300)
    assert done.returncode == HUNG
    assert time.monotonic() - start < 4 * timeout
    stacks = user.only_run() / "stacks"
    last = len(trainer) - 1
    assert sorted(path.name for path in stacks.iterdir()) == [f"rank_{rank}.txt" for rank in range(last + 1)]
    assert "sitecustomize.py" in (stacks / f"rank_{last}.txt").read_text()
    assert f"gptlab: rank {last} made no progress for 30 seconds (trainer.hang_timeout)" in done.stderr
    if last:  # rank 0 waits for it in the backward pass
        assert "sitecustomize.py" not in (stacks / "rank_0.txt").read_text()
        assert "backward" in (stacks / "rank_0.txt").read_text()
    until = time.monotonic() + 30
    while left := processes_of(user.folder):
        assert time.monotonic() < until, left
        time.sleep(0.5)


OUT_OF_MEMORY = (
    "if step == 2 and rank == self.trainer.world_size - 1: "
    "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total')"
)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [("trainer=cpu",), ("trainer=ddp", *TWO)])
def test_a_run_out_of_memory_ends_with_one_sentence_of_the_rank_that_is(user, trainer):
    break_steps(user, OUT_OF_MEMORY)
    done = user.train("train.max_steps=50", "callbacks=none", *trainer, timeout=300)
    assert done.returncode == FAILED
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("gptlab:")]
    assert f"needs more memory than the GPU of rank {len(trainer) - 1} has (CUDA out of memory." in message
    assert "torch.OutOfMemoryError" not in done.stderr
