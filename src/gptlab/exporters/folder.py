"""The folder that an export makes: whole, or not there. Imports no torch."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptlab.data.shards.manifest import fsync_path
from gptlab.errors import UserError


def check_output_free(out: Path) -> None:
    """See that nothing is in the way; UserError where there is something."""
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"out={out} is there already: an export makes a new folder, or fills an empty one.")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out``, which gets that name at the end; after an exception nothing of it is left.

    Raises:
        UserError: No folder can be made there.
    """
    out = out.absolute()
    beside = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error}.") from error
    try:
        yield beside
        for file in beside.iterdir():
            fsync_path(file)
        check_output_free(out)  # it may have been made in the meantime
        beside.rename(out)  # over an empty folder, too
        fsync_path(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
