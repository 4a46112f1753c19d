"""The train command, end to end: files, metrics and losses."""

import json
import math
import re
import sys

import pytest
import torch
import yaml

from commands import assert_success, metrics, weights
from conftest import SMALL
from reference_training import plain_training


def test_a_run_writes_its_files_and_prints_its_directory(user):
    done = user.train("name=first", "callbacks.samples.num_samples=2")
    assert_success(done)
    directory = user.only_run("first")
    written = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {
        "uncommitted.diff"
    }
    assert written == {
        "config.yaml",
        "environment.json",
        "forecast.json",
        "manifest.json",
        "metrics.csv",
        "state.json",
        "train.log",
        *(f"checkpoints/step_{step:06d}/{name}" for step in (3, 6) for name in ("record.json", "state.pt")),
        "samples/step_000003.txt",
        "samples/step_000006.txt",
    }
    for row in ("parameters", "tokens seen", "best val loss", "bits per byte", "wall time", "run directory"):
        assert row in done.stdout
    assert f"Next: python -m gptlab.sample run=outputs/first/{directory.name}" in done.stdout
    assert "mfu unknown" in " ".join(done.stdout.split()) or torch.cuda.is_available()
    assert (directory / "samples" / "step_000006.txt").read_text().count("--- sample") == 2
    assert "val loss" in (directory / "train.log").read_text()
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    assert "name=first" in environment["command"]
    assert yaml.safe_load((directory / "config.yaml").read_text())["model"]["vocab_size"] == 257


def test_metrics_and_evaluations_are_recorded_at_their_steps(user):
    assert_success(user.train("train.max_steps=7", "train.log_every=2"))
    directory = user.only_run()
    recorded = [1, 2, 4, 6, 7]  # the first, every second, the last
    for name in ("train/loss", "lr", "grad_norm", "tokens_per_second", "data_wait", "peak_memory_gb"):
        assert list(metrics(directory, name)) == recorded, name
    # waiting before the first step and after an evaluation does not count as training time
    assert {step: share > 0 for step, share in metrics(directory, "data_wait").items()} == {
        **dict.fromkeys((2, 4, 6), True),
        **dict.fromkeys((1, 7), False),
    }
    assert max(metrics(directory, "data_wait").values()) < 1
    memory = list(metrics(directory, "peak_memory_gb").values())
    assert memory == pytest.approx(sorted(memory), rel=0.01)  # never decreases, up to the accuracy of Linux
    assert 0.1 < memory[0] <= memory[-1] < 4
    lines = [line for line in (directory / "train.log").read_text().splitlines() if " · loss " in line]
    assert all(
        re.search(r" tokens/s, \d+\.\d % waiting for data · \d\.\d\d GB · \d:\d\d:\d\d left$", line) for line in lines
    )
    assert len(lines) == len(recorded)
    assert list(metrics(directory, "val/loss")) == [3, 6, 7]  # every third step, and the last
    assert metrics(directory, "tokens") == {step: step * 12 * 32 for step in (1, 2, 3, 4, 6, 7)}
    loss, bits = metrics(directory, "val/loss"), metrics(directory, "val/bits_per_byte")
    # one document, so that at most the last scored token is an end-of-text token: one byte per token
    assert bits == pytest.approx({step: value / math.log(2) for step, value in loss.items()}, rel=1e-3)


@pytest.fixture
def first(user, runs):
    """Run of six steps with ``SMALL``."""
    return runs.give(user, "first")


def test_train_has_the_losses_and_weights_of_a_plain_loop(user, first):
    torch.set_num_threads(1)
    directory = first
    losses, model = plain_training(user, first, steps=6)
    assert list(metrics(directory, "train/loss").values()) == pytest.approx(losses, abs=2e-6)
    found = weights(directory)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_losses_are_bit_identical_only_for_equal_seeds(user, runs):
    for name, seed in (("a", 1), ("c", 2)):
        runs.give(user, name, f"seed={seed}", "model.dropout=0.1")
    # in a new interpreter, whose hashes and addresses differ from those of the forks
    assert_success(user.run(sys.executable, "-m", "gptlab.train", *SMALL, "name=b", "seed=1", "model.dropout=0.1"))
    a, b, c = (metrics(user.only_run(name), "train/loss") for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.slow
def test_evaluating_and_sampling_do_not_change_training(user):
    assert_success(user.train("name=often", "train.eval_every=1", "model.dropout=0.1"))
    assert_success(user.train("name=once", "train.eval_every=6", "model.dropout=0.1", "callbacks=none"))
    often, once = user.only_run("often"), user.only_run("once")
    assert metrics(often, "train/loss") == metrics(once, "train/loss")
    assert metrics(often, "val/loss")[6] == metrics(once, "val/loss")[6]
    assert not (once / "checkpoints").exists()


@pytest.mark.slow
def test_micro_batches_and_data_workers_do_not_change_the_losses(user, first):
    assert_success(user.train("name=parts", "train.micro_batch_size=3", "data.num_workers=2"))
    parts = user.only_run("parts")
    assert metrics(parts, "train/loss") == pytest.approx(metrics(first, "train/loss"), abs=1e-5)
    assert metrics(parts, "grad_norm") == pytest.approx(metrics(first, "grad_norm"), abs=1e-4)
    assert metrics(parts, "val/loss") == pytest.approx(metrics(first, "val/loss"), abs=1e-5)


@pytest.mark.slow
def test_a_token_budget_is_rounded_up_to_a_whole_step(user):
    assert_success(
        user.python("gptlab.train", "data=text", "data.source=text.txt", "model=tiny", "train.max_tokens=4000")
    )
    assert list(metrics(user.only_run(), "tokens").values())[-1] == 6 * 12 * 64  # the first whole step at or above 4000


def test_a_resume_with_another_learning_rate_is_an_error(user, first):
    done = user.python("gptlab.train", f"resume={first}", "optimizer.lr=1")
    assert done.returncode == 2
    assert "optimizer.lr cannot change when a run is resumed" in done.stderr


@pytest.mark.slow
def test_a_run_can_start_from_the_weights_of_another(user, first):
    assert_success(
        user.train(
            "name=second", f"init_from={first}", "train.max_steps=1", "optimizer.lr=1e-12", "train.eval_windows=null"
        )
    )
    assert_success(user.train("name=third", "train.eval_windows=null"))
    second, third = user.only_run("second"), user.only_run("third")
    assert metrics(second, "val/loss")[1] == pytest.approx(metrics(third, "val/loss")[6], abs=1e-6)
    done = user.train(f"init_from={first}", "model.n_embd=32")
    assert done.returncode == 2
    assert "model.n_embd=32, but the weights have 64" in done.stderr


@pytest.mark.slow
def test_early_stopping_ends_a_run_without_improvement(user):
    # a learning rate at which nothing is learned: the first evaluation remains the best
    rate = ("optimizer.lr=1e-12", "train.max_steps=50", "callbacks.early_stopping.patience=2")
    done = user.train("callbacks=[default,early_stopping]", "callbacks.early_stopping.min_delta=0.1", *rate)
    assert_success(done)
    assert list(metrics(user.only_run(), "val/loss")) == [3, 6, 9]
    assert re.search(r"^ *stopped early +at step 9\b", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_several_loggers_record_the_same_metrics(user):
    assert_success(user.train("logger=[csv,tensorboard,wandb]", "logger.wandb.mode=offline"))
    directory = user.only_run()
    assert list(metrics(directory, "val/loss")) == [3, 6]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(metrics(directory, "train/loss"), rel=1e-6)
    (record,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    assert b"bits_per_byte" in record.read_bytes()


@pytest.mark.parametrize(
    "option", ["one_step", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("limit", "overfit", "profile"))]
)
def test_debug_options(user, option):
    assert_success(user.python("gptlab.train", "data=text", "data.source=text.txt", "model=tiny", f"debug={option}"))
    directory = user.only_run()
    losses = metrics(directory, "train/loss")
    if option == "one_step":
        assert list(losses) == [1]
    elif option == "overfit":
        assert losses[200] < 0.2 < 4 < losses[1]
    elif option == "limit":
        assert list(metrics(directory, "val/loss")) == [10, 20]
    else:
        traces = [json.loads(path.read_text())["traceEvents"] for path in directory.glob("profile/*.json")]
        assert any("training_step" in event.get("name", "") for trace in traces for event in trace)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["true", "blocks"])
def test_a_compiled_model_has_the_losses_and_parameter_names_of_an_eager_one(user, scope):
    assert_success(user.train("name=compiled", f"train.compile={scope}", timeout=300))
    assert_success(user.train("name=eager", "train.compile=false"))
    compiled, eager = user.only_run("compiled"), user.only_run("eager")
    assert metrics(compiled, "train/loss") == pytest.approx(metrics(eager, "train/loss"), abs=1e-5)
    states = [weights(d) for d in (compiled, eager)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.slow
def test_bfloat16_losses_are_close_to_float32(user):
    assert_success(user.train("name=bf16", "trainer.precision=bf16-mixed"))
    assert_success(user.train("name=fp32", "trainer.precision=32-true"))
    bf16, fp32 = (metrics(user.only_run(name), "train/loss") for name in ("bf16", "fp32"))
    assert bf16 == pytest.approx(fp32, abs=0.02)
    assert bf16 != fp32


@pytest.mark.slow
def test_a_sample_is_the_same_for_the_same_seed(user, first):
    arguments = (f"run={first}", "prompt=def f(x): # it's ${y}, \\ ", "max_new_tokens=20", "num_samples=2")
    one, again, other = (user.python("gptlab.sample", *arguments, f"seed={seed}") for seed in (1, 1, 2))
    assert_success(one)
    assert one.stdout == again.stdout
    assert one.stdout != other.stdout
    assert one.stdout.count("def f(x): # it's ${y}, \\ ") == 2


def test_a_run_with_only_damaged_checkpoints_cannot_be_sampled(user, first):
    for path in first.glob("checkpoints/*/state.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    done = user.python("gptlab.sample", f"run={first}")
    assert done.returncode == 2
    assert "has no intact checkpoint: all of those in" in done.stderr
