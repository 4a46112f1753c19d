"""A run directory has one writer; a dead owner's lock is taken over."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptlab.errors import UserError
from gptlab.exit_codes import FAILED
from gptlab.tracking import run_lock
from gptlab.tracking.run_lock import LOCK, RunLock

HOLDER = """
import sys
from pathlib import Path
from gptlab.tracking import run_lock
run_lock.LEASE, run_lock.REFRESH = float(sys.argv[2]), 0.2
with run_lock.RunLock() as lock:
    lock.acquire(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""
LEASE = 3.0  # much longer than the time between refreshes, even on a busy machine


@pytest.fixture
def hold(tmp_path) -> Iterator:
    """Starts processes that hold the lock of tmp_path until their standard input is closed."""
    held = []

    def start(lease: float = run_lock.LEASE) -> subprocess.Popen:
        command = (sys.executable, "-c", HOLDER, str(tmp_path), str(lease))
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        held.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in held:
        process.kill()
        process.communicate()


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE", LEASE)
    monkeypatch.setattr(run_lock, "REFRESH", 0.2)
    monkeypatch.setattr(run_lock, "WAIT", 1.0)


def acquire(folder: Path) -> None:
    with RunLock() as lock:
        lock.acquire(folder)
        lock.acquire(folder)  # no effect
        assert (folder / LOCK).exists()
    assert not (folder / LOCK).exists()


def on_another_host(folder: Path) -> None:
    text = (folder / LOCK).read_text().replace(f"host={socket.gethostname()}", "host=elsewhere")
    assert "host=elsewhere" in text
    (folder / LOCK).write_text(text)


@pytest.mark.slow
def test_a_live_owner_keeps_its_lock_and_is_named(tmp_path, hold):
    owner = hold()
    with pytest.raises(UserError, match=rf"is being written by process {owner.pid} on {socket.gethostname()}"):
        acquire(tmp_path)
    assert owner.poll() is None
    owner.communicate()
    acquire(tmp_path)


def test_the_lock_of_a_killed_owner_is_taken_over_immediately(tmp_path, hold):
    owner = hold()
    owner.kill()
    owner.wait()
    assert (tmp_path / LOCK).exists()
    began = time.monotonic()
    acquire(tmp_path)
    assert time.monotonic() - began < run_lock.LEASE


def test_acquire_waits_for_an_owner_that_is_about_to_end(tmp_path, hold):
    owner, began = hold(), time.monotonic()
    threading.Timer(0.5, lambda: (owner.kill(), owner.wait())).start()
    acquire(tmp_path)
    assert 0.5 <= time.monotonic() - began < run_lock.LEASE


def test_a_reused_process_id_is_not_the_owner(tmp_path, hold):
    hold()
    text = (tmp_path / LOCK).read_text()
    start = next(line for line in text.splitlines() if line.startswith("start="))
    (tmp_path / LOCK).write_text(text.replace(start, f"start={int(start.removeprefix('start=')) - 1}"))
    acquire(tmp_path)


@pytest.mark.slow
def test_an_owner_on_another_host_counts_as_dead_without_refreshes(tmp_path, hold, short):
    owner = hold(LEASE)
    on_another_host(tmp_path)
    with pytest.raises(UserError, match=rf"is being written by process {owner.pid} on elsewhere"):
        acquire(tmp_path)
    owner.kill()
    owner.wait()
    acquire(tmp_path)


def test_the_lock_in_a_copied_directory_has_no_owner(tmp_path, hold, short):
    owner = hold(LEASE)
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    acquire(copy)
    assert owner.poll() is None


def test_a_suspended_owner_whose_run_was_taken_over_exits(tmp_path, hold, short):
    suspended = hold(LEASE)
    os.kill(suspended.pid, signal.SIGSTOP)
    with RunLock() as lock:
        lock.acquire(tmp_path)
        os.kill(suspended.pid, signal.SIGCONT)
        assert suspended.wait(timeout=60) == FAILED
        assert (tmp_path / LOCK).exists()
        assert f"process {os.getpid()} on".encode() in suspended.stderr.read()


def test_an_owner_whose_lock_was_deleted_exits(tmp_path, hold):
    owner = hold()
    (tmp_path / LOCK).unlink()
    assert owner.wait(timeout=60) == FAILED
    assert b"is lost" in owner.stderr.read()


def test_a_directory_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"nothing cannot be locked for writing: .*not a directory"):
        acquire(tmp_path / "file" / "nothing")
