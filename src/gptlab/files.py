"""Reads and writes files of directories that may come from somebody else, without following links. Imports no torch.

A run directory, a checkpoint or prepared data may contain links to other files of the user, devices that never end, and
FIFOs that block. Reading opens regular files only. Writing creates a file under an unpredictable name and renames it,
which replaces a link instead of following it.
"""

import errno
import logging
import os
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path, PurePath
from typing import BinaryIO, TextIO

from gptlab.errors import UserError

COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
MAX_BYTES = 2**26  # far above the largest file of its kind that gptlab writes
log = logging.getLogger(__name__)
_not_written: set[Path] = set()  # since the disk is full


def is_plain_name(name: str) -> bool:
    """Returns whether ``name`` is a plain file name, without a directory."""
    return name not in ("", "..") and PurePath(name).name == name and "\0" not in name and "\\" not in name


def open_regular(path: Path, *, follow: bool = False) -> FileIO:
    """Opens a regular file for reading, unbuffered.

    Args:
        path: Path of the file.
        follow: Whether the last part of the path may be a link to the file.

    Raises:
        OSError: The file is missing, a link, or not a regular file; ``strerror`` says which.
    """
    return FileIO(str(path), "rb", opener=lambda *_: _open(path, os.O_RDONLY, follow=follow))


def stat_regular(path: str, *, follow: bool = False) -> os.stat_result:
    """Returns the status of a regular file without opening it, which takes long on a network file system.

    Args:
        path: Path of the file.
        follow: Whether the last part of the path may be a link to the file.

    Raises:
        OSError: The file is missing, a link, not a regular file, or may not be read; ``strerror`` says which.
    """
    found = os.stat(path, follow_symlinks=follow)  # noqa: PTH116  (Path is slow for thousands of files)
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, "it is a link", path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    if not found.st_mode & stat.S_IROTH and not os.access(path, os.R_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
    return found


def read_regular(path: Path, limit: int = MAX_BYTES, *, follow: bool = False) -> str:
    """Reads a UTF-8 text file.

    Args:
        path: Path of the file.
        limit: Maximum size in bytes.
        follow: See ``open_regular``.

    Raises:
        OSError: The file is missing, a link, not a regular file, or larger than ``limit``.
        UnicodeDecodeError: The file is not UTF-8 text.
    """
    with os.fdopen(_open(path, os.O_RDONLY, follow=follow), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content.decode("utf-8")


def open_append(path: Path) -> TextIO:
    """Opens a regular file, created if missing, to append text; raises OSError for anything else, such as a link."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8")


def append_whole(path: Path, content: str, offset: int | None = None) -> None:
    """Appends text to an existing regular file; if that fails, the file remains as it was.

    Args:
        path: The file, to which no other process writes.
        content: Text to append.
        offset: Size in bytes of the part of the file that is kept; the text replaces the rest. None: the whole file.

    Raises:
        OSError: The file is missing, a link, or not a regular file, or the disk is full.
    """
    descriptor = _open(path, os.O_RDWR)
    try:
        size, rest = os.fstat(descriptor).st_size, content.encode()
        start = position = size if offset is None else min(offset, size)
        replaced = os.pread(descriptor, size - start, start)
        try:
            while rest:
                written = os.pwrite(descriptor, rest, position)
                rest, position = rest[written:], position + written
        except OSError:
            os.pwrite(descriptor, replaced, start)  # its blocks are allocated
            os.ftruncate(descriptor, size)
            raise
        os.ftruncate(descriptor, position)
    finally:
        os.close(descriptor)


def truncate(path: Path, size: int) -> None:
    """Truncates a regular file, created if missing, if it is larger. Raises OSError if it is anything else."""
    descriptor = _open(path, os.O_WRONLY | os.O_CREAT)
    try:
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a small file atomically and syncs it; replaces a link."""
    write_file(path, content, sync=True)


def write_file(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Writes a small file atomically; replaces a link.

    Args:
        path: Path of the file.
        content: Text, which is encoded as UTF-8, or bytes.
        sync: Whether to sync the file to disk.

    Raises:
        UserError: There is a directory at ``path``.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        if sync:
            os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Context manager that returns a new file, which atomically replaces ``path`` at the end of its block.

    If the block raises an exception, the new file is removed.

    Raises:
        UserError: There is a directory at ``path``.
    """
    unfinished = temporary_path(path)
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    except IsADirectoryError:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: it is a directory. Remove it.") from None
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def check_output(path: Path, key: str, mark: str, *, overwrite: bool) -> None:
    """Checks that a command may write an output file: it does not exist, or this command wrote it.

    Args:
        path: Path of the file.
        key: Config key that has the path, for the message.
        mark: Text near the beginning of the files that this command writes.
        overwrite: Whether the user has agreed to replace any file.

    Raises:
        UserError: The path is not a file, or ``overwrite`` is false and the file is not one of this command.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{key}={path} is not a file. Choose the path of a file.")
    if not overwrite and os.path.lexists(path) and not has_mark(path, mark):
        raise UserError(
            f"{key}={path} already exists and was not written by this command. Choose another path, or replace the "
            f"file with {_overwrite(key)}."
        )


def check_output_directory(path: Path, key: str, marked: Iterable[str], mark: str, *, overwrite: bool) -> None:
    """Checks that a command may write to a directory: it is missing or empty, or has an output file of this command.

    Args:
        path: Path of the directory.
        key: Config key that has the path, for the message.
        marked: Names of files of which this command writes at least one.
        mark: Text near the beginning of these files.
        overwrite: Whether the user has agreed to replace any files in the directory.

    Raises:
        UserError: The path is not a directory, or ``overwrite`` is false and the directory is not one of this command.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{key}={path} already exists and is not a directory. Choose a new directory.")
    if overwrite or not path.is_dir() or not any(path.iterdir()) or any(has_mark(path / name, mark) for name in marked):
        return
    raise UserError(
        f"{key}={path} already exists and has files that this command did not write. Choose a new or an empty "
        f"directory, or replace files of the same name with {_overwrite(key)}."
    )


def has_mark(path: Path, mark: str) -> bool:
    """Returns whether a regular file has a text in its first 2 KiB."""
    try:
        with open_regular(path, follow=True) as file:
            return mark.encode() in file.read(2048)
    except OSError:
        return False


def _overwrite(key: str) -> str:
    """Returns the override that permits replacing the files at ``key``, such as prove.overwrite=true for prove.out."""
    return f"{key.rpartition('.')[0]}.overwrite=true".removeprefix(".")


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error is that the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def skip_if_disk_full(path: Path) -> Iterator[None]:
    """Context manager that logs a full disk as a warning, once until a write succeeds, instead of raising the error.

    Args:
        path: File that is written.
    """
    try:
        yield
        _not_written.discard(path)
    except OSError as error:
        if not is_disk_full(error):
            raise
        if path not in _not_written:
            log.warning("The disk is full, so %s is not written. Training continues.", path)
        _not_written.add(path)


def fsync_path(path: Path) -> None:
    """Syncs a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Returns a path in the same directory. A process ID would be predictable and not unique across machines."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def check_no_links(run_dir: Path) -> None:
    """Checks that a directory of runs contains no links, through which a resumed run would write or delete elsewhere.

    The directory itself and its parents may be links. Links that W&B and submitit create are permitted.

    Raises:
        UserError: There is a link, or something that is neither a file nor a directory; the message names it.
    """
    for folder, folders, files in os.walk(run_dir):
        for name in sorted((*folders, *files)):
            if not _is_link_of_library(run_dir, Path(folder, name)):
                check_no_link(Path(folder, name))


def check_no_link(path: Path) -> None:
    """Checks one entry of a directory of runs, which may be missing; see ``check_no_links``."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # removed by another process
        return
    if stat.S_ISLNK(mode):
        raise UserError(
            f"{path} is a link, so this run could use files outside of its directory. Remove it or replace it with a "
            "copy."
        )
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise UserError(f"{path} is neither a file nor a directory. Remove it.")


def use_private_compile_cache() -> None:
    """Sets torch.compile's cache to a directory that only the user can access, unless TORCHINDUCTOR_CACHE_DIR is set.

    torch.compile unpickles and loads the files in it. By default, it is /tmp/torchinductor_<user>, which another user
    of the machine can create first. Must be called before compiling.
    """
    if COMPILE_CACHE in os.environ:
        return
    path = Path(tempfile.gettempdir(), f"gptlab-compiled-{os.getuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    os.environ[COMPILE_CACHE] = str(path) if is_private else tempfile.mkdtemp(prefix="gptlab-compiled-")


def _is_link_of_library(run_dir: Path, path: Path) -> bool:
    """Returns whether W&B or submitit creates a link like this one in a directory of runs.

    Neither writes through it: W&B replaces its links, and the names of submitit's are random.
    """
    if not path.is_symlink():
        return False
    parents = path.relative_to(run_dir).parts[:-1]
    if path.name in ("latest-run", "debug.log", "debug-internal.log"):
        return parents[-1:] == ("wandb",)
    if path.name == "debug-core.log":  # W&B's log of all runs
        return parents[-3:-2] == ("wandb",) and "run-" in parents[-2] and parents[-1] == "logs"
    return path.name.startswith(".submission_file_") and ".submitit" in parents


def _open(path: Path, flags: int, *, follow: bool = False) -> int:
    """Opens a regular file, without waiting at a FIFO, and returns its descriptor."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor
