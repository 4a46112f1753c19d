"""Prepared data: shards with their tokenizer, verification of the shards, and decoding of samples. Imports no torch."""

import errno
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from gptlab.data.order import BatchSizeSchedule, WindowOrder
from gptlab.data.shards.manifest import Manifest, Shard, Split, stat_shard
from gptlab.data.shards.streams import LocalFolder, ShardStore, TokenStream
from gptlab.data.tokenizers.tokenizer import Tokenizer
from gptlab.errors import UserError, failure_reason
from gptlab.files import write_durably
from gptlab.progress import hash_file, track_reading

log = logging.getLogger(__name__)

WAITING_SECONDS = 5  # for a lock, after which the wait is logged
LOG_HASHING_ABOVE = 10**9  # tokens; hashing more takes seconds and is logged
MAX_PREFIX = 2**22  # number of tokens that are searched for the first documents
CHUNK = 2**18  # tokens that are read at a time, which fit into the processor's cache


class TokenDataset(NamedTuple):
    """Prepared data: shards, their manifest and their tokenizer."""

    store: ShardStore
    manifest: Manifest
    tokenizer: Tokenizer

    @property
    def folder(self) -> Path:
        """Directory of the shards, or the one in which they are cached."""
        return self.store.folder

    def stream(self, split: Split) -> TokenStream:
        """Returns the token stream of one split."""
        return TokenStream(self.store, self.manifest, split)


def verify_shards(store: ShardStore, manifest: Manifest, modified: Sequence[Shard] | None = None) -> int:
    """Hashes shards again and returns their number.

    Args:
        store: Store of the shards.
        manifest: Manifest of the shards.
        modified: The shards to hash. Default: all.

    Raises:
        UserError: A shard cannot be read, or its SHA-256 has changed.
    """
    shards = manifest.shards() if modified is None else modified
    size = sum(manifest.file_size(shard) - shard.offset for shard in shards)
    with track_reading(f"Verifying {len(shards)} shards", size) as advance:
        for shard in shards:
            try:
                with store.open(shard) as file:
                    file.seek(shard.offset)
                    found = hash_file(file, advance)
            except OSError as error:
                raise UserError(f"{store.folder / shard.file} cannot be read: {failure_reason(error)}.") from error
            if found != shard.sha256:
                raise UserError(
                    f"{store.folder / shard.file} has changed since it was written: its SHA-256 is {found}, not "
                    f"{shard.sha256}."
                )
    return len(shards)


def check_unchanged(folder: Path, manifest: Manifest, cache_dir: Path) -> None:
    """Verifies the shards of ``folder`` that are new or were modified since they were last hashed.

    The size, times and inode of hashed files are recorded in ``cache_dir``, so that unmodified files are not hashed
    again.

    Raises:
        UserError: The SHA-256 of a shard has changed.
    """
    record = _verified_file(folder, cache_dir)
    with lock_cache(Path(f"{record}.lock")) as is_writable:
        known = _read_verified(record)
        states = _file_states(folder, manifest)
        modified = [shard for shard in manifest.shards() if known.get(shard.file) != states[shard.file]]
        if modified:
            if (size := sum(shard.tokens for shard in modified)) > LOG_HASHING_ABOVE:
                log.info("Verifying %d shards of %s with %s tokens.", len(modified), folder, f"{size:,}")
            verify_shards(LocalFolder(folder), manifest, modified)
            if is_writable:
                write_durably(record, json.dumps(states))


@contextmanager
def lock_cache(path: Path) -> Iterator[bool]:
    """Context manager that holds a lock in the cache; yields whether this process may write to its directory.

    Prepared data in a read-only directory, such as that of another user, is used without a lock.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=WAITING_SECONDS)
        except Timeout:
            log.info("Waiting for another process, which prepares or verifies data (%s).", path)
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def record_verified(folder: Path, manifest: Manifest, cache_dir: Path) -> None:
    """Records the current state of the shards as verified. Call this directly after hashing them."""
    record = _verified_file(folder, cache_dir)
    with lock_cache(Path(f"{record}.lock")):
        write_durably(record, json.dumps(_file_states(folder, manifest)))


def _verified_file(folder: Path, cache_dir: Path) -> Path:
    """Returns the path of the record of the verified shards of ``folder``."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return cache_dir / "verified" / f"{name}.json"


def _file_states(folder: Path, manifest: Manifest) -> dict[str, list[object]]:
    """Returns the expected hash of each shard and the file attributes that change when the file is modified."""
    stats = ((shard, stat_shard(folder, shard)) for shard in manifest.shards())
    return {
        shard.file: [shard.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        for shard, stat in stats
    }


def _read_verified(record: Path) -> dict[str, object]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def longest_document(stream: TokenStream, end_of_text: int | None) -> int:
    """Returns the number of tokens of the longest document, without its end-of-text token.

    Args:
        stream: The tokens.
        end_of_text: ID of the end-of-text token. If None, the stream is one document.
    """
    if end_of_text is None:
        return len(stream)
    longest, begin, start = 0, 0, 0
    with track_reading("Counting tokens per document", len(stream) * stream.dtype.itemsize) as advance:
        for tokens in stream.chunks(CHUNK):
            ends = start + np.flatnonzero(tokens == end_of_text)
            if len(ends):
                longest = max(longest, int(np.diff(ends, prepend=begin - 1).max()) - 1)
                begin = int(ends[-1]) + 1
            start += len(tokens)
            advance(len(tokens) * stream.dtype.itemsize)
    return max(longest, len(stream) - begin)


def first_documents(prepared: TokenDataset, split: Split, documents: int, tokens: int) -> list[str]:
    """Decodes the first ``tokens`` tokens of each of the first ``documents`` documents of a split."""
    stream = prepared.stream(split)
    ids = stream.read([0], min(len(stream), MAX_PREFIX))[0]
    end = prepared.tokenizer.end_of_text
    cuts = [] if end is None else np.flatnonzero(ids == end).tolist()
    begins = [0, *(cut + 1 for cut in cuts)]
    texts = [ids[begin:stop] for begin, stop in zip(begins, [*cuts, len(ids)], strict=True)]
    return [prepared.tokenizer.decode(text[:tokens].tolist()) for text in texts if len(text)][:documents]


def batch_texts(
    prepared: TokenDataset, order: WindowOrder, step: int, stages: BatchSizeSchedule
) -> list[tuple[int, str]]:
    """Decodes the windows of one training step.

    Args:
        prepared: The data.
        order: Order of the windows.
        step: Step, counted from 1 as in metrics.csv.
        stages: Batch size schedule.

    Returns:
        The start offset and the text of each window of the global batch.
    """
    stream = prepared.stream("train")
    starts = order.starts(np.arange(stages.first(step - 1), stages.first(step), dtype=np.int64))
    rows = stream.read(starts, order.block_size + 1)
    return [(int(start), prepared.tokenizer.decode(row.tolist())) for start, row in zip(starts, rows, strict=True)]
