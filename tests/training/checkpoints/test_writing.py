"""Crash safety of checkpoints: an intact checkpoint exists at any time."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gptlab.errors import UserError
from gptlab.training.checkpoints import writing
from gptlab.training.checkpoints.reading import flatten_tensors, read_checkpoint
from gptlab.training.checkpoints.records import (
    CheckpointMetadata,
    checkpoint_path,
    checkpoint_step,
    clean_up,
    find_corruption,
    list_checkpoints,
    newest_intact,
)
from gptlab.training.checkpoints.writing import AtomicCheckpointIO


def state_of(step: int) -> dict:
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.full((3, 2), 0.1 * step)}
    optimizer = {"state": {"wte.weight": moments}, "param_groups": [{"lr": 0.1, "params": ["wte.weight"]}]}
    return {
        "global_step": step,
        "callbacks": {"MetricsCallback": {"best": {"val/loss": 1.5}}},
        "state_dict": {"wte.weight": torch.arange(6.0).reshape(3, 2) + step},
        "optimizer_states": [optimizer],
    }


def save(files: AtomicCheckpointIO, folder: Path, step: int) -> Path:
    checkpoint_dir = checkpoint_path(folder, step)
    files.save_checkpoint(
        state_of(step), checkpoint_dir, CheckpointMetadata(step=step, val_loss=None, evaluation_due=False)
    )
    return checkpoint_dir


def same(found: dict, step: int) -> bool:
    expected = state_of(step)
    plain = all(found[key] == expected[key] for key in ("global_step", "callbacks"))
    one, other = flatten_tensors(found), flatten_tensors(expected)
    return plain and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def files():
    return AtomicCheckpointIO(keep_last=2, keep_best=False, asynchronous=False)


@pytest.fixture
def threaded():
    return AtomicCheckpointIO(keep_last=1, keep_best=False, asynchronous=True)


def test_a_checkpoint_is_read_as_written_also_with_torch_load(files, tmp_path):
    checkpoint_dir = save(files, tmp_path, 3)
    assert same(read_checkpoint(checkpoint_dir), 3)
    assert same(torch.load(checkpoint_dir / "state.pt", weights_only=True), 3)


def test_listeners_are_called_after_the_commit_and_before_pruning(files, tmp_path):
    calls = []
    files.listeners.append(
        lambda checkpoint_dir, facts: calls.append(
            (facts.step, find_corruption(checkpoint_dir), len(list_checkpoints(tmp_path)))
        )
    )
    for step in (1, 2, 3, 4):
        save(files, tmp_path, step)
    assert calls == [(1, None, 1), (2, None, 2), (3, None, 3), (4, None, 3)]  # keep_last=2


def test_a_save_killed_at_any_file_operation_leaves_an_intact_checkpoint(files, tmp_path):
    """Kills the process before the n-th file operation (open, rename, create, remove), for every n.

    The process saves step 3 twice, as a resumed run does after an evaluation that was due.
    """
    outcomes = []
    for deadly in range(1, 200):
        folder = tmp_path / str(deadly)
        save(files, folder, 1)
        save(files, folder, 2)
        if (child := os.fork()) == 0:
            _save_and_die(files, folder, deadly)
        killed = os.waitpid(child, 0)[1] != 0
        assert all(
            find_corruption(checkpoint_dir) is None for checkpoint_dir in list_checkpoints(folder)
        )  # none is incomplete
        clean_up(folder)
        whole = newest_intact(folder)
        assert whole is not None
        assert checkpoint_step(whole) in (2, 3)
        assert same(read_checkpoint(whole), checkpoint_step(whole))
        outcomes.append(checkpoint_step(whole))
        save(files, folder, 3)  # the resumed run saves this step again
        assert same(read_checkpoint(checkpoint_path(folder, 3)), 3)
        assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000003"]
        if not killed:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes.count(2) > 5
    assert outcomes.count(3) > 10  # it is not removed again


def _save_and_die(files: AtomicCheckpointIO, folder: Path, deadly: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(arguments[0]):
            seen += 1
            if seen == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(files, folder, 3)
    save(files, folder, 3)
    os._exit(0)


def test_the_background_thread_writes_the_state_at_the_time_of_the_save(threaded, tmp_path, monkeypatch):
    begin, write = threading.Event(), writing._write_state

    def write_later(*arguments):
        assert begin.wait(10)
        return write(*arguments)

    monkeypatch.setattr(writing, "_write_state", write_later)
    state = state_of(1)
    threaded.save_checkpoint(
        state, checkpoint_path(tmp_path, 1), CheckpointMetadata(step=1, val_loss=None, evaluation_due=False)
    )
    state["state_dict"]["wte.weight"].zero_()  # training continues
    threaded.check()  # does not wait
    assert list_checkpoints(tmp_path) == []
    begin.set()
    threaded.wait()
    assert same(read_checkpoint(checkpoint_path(tmp_path, 1)), 1)


def test_the_next_check_raises_an_error_of_the_thread_and_nothing_is_removed(threaded, tmp_path, monkeypatch):
    save(threaded, tmp_path, 1)
    threaded.wait()

    def fail(*_):
        raise RuntimeError("the writer fails")

    monkeypatch.setattr(writing, "_write_state", fail)
    save(threaded, tmp_path, 2)
    writing_ended = threaded._pending
    assert writing_ended is not None
    assert isinstance(writing_ended.exception(timeout=10), RuntimeError)
    with pytest.raises(RuntimeError, match="the writer fails"):
        threaded.check()
    threaded.check()  # raised only once
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 1)


def test_the_next_save_raises_an_error_of_the_thread(threaded, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_write_state", lambda *_: 1 / 0)
    save(threaded, tmp_path, 1)
    with pytest.raises(ZeroDivisionError):
        save(threaded, tmp_path, 2)


def test_old_checkpoints_are_removed_only_after_the_new_one_is_verified(files, tmp_path, monkeypatch):
    save(files, tmp_path, 1)
    save(files, tmp_path, 2)

    def fail(*_):
        raise OSError("state.pt differs")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "commit", fail)
        with pytest.raises(OSError, match="differs"):
            save(files, tmp_path, 3)
    assert [checkpoint_step(checkpoint_dir) for checkpoint_dir in list_checkpoints(tmp_path)] == [1, 2]
    save(files, tmp_path, 3)
    assert [checkpoint_step(checkpoint_dir) for checkpoint_dir in list_checkpoints(tmp_path)] == [2, 3]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_logged_and_training_continues(files, tmp_path, monkeypatch, caplog, number):
    save(files, tmp_path, 1)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing, "_write_state", fail)
    with caplog.at_level(logging.ERROR):
        save(files, tmp_path, 2)
    (record,) = caplog.records
    assert "is full, so the checkpoint of step 2 was not saved" in record.message
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_other_disk_errors_are_raised(files, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writing, "_write_state", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(files, tmp_path, 1)


SMALL_DISK = """
set -e
mount -t tmpfs -o size=64k none "$1"
"$2" "$3" "$1"
cp -r "$1" "$1/../copied"
"""

FILLING = """
import logging, sys, torch
from pathlib import Path
from gptlab.training.checkpoints.records import CheckpointMetadata, checkpoint_path
from gptlab.training.checkpoints.writing import AtomicCheckpointIO

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
files = AtomicCheckpointIO(keep_last=2, keep_best=False, asynchronous=False)
for step, size in ((1, 1000), (2, 100_000), (3, 1000), (4, 1000)):
    path = checkpoint_path(Path(sys.argv[1]), step)
    metadata = CheckpointMetadata(step=step, val_loss=None, evaluation_due=False)
    files.save_checkpoint({"global_step": step, "state_dict": torch.ones(size)}, path, metadata)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounting a small disk needs unshare")
def test_on_a_full_disk_the_older_checkpoint_is_kept_and_later_ones_are_written(tmp_path):
    disk, script = tmp_path / "disk", tmp_path / "filling.py"
    disk.mkdir()
    script.write_text(FILLING)
    command = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", str(disk), sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"cannot mount a disk: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ERROR") == done.stdout.count("checkpoint of step 2 was not saved") == 1
    assert [path.name for path in sorted((tmp_path / "copied").iterdir())] == ["step_000003", "step_000004"]


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_reading_a_checkpoint_executes_nothing(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"global_step": 1, "state_dict": Payload(canary)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state.pt was not loaded: .* other than tensors"):
        read_checkpoint(tmp_path)
    assert not canary.exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert canary.exists()
