"""LocalLauncher: devices, exit codes and signals of trial processes."""

import os
import signal
import sys
import time

import pytest

from conftest import defaults
from gptlab.exit_codes import DONE, INTERRUPTED, PREEMPTED
from gptlab.launch import supervisor
from gptlab.sweeps import local_launcher
from gptlab.sweeps.config import LocalLauncherConfig
from gptlab.sweeps.local_launcher import LocalLauncher
from gptlab.tracking.run_store.sweeps import Trial
from gptlab.training.config import TrainerConfig


def trainer(**changes) -> TrainerConfig:
    return TrainerConfig(**defaults("trainer/auto.yaml") | changes)


def on_gpus(monkeypatch, number, visible=None):
    monkeypatch.setattr(local_launcher, "count_gpus", lambda: number)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("gpus", "devices", "at_once", "visible", "expected"),
    [
        (4, 1, "auto", None, ["0", "1", "2", "3"]),
        (8, 2, "auto", None, ["0,1", "2,3", "4,5", "6,7"]),
        (5, 2, "auto", None, ["0,1", "2,3"]),
        (8, "auto", "auto", None, ["0,1,2,3,4,5,6,7"]),
        (2, 1, 4, None, ["0", "1", "0", "1"]),  # two share a device
        (3, 1, "auto", "5,GPU-a,7", ["5", "GPU-a", "7"]),
        (4, 2, "auto", "4,5,6,7", ["4,5", "6,7"]),
    ],
)
def test_each_trial_gets_its_own_devices(monkeypatch, gpus, devices, at_once, visible, expected):
    on_gpus(monkeypatch, gpus, visible)
    strategy = "single" if devices == 1 else "ddp"
    launcher = LocalLauncher(LocalLauncherConfig(at_once=at_once), trainer(devices=devices, strategy=strategy))
    assert launcher.at_once == len(expected)
    assert [launcher.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(launcher.at_once)] == expected


def test_cpu_default_is_one_trial_and_concurrent_trials_share_the_cores(monkeypatch):
    on_gpus(monkeypatch, 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    one = LocalLauncher(LocalLauncherConfig(at_once="auto"), trainer())
    assert one.at_once == 1
    assert "OMP_NUM_THREADS" not in one.environment(0)
    four = LocalLauncher(LocalLauncherConfig(at_once=4), trainer())
    assert four.environment(3)["OMP_NUM_THREADS"] == "2"


class NoConfig:
    def model_dump(self, **options):
        return {}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A launcher, and a function that starts a process in it that runs a line of Python."""
    on_gpus(monkeypatch, 0)
    launcher = LocalLauncher(LocalLauncherConfig(at_once=2), trainer())

    def start(number, code):
        script = tmp_path / f"trial_{number}.py"
        script.write_text(f"import os, sys, time, signal\nprint('ready', os.getpid(), flush=True)\n{code}\n")
        monkeypatch.setattr(supervisor, "WORKER_COMMAND", (sys.executable, str(script)))
        launcher.start(Trial(number=number, overrides={}, config_hash=""), NoConfig(), tmp_path / str(number))
        return tmp_path / str(number) / local_launcher.OUTPUT

    yield launcher, start
    launcher.close()


def wait_for_end(launcher, number) -> int:
    until = time.monotonic() + 30
    while True:
        for found, status in launcher.ended():
            assert found == number
            return status
        assert time.monotonic() < until
        time.sleep(0.02)


def wait_for(text, path):
    until = time.monotonic() + 30
    while text not in path.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "status"), [("sys.exit(0)", DONE), ("sys.exit(3)", 3), ("1 / 0", 1)])
def test_exit_code_and_output_of_a_trial_are_recorded(started, code, status):
    launcher, start = started
    output = start(7, code)
    assert launcher.is_busy
    assert launcher.has_room
    assert wait_for_end(launcher, 7) == status
    assert "ready" in output.read_text()
    assert ("ZeroDivisionError" in output.read_text()) == (code == "1 / 0")


def test_killed_trial_returns_its_signal(started):
    launcher, start = started
    output = start(0, "time.sleep(60)")
    wait_for("ready", output)
    os.kill(int(output.read_text().split()[1]), signal.SIGKILL)
    assert wait_for_end(launcher, 0) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_signals_are_forwarded_and_no_more_trials_start(started, number, status):
    launcher, start = started
    wait_for("ready", start(0, "signal.pthread_sigmask(signal.SIG_SETMASK, [])\ntime.sleep(60)"))
    launcher.forward_signal(number)
    assert not launcher.has_room
    assert wait_for_end(launcher, 0) == status


def test_trial_that_ignores_an_interrupt_is_killed(started, monkeypatch):
    launcher, start = started
    monkeypatch.setattr(local_launcher, "GRACE", 0.2)
    output = start(0, "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ignoring', flush=True)\ntime.sleep(60)")
    wait_for("ignoring", output)
    launcher.forward_signal(signal.SIGINT)
    assert wait_for_end(launcher, 0) == INTERRUPTED
