"""Files of W&B's client in a run directory: wandb/[offline-]run-<time>-<id>/run-<id>.wandb, one per start.

Such a file is a log in LevelDB's format (blocks of 32 KiB, at whose boundaries records are split) after a header of
seven bytes, which is part of the first block. Its records are W&B's protobuf messages. W&B does not document the format
and has no public reader (checked in wandb 0.31.0).
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from gptlab.files import open_regular, truncate

BLOCK, HEADER = 32 * 1024, 7  # bytes; each fragment of a record also has a header of seven bytes
FULL, LAST = 1, 4  # types of fragments that end a record (doc/log_format.md of LevelDB)
SYNCED_SUFFIX = ".wandb.synced"  # W&B's marker file of a record that has been uploaded


def wandb_records(directory: Path) -> list[Path]:
    """Returns the records of a run, oldest first."""
    records = directory.glob("wandb/*run-*/run-*.wandb")
    return sorted((path for path in records if not path.parent.is_symlink()), key=_time)


def mark_synced(record: Path) -> None:
    """Marks a record as uploaded, for `wandb sync`."""
    truncate(record.with_suffix(SYNCED_SUFFIX), 0)


def sync_command(directory: Path) -> str:
    """Returns the command that uploads the records of a run that W&B does not have yet."""
    unsent = [path.parent for path in wandb_records(directory) if not path.with_suffix(SYNCED_SUFFIX).exists()]
    return shlex.join(("wandb", "sync", "--include-online", *map(os.path.relpath, unsent)))


def last_step(record: Path) -> int:
    """Returns the last step for which a record has a row; -1 if it has no rows."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # generated at run time

    found = (Record.FromString(message) for message, _ in _messages(_read(record)))
    return max((message.history.step.num for message in found if message.HasField("history")), default=-1)


def truncate_incomplete(record: Path) -> None:
    """Removes an incomplete message of a killed run from the end of a record, since `wandb sync` would fail on it."""
    content = _read(record)
    whole = max((end for _, end in _messages(content)), default=HEADER)
    if whole < len(content):
        truncate(record, whole)


def _read(record: Path) -> bytes:
    with open_regular(record) as file:
        return file.read()


def _messages(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the messages of a log, each with its end position; stops at an incomplete or damaged one."""
    position, message = HEADER, b""
    while position + HEADER <= len(content):
        if (left := BLOCK - position % BLOCK) < HEADER:  # too short for a fragment: padding
            position += left
            continue
        checksum, size = (int.from_bytes(content[position + i : position + j], "little") for i, j in ((0, 4), (4, 6)))
        fragment = content[position + 6 : position + HEADER + size]  # type and part of the message
        if crc32(fragment) != checksum:
            return
        position += HEADER + size
        kind, message = fragment[0], message + fragment[1:]
        if kind in (FULL, LAST):
            yield message, position
            message = b""


def _time(record: Path) -> str:
    return record.parent.name.split("run-", 1)[1]
