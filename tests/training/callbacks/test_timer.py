"""A run ends when its time is over, and can be resumed."""

import json

import pytest

from commands import assert_config_error, assert_success, metrics

pytestmark = pytest.mark.slow  # whole runs

TIMED = ("callbacks=[default,timer]", "callbacks.timer.check_every=4", "train.max_steps=100000", "train.log_every=100")
RARE = ("train.eval_every=100000", "train.micro_batch_size=4", "train.eval_windows=2")


def test_a_run_ends_after_its_time_with_an_evaluated_checkpoint(user):
    assert_success(user.train(*TIMED, *RARE, "callbacks.timer.duration=00:00:00:02"))
    directory = user.only_run()
    state = json.loads((directory / "state.json").read_text())
    step = state["step"]
    assert (state["state"], state["status"], step % 4) == ("done", 0, 0)
    assert 0 < step < 100_000
    assert list(metrics(directory, "val/loss")) == [step]
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    # no time is left: the run ends before another step, unless the duration is longer
    resume = ("gptlab.train", f"resume={directory}")
    assert_success(user.python(*resume))
    assert json.loads((directory / "state.json").read_text())["step"] == step
    assert_success(user.python(*resume, "callbacks=[default,timer]", "callbacks.timer.duration=00:00:00:04"))
    assert json.loads((directory / "state.json").read_text())["step"] > step


def test_an_invalid_duration_is_reported_before_anything_is_written(user):
    done = user.train(*TIMED, "callbacks.timer.duration=3h")
    assert_config_error(done, "callbacks.timer.duration=3h is not of the form DD:HH:MM:SS")
    assert not (user.folder / "outputs").exists()
