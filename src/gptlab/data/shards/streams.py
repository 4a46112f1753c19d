"""Token streams: random access to the tokens of a split, across its shards."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptlab.data.shards.manifest import Manifest, Shard, Split, open_shard
from gptlab.errors import UserError

OPEN_FILES = 64  # maximum number of open files per stream, far below the limit of a process


class ShardStore(Protocol):
    """Storage of shards."""

    @property
    def folder(self) -> Path:
        """Local directory of the shards, or the one in which they are cached."""
        ...

    def open(self, shard: Shard) -> FileIO:
        """Opens a shard's file, and downloads it first if necessary."""
        ...

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Raises UserError if ``shards``, which are in use at the same time, exceed the disk limit."""
        ...

    def expect(self, shards: Sequence[Shard]) -> None:
        """Announces the shards that are read next, in order, so that they can be prefetched."""
        ...


class LocalFolder:
    """Shards in a local directory, or at the local paths of a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, shard: Shard) -> FileIO:
        """Opens a shard's file."""
        return open_shard(self.folder, shard)

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Does nothing: all shards are local."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """Does nothing: all shards are local."""


class TokenStream:
    """Tokens of one split, as one sequence.

    The files are read with ``pread``, not memory-mapped, because the pages of a memory map would count as memory of the
    process, up to the size of the corpus.

    Args:
        store: Store of the shards.
        manifest: Manifest of the shards.
        split: "train" or "val".
    """

    def __init__(self, store: ShardStore, manifest: Manifest, split: Split) -> None:
        self.store, self.shards = store, manifest.splits[split]
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.ends = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._expected: Sequence[tuple[int, int]] = ()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        """Omits open files, which each worker process opens for itself."""
        return self.__dict__ | {"_files": OrderedDict(), "_expected": ()}

    def read(self, starts: Sequence[int] | NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Reads ``length`` tokens from each start offset. A row may span several shards.

        Args:
            starts: Start offsets (N,) in the stream.
            length: Number of tokens of each row.

        Returns:
            Token IDs (N, length).

        Raises:
            IndexError: A row exceeds the stream.
            UserError: A shard's file is shorter than the manifest requires.
        """
        begins = np.asarray(starts, dtype=np.int64)
        if len(begins) and not 0 <= begins.min() <= begins.max() <= len(self) - length:
            raise IndexError(
                f"rows of {length} tokens with starts {begins.min()} to {begins.max()} exceed the {len(self)} tokens"
            )
        rows = np.empty((len(begins), length), dtype=self.dtype)
        first = np.searchsorted(self.ends, begins, side="right")
        offsets = begins - np.concatenate(([0], self.ends))[first]
        for row, shard, offset in zip(rows, first.tolist(), offsets.tolist(), strict=True):
            self._fill(row, shard, offset)
        return rows.astype(np.int64)

    def chunks(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Yields all tokens in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.read([start], min(size, len(self) - start))[0]

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announces the token ranges (begin, end) that are read next, in order, so that shards can be prefetched."""
        if ranges == self._expected:
            return
        self._expected = ranges
        expected = self.within(ranges)
        self.store.expect([self.shards[number] for number in expected])
        for number in set(self._files).difference(expected):
            self._files.pop(number).close()  # a deleted file occupies disk space until it is closed

    def within(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Returns the indices, without duplicates, of the shards that hold the token ranges (begin, end)."""
        found: dict[int, None] = {}
        for start, stop in ranges:
            first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
            found.update(dict.fromkeys(range(first, last + 1)))
        return list(found)

    def _fill(self, row: NDArray[Any], shard: int, offset: int) -> None:
        """Fills ``row`` with tokens starting at ``offset`` of a shard, and continues in the next shards."""
        filled = 0
        while filled < len(row):
            part = row[filled : filled + self.shards[shard].tokens - offset]
            if len(part):
                begin = self.shards[shard].offset + offset * self.dtype.itemsize
                data = os.pread(self._open(shard).fileno(), part.nbytes, begin)
                if len(data) != part.nbytes:
                    raise UserError(f"{self.shards[shard].file} is truncated before token {offset + len(part):,}.")
                part[:] = np.frombuffer(data, dtype=self.dtype)
            filled, shard, offset = filled + len(part), shard + 1, 0

    def _open(self, shard: int) -> FileIO:
        """Returns a shard's open file. Closes the least recently used file if too many are open."""
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = self.store.open(self.shards[shard])
        return self._files[shard]
