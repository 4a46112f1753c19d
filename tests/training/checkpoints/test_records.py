"""A checkpoint is there whole or not at all, and what is kept is what was asked for."""

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
    """A checkpoint of two files."""
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


def test_the_newest_is_by_step_and_the_best_by_loss(tmp_path):
    for step, loss in ((9, 2.0), (10, 1.0), (11, None), (1_000_000, 3.0), (999_999, 1.0)):
        save(tmp_path, step, loss)
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 1_000_000)
    assert best_intact(tmp_path) == checkpoint_path(tmp_path, 999_999)  # of equal ones the newer


def test_without_an_evaluation_the_newest_is_the_best(tmp_path):
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
    ("harm", "told"),
    [
        (cut, "__0_0.distcp has 1,699 bytes instead of 1,700"),
        (flip, "state.pt has the SHA-256"),
        (lambda checkpoint_dir: (checkpoint_dir / "state.pt").unlink(), "state.pt: No such file"),
        (lambda checkpoint_dir: (checkpoint_dir / RECORD).unlink(), f"{RECORD}: No such file"),
        (lambda checkpoint_dir: (checkpoint_dir / RECORD).write_text("{}"), f"{RECORD} is not a record"),
    ],
    ids=["truncated", "one bit flipped", "a file missing", "no record", "no such record"],
)
def test_a_damaged_checkpoint_is_named_once_and_the_one_before_is_used(tmp_path, caplog, harm, told):
    older, newer = save(tmp_path, 3, 1.0), save(tmp_path, 6, 0.5)
    harm(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_intact(tmp_path) == older
    (record,) = caplog.records
    assert str(newer) in record.message
    assert told in record.message
    assert find_corruption(older) is None
    assert best_intact(tmp_path) == older


def test_the_last_ones_and_the_best_are_kept_and_later_ones_left_alone(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5), (9, 0.1)):
        save(tmp_path, step, loss)
    prune_checkpoints(tmp_path, 5, keep_last=2, keep_best=True)
    assert steps(tmp_path) == [2, 4, 5, 9]  # 9 is of a time that this run has not come to
    prune_checkpoints(tmp_path, 5, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [5, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000005", "step_000009"]


def test_what_is_not_on_the_disk_as_it_was_written_becomes_no_checkpoint(tmp_path):
    unfinished = tmp_path / ".unfinished-step_000001"
    unfinished.mkdir()
    (unfinished / "state.pt").write_bytes(b"what the disk has")
    facts = CheckpointMetadata(step=1, val_loss=None, evaluation_due=False)
    with pytest.raises(OSError, match=r"state.pt is not on the disk as it was written"):
        commit(
            unfinished,
            checkpoint_path(tmp_path, 1),
            facts,
            {"state.pt": hashlib.sha256(b"what was written").hexdigest()},
        )
    assert steps(tmp_path) == []


def test_the_record_can_be_checked_with_common_tools(tmp_path):
    checkpoint_dir = save(tmp_path, 7, 1.25)
    record = json.loads((checkpoint_dir / RECORD).read_text())
    assert record["facts"] == {"step": 7, "val_loss": 1.25, "evaluation_due": False}
    for name, file in record["files"].items():
        content = (checkpoint_dir / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    assert set(record["files"]) == {"state.pt", "__0_0.distcp"}


def test_every_file_is_synced_before_the_name_is_given_and_the_name_after(tmp_path, monkeypatch):
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


def test_what_a_killed_run_was_writing_is_cleared_away_and_told(tmp_path, caplog):
    save(tmp_path, 3)
    unfinished = unfinished_path(checkpoint_path(tmp_path, 6))
    unfinished.mkdir()
    (unfinished / "state.pt").write_bytes(b"half")
    (tmp_path / ".removed-step_000001").mkdir()
    with caplog.at_level(logging.WARNING):
        clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    assert [record.message for record in caplog.records] == [
        "The run ended while it wrote step_000006, which is ignored."
    ]
