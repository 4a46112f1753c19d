"""Checkpoints on disk: folders that are there whole, or not at all. Imports no torch.

``checkpoints/step_000200/`` holds what was saved after step 200 and, in record.json, the size and SHA-256 of each file.
It is written under another name, synced, read back, and only then renamed; the record is its last file.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from gptlab.config.base import FrozenConfig
from gptlab.data.shards.manifest import fsync_path, write_durably

log = logging.getLogger(__name__)

FORMAT = 1
RECORD, STATE = "record.json", "state.pt"
PREFIX = "step_"
# prefixes of folders that are no checkpoints: not yet, no longer, or not for the moment that another takes its place
UNFINISHED, REMOVED, REPLACED = ".unfinished-", ".removed-", ".replaced-"


class CheckpointMetadata(FrozenConfig):
    """What a checkpoint is of: its step, and that step's evaluation, which may be yet to come."""

    step: int
    val_loss: float | None
    evaluation_due: bool


class SavedFile(FrozenConfig):
    """A file of a checkpoint."""

    bytes: int
    sha256: str


class CheckpointRecord(FrozenConfig):
    """What a checkpoint holds."""

    format: Literal[1]
    facts: CheckpointMetadata
    files: dict[str, SavedFile]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return folder / f"{PREFIX}{step:06d}"


def checkpoint_step(checkpoint_dir: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint_dir.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest last; they may be damaged."""
    return sorted((p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()), key=checkpoint_step)


def read_record(checkpoint_dir: Path) -> CheckpointRecord:
    """Read the record of a checkpoint; OSError or ValueError where there is none, or it is damaged."""
    return CheckpointRecord.model_validate_json((checkpoint_dir / RECORD).read_text(encoding="utf-8"))


def find_corruption(checkpoint_dir: Path) -> str | None:
    """Say what is wrong with a checkpoint, reading all of it; None where it is what was written."""
    try:
        record = read_record(checkpoint_dir)
        for name, expected in record.files.items():
            if (size := (checkpoint_dir / name).stat().st_size) != expected.bytes:
                return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
        hashes = _hashes(checkpoint_dir, record.files)
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename else str(error)
    except ValueError:
        return f"{RECORD} is not a record of format {FORMAT}"
    wrong = next((name for name, found in hashes.items() if found != record.files[name]), None)
    return wrong and f"{wrong} has the SHA-256 {hashes[wrong].sha256} instead of {record.files[wrong].sha256}"


def newest_intact(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole, warning of each that is not."""
    return _first_intact(reversed(list_checkpoints(folder)))


def best_intact(folder: Path) -> Path | None:
    """Find the whole checkpoint with the lowest val loss; the newest where none was evaluated."""
    return _first_intact(
        sorted(
            list_checkpoints(folder),
            key=lambda checkpoint_dir: (_val_loss(checkpoint_dir), -checkpoint_step(checkpoint_dir)),
        )
    )


def commit(unfinished: Path, checkpoint_dir: Path, facts: CheckpointMetadata, written: dict[str, str]) -> None:
    """Make a checkpoint of a folder of files: sync them, read them back, record their hashes, and rename the folder.

    Args:
        unfinished: The folder, beside its place.
        checkpoint_dir: The checkpoint; one that is there already is replaced.
        facts: What it is of.
        written: The SHA-256 of what was written, for the files of which it is known.

    Raises:
        OSError: A file comes back from the disk other than it was written.
    """
    names = sorted(path.name for path in unfinished.iterdir())
    for name in names:
        fsync_path(unfinished / name)
    files = _hashes(unfinished, names)
    for name, sha256 in written.items():
        if files[name].sha256 != sha256:
            raise OSError(f"{unfinished / name} is not on the disk as it was written")
    write_durably(
        unfinished / RECORD, CheckpointRecord(format=FORMAT, facts=facts, files=files).model_dump_json(indent=2) + "\n"
    )
    fsync_path(unfinished)
    replaced = checkpoint_dir.with_name(REPLACED + checkpoint_dir.name)
    if checkpoint_dir.exists():
        checkpoint_dir.rename(replaced)
    unfinished.rename(checkpoint_dir)
    fsync_path(checkpoint_dir.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune_checkpoints(folder: Path, newest_step: int, keep_last: int, keep_best: bool) -> None:
    """Remove all checkpoints up to a step but the last few and the best."""
    places = [
        checkpoint_dir for checkpoint_dir in list_checkpoints(folder) if checkpoint_step(checkpoint_dir) <= newest_step
    ]
    kept = set(places[-keep_last:])
    if keep_best and places:
        kept.add(min(places, key=lambda checkpoint_dir: (_val_loss(checkpoint_dir), -checkpoint_step(checkpoint_dir))))
    for checkpoint_dir in places:
        if checkpoint_dir not in kept:
            remove_checkpoint(checkpoint_dir)


def remove_checkpoint(checkpoint_dir: Path) -> None:
    """Remove a checkpoint, which is never there in part."""
    doomed = checkpoint_dir.with_name(REMOVED + checkpoint_dir.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint_dir.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def unfinished_path(checkpoint_dir: Path) -> Path:
    """Name the folder in which a checkpoint is written."""
    return checkpoint_dir.with_name(UNFINISHED + checkpoint_dir.name)


def clean_up(folder: Path) -> None:
    """Take away what an ended run was writing or removing, and say so of a checkpoint it never finished."""
    for path in folder.glob(f"{REPLACED}*"):
        checkpoint_dir = path.with_name(path.name.removeprefix(REPLACED))
        path.rename(checkpoint_dir if not checkpoint_dir.exists() else path.with_name(REMOVED + checkpoint_dir.name))
    for path in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
        log.warning("The run ended while it wrote %s, which is ignored.", path.name.removeprefix(UNFINISHED))


def _first_intact(places: Iterable[Path]) -> Path | None:
    for checkpoint_dir in places:
        if (what := find_corruption(checkpoint_dir)) is None:
            return checkpoint_dir
        log.warning("%s is damaged and is not used: %s.", checkpoint_dir, what)
    return None


def _val_loss(checkpoint_dir: Path) -> float:
    """The val loss of a checkpoint; infinite where it has none."""
    try:
        loss = read_record(checkpoint_dir).facts.val_loss
    except (OSError, ValueError):
        return math.inf
    return math.inf if loss is None else loss


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, SavedFile]:
    """Hash files as the disk has them, several at a time."""
    names = list(names)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(path: Path) -> SavedFile:
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # what is in memory proves nothing of the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SavedFile(bytes=file.tell(), sha256=digest)
