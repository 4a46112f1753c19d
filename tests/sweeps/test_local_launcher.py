"""Processes of trials: their devices, their ends."""

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
def test_trials_have_devices_of_their_own(monkeypatch, gpus, devices, at_once, visible, expected):
    on_gpus(monkeypatch, gpus, visible)
    strategy = "single" if devices == 1 else "ddp"
    made = LocalLauncher(LocalLauncherConfig(at_once=at_once), trainer(devices=devices, strategy=strategy))
    assert made.at_once == len(expected)
    assert [made.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(made.at_once)] == expected


def test_on_a_cpu_one_at_a_time_and_several_share_the_cores(monkeypatch):
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
def begun(tmp_path, monkeypatch):
    """A pool, and what starts a process in it that runs a line of Python."""
    on_gpus(monkeypatch, 0)
    made = LocalLauncher(LocalLauncherConfig(at_once=2), trainer())

    def begin(number, code):
        script = tmp_path / f"trial_{number}.py"
        script.write_text(f"import os, sys, time, signal\nprint('ready', os.getpid(), flush=True)\n{code}\n")
        monkeypatch.setattr(supervisor, "WORKER_COMMAND", (sys.executable, str(script)))
        made.start(Trial(number=number, overrides={}, config_hash=""), NoConfig(), tmp_path / str(number))
        return tmp_path / str(number) / local_launcher.OUTPUT

    yield made, begin
    made.close()


def ends(made, number) -> int:
    until = time.monotonic() + 30
    while True:
        for found, status in made.ended():
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
def test_a_trial_s_status_is_its_process_s_and_what_it_says_is_kept(begun, code, status):
    made, begin = begun
    output = begin(7, code)
    assert made.is_busy
    assert made.has_room
    assert ends(made, 7) == status
    assert "ready" in output.read_text()
    assert ("ZeroDivisionError" in output.read_text()) == (code == "1 / 0")


def test_a_killed_trial_has_failed(begun):
    made, begin = begun
    output = begin(0, "time.sleep(60)")
    wait_for("ready", output)
    os.kill(int(output.read_text().split()[1]), signal.SIGKILL)
    assert ends(made, 0) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_signals_are_handed_on_and_nothing_begins_any_more(begun, number, status):
    made, begin = begun
    wait_for("ready", begin(0, "signal.pthread_sigmask(signal.SIG_SETMASK, [])\ntime.sleep(60)"))
    made.forward_signal(number)
    assert not made.has_room
    assert ends(made, 0) == status


def test_what_does_not_end_after_an_interrupt_is_killed(begun, monkeypatch):
    made, begin = begun
    monkeypatch.setattr(local_launcher, "GRACE", 0.2)
    output = begin(0, "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)")
    wait_for("deaf", output)
    made.forward_signal(signal.SIGINT)
    assert ends(made, 0) == INTERRUPTED
