"""Writes checkpoints: one file or the shards of all ranks, synchronously or in a background thread."""

import hashlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from gptlab.files import is_disk_full
from gptlab.training.checkpoints.reading import Checkpoint, flatten_tensors, read_checkpoint
from gptlab.training.checkpoints.records import STATE, CheckpointMetadata, commit, prune_checkpoints, unfinished_path
from gptlab.training.checkpoints.shards import save_shards

log = logging.getLogger(__name__)

Hashes = dict[str, str]  # file name -> SHA-256 of the written data
WriteFunction = Callable[[Path, Checkpoint], Hashes | None]


class AtomicCheckpointIO(CheckpointIO):
    """CheckpointIO that writes checkpoints so that a crash at any moment leaves the older ones intact.

    Args:
        keep_last: Number of most recent checkpoints to keep.
        keep_best: Whether to also keep the checkpoint with the lowest val loss.
        asynchronous: Whether to write in a background thread; ``check`` and ``wait`` raise its errors.

    Attributes:
        unsaved: The latest checkpoint, if it was not saved because the disk was full; on a rank that writes.
        listeners: Called with every committed checkpoint and its metadata, on the first rank, before older ones are
            removed; in the background thread if ``asynchronous``.
    """

    def __init__(self, *, keep_last: int, keep_best: bool, asynchronous: bool) -> None:
        self.keep_last, self.keep_best, self.asynchronous = keep_last, keep_best, asynchronous
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.unsaved: Path | None = None
        self.listeners: list[Callable[[Path, CheckpointMetadata], None]] = []
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def save_checkpoint(self, checkpoint: Checkpoint, path: Any, storage_options: Any = None) -> None:
        """Writes one file into ``path``, on the first rank only; ``storage_options`` is its ``CheckpointMetadata``."""
        self._save(_write_state, checkpoint, Path(path), storage_options)

    def save_shards(self, checkpoint: Checkpoint, path: Path, facts: CheckpointMetadata) -> None:
        """Writes the shards of all ranks into ``path``; every rank must call this."""
        if self._group is None:  # a separate group, so that the thread's collectives do not mix with those of training
            self._group = dist.new_group(backend="gloo")
        group = self._group

        def write(folder: Path, state: Checkpoint) -> Hashes | None:
            save_shards(flatten_tensors(state), folder, dist.get_rank(), group)
            if dist.get_rank() != 0:
                return None
            groups = [{"param_groups": optimizer["param_groups"]} for optimizer in state["optimizer_states"]]
            rest = {key: value for key, value in state.items() if key != "state_dict"}
            return _write_state(folder, rest | {"optimizer_states": groups})

        self._save(write, checkpoint, path, facts)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Checkpoint:
        """Reads a checkpoint."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Does nothing: old checkpoints are removed after the next one is committed."""

    def check(self) -> None:
        """Raises the error of the background thread, if it has ended with one; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the background thread and raises its error, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, write: WriteFunction, state: Checkpoint, checkpoint_dir: Path, facts: CheckpointMetadata) -> None:
        self.wait()
        if not self.asynchronous:
            self._finish(write, state, checkpoint_dir, facts)
            return
        copy = DefaultStager(StagingOptions(False, False, False, False)).stage(state)
        self._pending = self._thread.submit(self._finish, write, copy, checkpoint_dir, facts)

    def _finish(self, write: WriteFunction, state: Any, checkpoint_dir: Path, facts: CheckpointMetadata) -> None:
        """Writes and commits the checkpoint, then prunes old ones. If the disk is full, logs an error and returns."""
        unfinished, self.unsaved = unfinished_path(checkpoint_dir), None
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            hashes = write(unfinished, state)
            if hashes is not None:  # on the first rank
                commit(unfinished, checkpoint_dir, facts, hashes)
                for listener in self.listeners:
                    listener(checkpoint_dir, facts)
                prune_checkpoints(checkpoint_dir.parent, facts.step, self.keep_last, self.keep_best)
        except (OSError, CheckpointException) as error:
            if not _is_full(error):
                raise
            self.unsaved = checkpoint_dir
            shutil.rmtree(unfinished, ignore_errors=True)
            log.error(
                "The disk of %s is full, so the checkpoint of step %d was not saved. Training continues, and older "
                "checkpoints are kept. Free some space before the next checkpoint.",
                *(checkpoint_dir.parent, facts.step),
            )


def _write_state(folder: Path, state: Checkpoint) -> Hashes:
    """Writes state.pt and hashes the data while writing."""
    with (folder / STATE).open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, cast(BinaryIO, hashing))
        except RuntimeError:
            if hashing.error is not None:  # torch's own error does not mention the cause, e.g. a full disk
                raise hashing.error from None
            raise
    return {STATE: hashing.digest.hexdigest()}


class _HashingFile(io.RawIOBase):
    """Writable file object that hashes the data it writes and keeps the file's ``OSError``, if any."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, data: Any) -> int:
        """Writes and hashes the data; returns the number of bytes written."""
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written


def _is_full(error: BaseException) -> bool:
    """Returns whether all failures, on all ranks, are due to a full disk or quota."""
    return all(map(is_disk_full, _failures(error)))


def _failures(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            yield from _failures(failure)
    else:
        yield error
