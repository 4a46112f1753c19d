"""Checkpoint directories: atomic commit, verification and pruning."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from gptlab.training.checkpoints.records import (
    RECORD,
    CheckpointMetadata,
    best_intact,
    checkpoint_path,
    checkpoint_step,
    clean_up,
    commit,
    find_corruption,
    list_checkpoints,
    newest_intact,
    prune_checkpoints,
    unfinished_path,
)


def save(folder: Path, step: int, val_loss: float | None = None) -> Path:
    """Commits a checkpoint of two files."""
    checkpoint_dir = checkpoint_path(folder, step)
    unfinished = unfinished_path(checkpoint_dir)
    unfinished.mkdir(parents=True)
    for name in ("state.pt", "__0_0.distcp"):
        (unfinished / name).write_bytes(f"{name} of {step}".encode() * 100)
    written = {"state.pt": hashlib.sha256((unfinished / "state.pt").read_bytes()).hexdigest()}
    commit(unfinished, checkpoint_dir, CheckpointMetadata(step=step, val_loss=val_loss, evaluation_due=False), written)
    return checkpoint_dir


def steps(folder: Path) -> list[int]:
    return [checkpoint_step(checkpoint_dir) for checkpoint_dir in list_checkpoints(folder)]


def test_newest_is_by_step_and_best_is_by_val_loss(tmp_path):
    for step, loss in ((9, 2.0), (10, 1.0), (11, None), (1_000_000, 3.0), (999_999, 1.0)):
        save(tmp_path, step, loss)
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 1_000_000)
    assert best_intact(tmp_path) == checkpoint_path(tmp_path, 999_999)  # the newer of two with the same val loss


def test_without_val_losses_the_best_checkpoint_is_the_newest(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert best_intact(tmp_path) == checkpoint_path(tmp_path, 2)
    assert newest_intact(tmp_path / "nowhere") is None


def cut(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def flip(checkpoint_dir: Path) -> None:
    content = bytearray((checkpoint_dir / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint_dir / "state.pt").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "__0_0.distcp has 1,699 bytes instead of 1,700"),
        (flip, "state.pt has the SHA-256"),
        (lambda checkpoint_dir: (checkpoint_dir / "state.pt").unlink(), "state.pt: No such file"),
        (lambda checkpoint_dir: (checkpoint_dir / RECORD).unlink(), f"{RECORD}: No such file"),
        (lambda checkpoint_dir: (checkpoint_dir / RECORD).write_text("{}"), f"{RECORD} is not a record"),
    ],
    ids=["truncated", "one bit flipped", "missing file", "missing record", "invalid record"],
)
def test_a_damaged_checkpoint_is_reported_once_and_the_previous_one_is_used(tmp_path, caplog, damage, message):
    older, newer = save(tmp_path, 3, 1.0), save(tmp_path, 6, 0.5)
    damage(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_intact(tmp_path) == older
    (record,) = caplog.records
    assert str(newer) in record.message
    assert message in record.message
    assert find_corruption(older) is None
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert best_intact(tmp_path) == older
    (record,) = caplog.records
    assert message in record.message


def test_pruning_keeps_the_last_and_best_checkpoints_and_later_steps(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5), (9, 0.1)):
        save(tmp_path, step, loss)
    prune_checkpoints(tmp_path, 5, keep_last=2, keep_best=True)
    assert steps(tmp_path) == [2, 4, 5, 9]  # step 9 is later than the newest step of this run
    prune_checkpoints(tmp_path, 5, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [5, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000005", "step_000009"]


def test_pruning_keeps_checkpoints_with_a_damaged_record_which_may_be_the_best(tmp_path):
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0), (4, 4.0)):
        save(tmp_path, step, loss)
    (checkpoint_path(tmp_path, 2) / RECORD).write_text("{}")
    prune_checkpoints(tmp_path, 4, keep_last=1, keep_best=True)
    assert steps(tmp_path) == [1, 2, 4]


def test_a_file_that_differs_from_the_written_data_is_not_committed(tmp_path):
    unfinished = tmp_path / ".unfinished-step_000001"
    unfinished.mkdir()
    (unfinished / "state.pt").write_bytes(b"what the disk has")
    facts = CheckpointMetadata(step=1, val_loss=None, evaluation_due=False)
    with pytest.raises(OSError, match=r"state.pt on the disk differs from the data"):
        commit(
            unfinished,
            checkpoint_path(tmp_path, 1),
            facts,
            {"state.pt": hashlib.sha256(b"what was written").hexdigest()},
        )
    assert steps(tmp_path) == []


def test_the_record_has_the_size_and_sha256_of_every_file(tmp_path):
    checkpoint_dir = save(tmp_path, 7, 1.25)
    record = json.loads((checkpoint_dir / RECORD).read_text())
    assert record["facts"] == {"step": 7, "val_loss": 1.25, "evaluation_due": False}
    for name, file in record["files"].items():
        content = (checkpoint_dir / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    assert set(record["files"]) == {"state.pt", "__0_0.distcp"}


def test_files_are_synced_before_the_rename_and_the_parent_directory_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path / "checkpoints", 1)
    cut = events.index("rename")
    assert {"sync state.pt", "sync __0_0.distcp", "sync .unfinished-step_000001"} <= set(events[:cut])
    assert any(event.startswith("sync .record.json") for event in events[:cut])
    assert events[cut + 1 :] == ["sync checkpoints"]


def test_clean_up_removes_unfinished_checkpoints_with_a_warning(tmp_path, caplog):
    save(tmp_path, 3)
    unfinished = unfinished_path(checkpoint_path(tmp_path, 6))
    unfinished.mkdir()
    (unfinished / "state.pt").write_bytes(b"half")
    (tmp_path / ".removed-step_000001").mkdir()
    with caplog.at_level(logging.WARNING):
        clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    (record,) = caplog.records
    assert "unfinished checkpoint step_000006" in record.message
