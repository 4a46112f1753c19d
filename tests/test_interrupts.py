"""Ctrl-C: the run ends, prints how to resume it, and leaves no process behind."""

import json
import os
import signal

import pytest

from commands import assert_success, metrics, newest_state
from gptlab.exit_codes import INTERRUPTED, PREEMPTED
from processes import SMALL, TWO, processes_of, training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "to_all"),
    [
        pytest.param(("trainer=cpu",), True, id="one process"),
        pytest.param(TWO, True, id="two processes, as from a terminal"),
        pytest.param(TWO, False, id="two processes, only to the first"),
    ],
)
def test_an_interrupted_run_can_be_resumed(user, trainer, to_all):
    run = training(user, *trainer)
    (os.killpg if to_all else os.kill)(run.pid, signal.SIGINT)
    output = run.ended(INTERRUPTED).stdout
    assert f"To resume: python -m gptlab.train resume=outputs/quickstart/{user.only_run().name}" in output
    assert processes_of(user.folder) == []
    step = newest_state(user.only_run())["global_step"]
    done = user.python("gptlab.train", f"resume={user.only_run()}", f"train.max_steps={step}", "callbacks=none")
    assert_success(done)  # nothing to do is not an error


@pytest.mark.slow
def test_an_interrupt_ends_the_whole_sweep(user):
    sweep = ("-m", "name=sweep", "train.max_steps=5,1000000,6", "callbacks=checkpoint")
    run = user.begin("gptlab.train", *sweep, *TWO, *SMALL)
    run.until(lambda: list(user.folder.glob("outputs/sweep/*/1/checkpoints/step_*")))
    os.killpg(run.pid, signal.SIGINT)
    output = run.ended(INTERRUPTED).stdout
    directory = user.only_run("sweep")
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["0", "1"]
    assert max(metrics(directory / "0", "val/loss")) == 5
    assert "Run the same command again to resume the sweep." in output
    assert "Interrupted at step" in (directory / "1" / "train.log").read_text()
    assert processes_of(user.folder) == []


# Python imports sitecustomize at startup
SIGNAL_AFTER = """
import os, signal, sys
if "gptlab.train" in sys.orig_argv:
    from gptlab.launch import train_run
    plain = train_run.FUNCTION
    def signaling(*arguments, **options):
        plain(*arguments, **options)
        os.kill(os.getpid(), signal.SIGNAL)
    train_run.FUNCTION = signaling
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "name", "expected", "state"),
    [("end_state", "SIGINT", INTERRUPTED, "done"), ("attach_wandb", "SIGTERM", PREEMPTED, "stopped")],
    ids=["after the run is done", "before training"],
)
def test_record_of_a_run_says_whether_it_is_done_when_a_signal_arrives(user, function, name, expected, state):
    code = SIGNAL_AFTER.replace("FUNCTION", function).replace("SIGNAL", name)
    (user.folder / "sitecustomize.py").write_text(code)
    user.environment["PYTHONPATH"] = os.pathsep.join((str(user.folder), user.environment.get("PYTHONPATH", "")))
    user.begin("gptlab.train", "trainer=cpu", *SMALL, "train.max_steps=2").ended(expected)
    record = json.loads((user.only_run() / "state.json").read_text())
    assert record["state"] == state
