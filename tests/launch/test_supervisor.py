"""The supervisor: exit codes, signals and the end of its workers, which run a few lines of code from each test."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptlab.exit_codes import DIVERGED, DONE, INTERRUPTED, PREEMPTED
from gptlab.launch import signals, supervisor

BEGINNING = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from gptlab.launch.signals import run_stoppable, unblock_signals
from gptlab.launch.supervisor import exit_with_parent
rank = int(os.environ["RANK"])
here = Path(__file__).parent
"""
STOP = """
def work():
    unblock_signals()
    (here / f"ready{rank}").touch()
    time.sleep(60)

sys.exit(run_stoppable(work))
"""
FIRST = """
while rank and not (here / "first").exists():  # until rank 0 is here
    time.sleep(0.02)
(here / "first").touch()
"""


class Team:
    """Two workers that run the code of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = SimpleNamespace(
            trainer=SimpleNamespace(strategy="ddp", num_nodes=1, devices=2, accelerator="cpu"),
            model_dump=lambda mode: {"seed": 1},
        )

    def do(self, deeds: str) -> None:
        (self.folder / "deeds.py").write_text(BEGINNING + deeds)

    def run(self, deeds: str) -> int:
        self.do(deeds)
        return supervisor.supervise(supervisor.Job(self.config, None))

    def signal_when_ready(self, number: int) -> None:
        """Sends this process a signal as soon as both workers are ready."""

        def send() -> None:
            self.wait_for("ready0", "ready1")
            os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()

    def wait_for(self, *names: str) -> None:
        until = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < until
            time.sleep(0.02)

    def left(self) -> list[str]:
        """Returns the IDs of the workers and their children that are still alive."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = str(self.folder).encode() in (process / "environ").read_bytes()
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if is_ours and state != "Z":
                found.append(process.name)
        return found

    def is_gone(self) -> bool:
        """Whether all workers and their children end within a few seconds."""
        until = time.monotonic() + 5
        while self.left() and time.monotonic() < until:
            time.sleep(0.02)
        return not self.left()


@pytest.fixture
def team(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "WORKER_COMMAND", (sys.executable, "-m", "deeds"))
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.3)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    # tests that run in the background inherit an ignored SIGINT, unlike those in a terminal
    owner = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Team(tmp_path)
    signal.signal(signal.SIGINT, owner)


@pytest.mark.parametrize(
    ("deeds", "status"),
    [
        ("sys.exit(0)", DONE),
        ("sys.exit(75 if rank else 0)", PREEMPTED),
        ("time.sleep(rank); sys.exit(3)", DIVERGED),  # reached by all ranks: the last one is not killed
        ("if rank: sys.exit(5)\ntime.sleep(60)", 5),
        # the first failure, not the second one that it caused
        (FIRST + "time.sleep(0.5 * rank); sys.exit(5 - 4 * rank)", 5),
        ("if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 128 + signal.SIGKILL),
        ("if rank: raise OSError('full')\ntime.sleep(60)", 1),
    ],
)
def test_supervise_returns_the_exit_code_of_the_first_failure(team, deeds, status):
    began = time.monotonic()
    assert team.run(deeds) == status
    assert time.monotonic() - began < 20
    assert team.is_gone()


@pytest.mark.slow
def test_later_failures_do_not_replace_the_first_exit_code(team, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 10)
    team.config.trainer.devices = 3
    assert team.run(FIRST + "time.sleep(rank)\nsys.exit((5, 124, 0)[rank])") == 5
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 3)  # two have ended at the next poll
    killed = "if rank == 1:\n    (here / 'killed').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    after = "while not (here / 'killed').exists(): time.sleep(0.02)\n"
    assert team.run(f"{killed}{after}time.sleep(4 * (rank == 2))\nsys.exit(1)") == 128 + signal.SIGKILL


def test_a_worker_that_blocks_signals_is_killed_with_its_children(team):
    # rank 0 blocks signals and has started a process; rank 1 fails
    assert team.run("if rank: sys.exit(1)\nsubprocess.Popen(('sleep', '60'))\ntime.sleep(60)") == 1
    assert team.is_gone()


def test_a_process_that_outlives_its_worker_is_killed(team):
    assert team.run("subprocess.Popen(('sleep', '60'))") == DONE
    assert team.is_gone()


def test_workers_get_their_environment_variables_and_the_supervisor_keeps_its_own(team):
    before = dict(os.environ)
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME", "GPTLAB_RENDEZVOUS")
    deeds = f"job = sys.argv[1:] + [open(sys.argv[1]).read()] + [os.environ[name] for name in {names}]\n"
    assert team.run(deeds + "(here / f'{rank}.json').write_text(json.dumps(job))") == DONE
    found = [json.loads((team.folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [variables[2:7] for variables in found] == [["0", "0", "0", "2", "lo"], ["1", "1", "0", "2", "lo"]]
    assert found[0][7] == found[1][7]
    assert not Path(found[0][7]).parent.exists()
    assert json.loads(found[0][1]) == {"config": {"seed": 1}, "run_dir": None, "plan": None}
    assert dict(os.environ) == before


def test_a_signal_is_forwarded_to_all_workers_and_then_to_the_earlier_handler(team):
    received = []
    earlier = signal.signal(signal.SIGUSR1, lambda number, frame: received.append((number, team.left())))
    try:
        team.signal_when_ready(signal.SIGUSR1)
        assert team.run(STOP) == PREEMPTED
        assert received == [(signal.SIGUSR1, [])]  # once, after all workers have ended
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(received) == 2  # the handler is restored
    finally:
        signal.signal(signal.SIGUSR1, earlier)


def test_a_signal_during_startup_is_delivered_later(team, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 10)
    early = "(here / f'ready{rank}').touch()\ntime.sleep(1)\n"  # like an import
    team.signal_when_ready(signal.SIGINT)
    assert team.run(early + "try: unblock_signals()\nexcept KeyboardInterrupt: sys.exit(130)") == INTERRUPTED
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("array", [None, "7"])
def test_slurms_signal_requeues_the_job(team, monkeypatch, array):
    calls = team.folder / "calls"
    (team.folder / "scontrol").write_text(f"#!/bin/sh\necho $* >> {calls}\n")
    (team.folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{team.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    team.signal_when_ready(signal.SIGUSR1)
    assert team.run(STOP) == PREEMPTED
    assert calls.read_text() == ("requeue 7_2\n" if array else "requeue 8\n")
    calls.unlink()
    for name in ("ready0", "ready1"):
        (team.folder / name).unlink()
    team.signal_when_ready(signal.SIGTERM)
    assert team.run(STOP) == PREEMPTED
    assert not calls.exists()  # the sender of SIGTERM decides whether to requeue


def test_an_interrupt_also_ends_workers_that_block_signals(team):
    owner, began = signal.getsignal(signal.SIGINT), time.monotonic()
    team.signal_when_ready(signal.SIGINT)
    assert team.run("(here / f'ready{rank}').touch()\ntime.sleep(60)") == INTERRUPTED
    assert team.is_gone()
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGINT) is owner


def test_workers_end_with_a_supervisor_that_is_killed(team):
    team.do("exit_with_parent()\nsubprocess.Popen(('sleep', '60'))\n(here / f'ready{rank}').touch()\ntime.sleep(60)")
    code = """
import sys
from types import SimpleNamespace
from gptlab.launch import supervisor
supervisor.WORKER_COMMAND = (sys.executable, "-m", "deeds")
trainer = SimpleNamespace(strategy="ddp", num_nodes=1, devices=2, accelerator="cpu")
config = SimpleNamespace(trainer=trainer, model_dump=lambda mode: {})
supervisor.supervise(supervisor.Job(config, None))
"""
    process = subprocess.Popen((sys.executable, "-c", code))
    team.wait_for("ready0", "ready1")
    assert len(team.left()) == 5
    process.kill()
    process.wait()
    assert team.is_gone()


def test_a_signal_before_training_starts_preempts_the_run():
    def run() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return DONE

    owner = signal.getsignal(signal.SIGTERM)
    assert signals.run_stoppable(run) == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is owner


def test_a_signal_handled_by_training_reaches_the_earlier_handler():
    received = []
    earlier = signal.signal(signal.SIGUSR2, lambda number, frame: received.append(number))

    def run() -> int:
        signal.signal(signal.SIGUSR2, lambda *_: None)  # like training
        os.kill(os.getpid(), signal.SIGUSR2)
        assert received == []
        return PREEMPTED

    try:
        assert signals.run_stoppable(run) == PREEMPTED
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert received == [signal.SIGUSR2]


@pytest.mark.parametrize(
    ("trainer", "number"),
    [
        ({"devices": 2}, 2),
        ({"strategy": "single", "devices": "auto"}, 1),
        ({"devices": "auto"}, 4),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": 10**6}, 1),  # the worker raises an error
        ({"devices": 2, "num_nodes": 2}, 1),  # likewise
    ],
)
def test_count_workers(monkeypatch, trainer, number):
    monkeypatch.setattr(supervisor, "count_gpus", lambda: 4)
    usual = {"strategy": "ddp", "num_nodes": 1, "accelerator": "auto"}
    assert supervisor._count_workers(SimpleNamespace(**usual | trainer)) == number
