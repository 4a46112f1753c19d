"""Files of W&B's client in a run directory: wandb/[offline-]run-<time>-<id>/run-<id>.wandb, one per start.

Such a file is a log as LevelDB has it (blocks of 32 KiB, at whose borders records are cut), after a header of seven
bytes that counts into the first block; its records are W&B's protobuf messages. W&B documents none of it, and has no
public reader (read in wandb 0.31.0).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

BLOCK, HEADER = 32 * 1024, 7  # bytes; a piece of a record has a header of seven bytes as well
FULL, LAST = 1, 4  # pieces that end a record (doc/log_format.md of LevelDB)
SYNCED_SUFFIX = ".wandb.synced"  # how W&B itself marks a record that its server has


def wandb_records(directory: Path) -> list[Path]:
    """Returns the records of a run, oldest first."""
    records = directory.glob("wandb/*run-*/run-*.wandb")
    return sorted((path for path in records if not path.parent.is_symlink()), key=_time)


def mark_synced(record: Path) -> None:
    """Marks a record as one that the server has, for `wandb sync`."""
    record.with_suffix(SYNCED_SUFFIX).touch()


def sync_command(directory: Path) -> str:
    """Returns the command that uploads what W&B does not have of a run yet."""
    unsent = [path.parent for path in wandb_records(directory) if not path.with_suffix(SYNCED_SUFFIX).exists()]
    return f"wandb sync --include-online {' '.join(os.path.relpath(path) for path in unsent)}"


def last_step(record: Path) -> int:
    """Returns the last step of which a record has a row; -1 if it has none."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time

    found = (Record.FromString(message) for message, _ in _messages(record.read_bytes()))
    return max((message.history.step.num for message in found if message.HasField("history")), default=-1)


def truncate_incomplete(record: Path) -> None:
    """Truncates an incomplete message of a killed run, at which `wandb sync` would stop."""
    content = record.read_bytes()
    whole = max((end for _, end in _messages(content)), default=HEADER)
    if whole < len(content):
        os.truncate(record, whole)


def _messages(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the messages of a log, each with its end; stops at an incomplete or damaged one."""
    position, message = HEADER, b""
    while position + HEADER <= len(content):
        if (left := BLOCK - position % BLOCK) < HEADER:  # too short for a piece, and left empty
            position += left
            continue
        checksum, size = (int.from_bytes(content[position + i : position + j], "little") for i, j in ((0, 4), (4, 6)))
        piece = content[position + 6 : position + HEADER + size]  # its kind and its part of the message
        if crc32(piece) != checksum:
            return
        position += HEADER + size
        kind, message = piece[0], message + piece[1:]
        if kind in (FULL, LAST):
            yield message, position
            message = b""


def _time(record: Path) -> str:
    return record.parent.name.split("run-", 1)[1]
