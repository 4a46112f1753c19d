"""Checkpoint directories: naming, verification, atomic commit and pruning. Imports no torch.

``checkpoints/step_000200/`` holds the files saved after step 200 and, in record.json, the size and SHA-256 of each.
The directory is written under another name, synced, read back, and only then renamed. The record is written last.
"""

import hashlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from gptlab.config.base import FrozenConfig
from gptlab.errors import failure_reason
from gptlab.files import fsync_path, is_plain_name, open_regular, read_regular, write_durably
from gptlab.progress import Advance, track_reading

log = logging.getLogger(__name__)

FORMAT = 1
RECORD, STATE = "record.json", "state.pt"
PREFIX = "step_"
CHUNK = 2**20  # bytes that are hashed at a time
# prefixes of directories that are not checkpoints: being written, being removed, or being replaced
UNFINISHED, REMOVED, REPLACED = ".unfinished-", ".removed-", ".replaced-"


class CheckpointMetadata(FrozenConfig):
    """Step of a checkpoint, its val loss if it was evaluated, and whether its evaluation has yet to run."""

    step: int
    val_loss: float | None
    evaluation_due: bool


class SavedFile(FrozenConfig):
    """Size in bytes and SHA-256 of a checkpoint file."""

    bytes: int
    sha256: str


class CheckpointRecord(FrozenConfig):
    """Contents of record.json: the metadata of a checkpoint and its files, which are in the same directory."""

    format: Literal[1]
    facts: CheckpointMetadata
    files: dict[str, SavedFile]

    @field_validator("files")
    @classmethod
    def _has_plain_names(cls, files: dict[str, SavedFile]) -> dict[str, SavedFile]:
        if elsewhere := [name for name in files if not is_plain_name(name)]:
            raise ValueError(f"it names {elsewhere[0]!r:.200}, which is not a file in the same directory")
        if STATE not in files:
            raise ValueError(f"it does not name {STATE}")
        return files


def checkpoint_path(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step."""
    return folder / f"{PREFIX}{step:06d}"


def checkpoint_step(checkpoint_dir: Path) -> int:
    """Returns the step of a checkpoint."""
    return int(checkpoint_dir.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints of a run by step, newest last; they are not verified. Does not follow links."""
    found = () if folder.is_symlink() else folder.glob(f"{PREFIX}*")
    return sorted(
        (p for p in found if p.name.removeprefix(PREFIX).isdecimal() and not p.is_symlink()), key=checkpoint_step
    )


def read_record(checkpoint_dir: Path) -> CheckpointRecord:
    """Reads the record of a checkpoint; raises OSError or ValueError if it is missing or damaged."""
    return CheckpointRecord.model_validate_json(read_regular(checkpoint_dir / RECORD))


def find_corruption(checkpoint_dir: Path) -> str | None:
    """Describes the first defect of a checkpoint, or returns None if it is intact; reads and hashes every file."""
    try:
        record = read_record(checkpoint_dir)
        for path in checkpoint_dir.iterdir():  # also those that are not recorded, such as a link named .metadata
            open_regular(path).close()
        for name, expected in record.files.items():
            if (size := (checkpoint_dir / name).lstat().st_size) != expected.bytes:
                return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
        size = sum(file.bytes for file in record.files.values())
        with track_reading(f"Verifying {checkpoint_dir.name}", size) as advance:
            hashes = _hashes(checkpoint_dir, record.files, advance)
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:  # pydantic's ValidationError, or a UnicodeDecodeError
        return f"{RECORD} is not a record of format {FORMAT}: {failure_reason(error)}"
    wrong = next((name for name, found in hashes.items() if found != record.files[name]), None)
    return wrong and f"{wrong} has the SHA-256 {hashes[wrong].sha256} instead of {record.files[wrong].sha256}"


def newest_intact(folder: Path) -> Path | None:
    """Finds the newest intact checkpoint; logs a warning for each newer one that is damaged."""
    return _first_intact(reversed(list_checkpoints(folder)))


def best_intact(folder: Path) -> Path | None:
    """Finds the intact checkpoint with the lowest val loss, or the newest if none has a val loss.

    Logs a warning for each checkpoint that is damaged and has a lower val loss, or one that is not known.
    """
    return _first_intact(sorted(list_checkpoints(folder), key=_rank))


def commit(unfinished: Path, checkpoint_dir: Path, facts: CheckpointMetadata, written: dict[str, str]) -> None:
    """Turns a directory into a checkpoint: syncs and rereads its files, records their hashes, and renames it.

    Args:
        unfinished: The directory, with the same parent as ``checkpoint_dir``.
        checkpoint_dir: Path of the checkpoint; an existing one is replaced.
        facts: Metadata of the checkpoint.
        written: SHA-256 of the data that was written, for the files for which it is known.

    Raises:
        OSError: A file that is read back differs from the data that was written.
    """
    names = sorted(path.name for path in unfinished.iterdir())
    for name in names:
        fsync_path(unfinished / name)
    files = _hashes(unfinished, names)
    for name, sha256 in written.items():
        if files[name].sha256 != sha256:
            raise OSError(f"{unfinished / name} on the disk differs from the data that was written")
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
    """Removes checkpoints up to ``newest_step``, except the last ``keep_last`` and, if ``keep_best``, the best one."""
    found = [
        checkpoint_dir for checkpoint_dir in list_checkpoints(folder) if checkpoint_step(checkpoint_dir) <= newest_step
    ]
    kept = set(found[-keep_last:])
    if keep_best:
        ranked = sorted(found, key=_rank)
        unknown = [checkpoint_dir for checkpoint_dir in ranked if _rank(checkpoint_dir)[0] == -math.inf]
        kept.update(ranked[: len(unknown) + 1])
    for checkpoint_dir in found:
        if checkpoint_dir not in kept:
            remove_checkpoint(checkpoint_dir)


def remove_checkpoint(checkpoint_dir: Path) -> None:
    """Removes a checkpoint; it is renamed first, so that an incomplete checkpoint never has its name."""
    removed = checkpoint_dir.with_name(REMOVED + checkpoint_dir.name)
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint_dir.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def unfinished_path(checkpoint_dir: Path) -> Path:
    """Returns the path of the directory in which a checkpoint is written."""
    return checkpoint_dir.with_name(UNFINISHED + checkpoint_dir.name)


def clean_up(folder: Path) -> None:
    """Removes directories left by an interrupted run; restores a replaced checkpoint and warns of unfinished ones."""
    for path in folder.glob(f"{REPLACED}*"):
        checkpoint_dir = path.with_name(path.name.removeprefix(REPLACED))
        path.rename(checkpoint_dir if not checkpoint_dir.exists() else path.with_name(REMOVED + checkpoint_dir.name))
    for path in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
        log.warning("Removed the unfinished checkpoint %s of an interrupted run.", path.name.removeprefix(UNFINISHED))


def _first_intact(checkpoint_dirs: Iterable[Path]) -> Path | None:
    for checkpoint_dir in checkpoint_dirs:
        if (defect := find_corruption(checkpoint_dir)) is None:
            return checkpoint_dir
        log.warning("%s is damaged and is not used: %s.", checkpoint_dir, defect)
    return None


def _rank(checkpoint_dir: Path) -> tuple[float, int]:
    """Returns the sort key of a checkpoint: val loss, then steps.

    A checkpoint with a damaged record may be the best, so it is first. One without a val loss is last.
    """
    try:
        loss = read_record(checkpoint_dir).facts.val_loss
    except (OSError, ValueError):
        loss = -math.inf
    return math.inf if loss is None else loss, -checkpoint_step(checkpoint_dir)


def _hashes(folder: Path, names: Iterable[str], advance: Advance = lambda _: None) -> dict[str, SavedFile]:
    """Hashes files as they are on the disk, four at a time; an exception of a signal ends it immediately."""
    names, ended = list(names), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        try:
            return dict(zip(names, pool.map(lambda name: _hash(folder / name, ended, advance), names), strict=True))
        finally:
            ended.set()


def _hash(path: Path, ended: threading.Event, advance: Advance) -> SavedFile:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open_regular(path) as file:
        if hasattr(os, "posix_fadvise"):  # drop cached pages, so that the file is read from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while (size := file.readinto(buffer)) and not ended.is_set():
            digest.update(buffer[:size])
            advance(size)
        return SavedFile(bytes=file.tell(), sha256=digest.hexdigest())
