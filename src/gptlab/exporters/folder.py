"""The folder that an export makes: whole, or not there. Imports no torch."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptlab.data.shards.manifest import sync
from gptlab.errors import UserError


def check_free(out: Path) -> None:
    """See that nothing is in the way; UserError where there is something."""
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"out={out} is there already: an export makes a new folder, or fills an empty one.")


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
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
            sync(file)
        check_free(out)  # it may have been made in the meantime
        beside.rename(out)  # over an empty folder, too
        sync(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
