"""Ctrl-C: the run ends, says how it goes on, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptlab.experiments.exits import INTERRUPTED
from test_train import metrics, ran

ENDLESS = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=1000000", "train.eval_every=5")


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
        except OSError:  # ended meanwhile
            continue
    return found


TWO = ("trainer=ddp", "trainer.devices=2")


@pytest.mark.parametrize(
    ("trainer", "to_all"),
    [
        pytest.param(("trainer=cpu",), True, id="one process"),
        pytest.param(TWO, True, id="two processes, as a terminal does", marks=pytest.mark.slow),
        pytest.param(TWO, False, id="two processes, to the first alone", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_can_go_on(user, trainer, to_all):
    command = (sys.executable, "-m", "gptlab.train", *ENDLESS, *trainer, "train.eval_windows=4", "callbacks=checkpoint")
    run = subprocess.Popen(
        command,
        cwd=user.folder,
        env=user.environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
        # tests that run in the background inherit an ignored SIGINT, which no terminal would hand on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not list(user.folder.glob("outputs/*/*/checkpoints/step_*")):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    (os.killpg if to_all else os.kill)(run.pid, signal.SIGINT)
    output = run.communicate(timeout=60)[0].decode()
    assert run.returncode == INTERRUPTED
    assert f"To go on: python -m gptlab.train resume=outputs/quickstart/{user.only_run().name}" in output
    assert processes_of(user.folder) == []
    done = user.python("gptlab.train", f"resume={user.only_run()}", "train.max_steps=1", "callbacks=none")
    ran(done)  # further than that already: nothing is left to do, which is no mistake


@pytest.mark.slow
def test_an_interrupt_ends_a_whole_sweep(user):
    small = ("data=text", "data.source=text.txt", "model=tiny", "train.eval_every=5", "train.eval_windows=4")
    sweep = ("-m", "name=sweep", "train.max_steps=5,1000000,6", "callbacks=checkpoint", *TWO, *small)
    run = subprocess.Popen(
        (sys.executable, "-m", "gptlab.train", *sweep),
        cwd=user.folder,
        env=user.environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 120
    while not list(user.folder.glob("outputs/sweep/*/1/checkpoints/*")):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    output = run.communicate(timeout=60)[0].decode()
    assert run.returncode == INTERRUPTED
    directory = user.only_run("sweep")
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["0", "1"]
    assert max(metrics(directory / "0", "val/loss")) == 5
    assert f"To go on: python -m gptlab.train resume=outputs/sweep/{directory.name}/1" in output
    assert "Interrupted at step" in (directory / "1" / "train.log").read_text()
    assert processes_of(user.folder) == []
