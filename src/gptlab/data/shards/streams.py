"""The tokens of a split as if they were one array, read where they lie."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptlab.data.shards.manifest import Manifest, Shard, Split
from gptlab.errors import UserError

OPEN_FILES = 64  # of a stream at a time, far below what a process may have open


class ShardStore(Protocol):
    """Where the files of shards are."""

    @property
    def folder(self) -> Path:
        """The folder on this machine that they are in, or are kept in while they are used."""
        ...

    def open(self, shard: Shard) -> FileIO:
        """Open a shard's file, which may have to be fetched first."""
        ...

    def check_room(self, at_once: Sequence[Shard]) -> None:
        """See that there is room for the shards that are in use at the same time; UserError where there is none."""
        ...

    def expect(self, shards: Sequence[Shard]) -> None:
        """Learn which shards are read from here on, the first ones first."""
        ...


class LocalFolder:
    """Shards in a folder of this machine, or in the places that a manifest names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, shard: Shard) -> FileIO:
        """Open a shard's file."""
        return (self.folder / shard.file).open("rb", buffering=0)

    def check_room(self, at_once: Sequence[Shard]) -> None:
        """Do nothing: all is there."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """Do nothing: all is there."""


class TokenStream:
    """One split's tokens.

    They are read, not mapped: what a process has read of a mapped file counts as its memory, up to the whole corpus.

    Args:
        store: Where the shards are.
        manifest: Which shards there are.
        split: Train or val.
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
        """Open files do not travel to worker processes: each opens its own."""
        return self.__dict__ | {"_files": OrderedDict(), "_expected": ()}

    def read(self, starts: Sequence[int] | NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Read ``length`` tokens from each start: (len(starts), length). A row may cross shards.

        Raises:
            IndexError: A row ends beyond the stream.
            UserError: A shard ends before it should.
        """
        begins = np.asarray(starts, dtype=np.int64)
        if len(begins) and not 0 <= begins.min() <= begins.max() <= len(self) - length:
            raise IndexError(f"rows of {length} tokens from {begins.min()} to {begins.max()}, of {len(self)} tokens")
        rows = np.empty((len(begins), length), dtype=self.dtype)
        first = np.searchsorted(self.ends, begins, side="right")
        offsets = begins - np.concatenate(([0], self.ends))[first]
        for row, shard, offset in zip(rows, first.tolist(), offsets.tolist(), strict=True):
            self._fill(row, shard, offset)
        return rows.astype(np.int64)

    def chunks(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Read all tokens in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.read([start], min(size, len(self) - start))[0]

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which tokens, from one to another, are read from here on, the first ones first."""
        if ranges == self._expected:
            return
        self._expected = ranges
        expected = self.within(ranges)
        self.store.expect([self.shards[number] for number in expected])
        for number in set(self._files).difference(expected):
            self._files.pop(number).close()  # a file that is removed takes room on the disk while it is open

    def within(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Numbers of the shards that hold the tokens of ``ranges``, each from one to another; each number once."""
        found: dict[int, None] = {}
        for start, stop in ranges:
            first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
            found.update(dict.fromkeys(range(first, last + 1)))
        return list(found)

    def _fill(self, row: NDArray[Any], shard: int, offset: int) -> None:
        """Fill ``row`` with the tokens from ``offset`` of a shard on, and from the next ones."""
        filled = 0
        while filled < len(row):
            part = row[filled : filled + self.shards[shard].tokens - offset]
            if len(part):
                begin = self.shards[shard].offset + offset * self.dtype.itemsize
                data = os.pread(self._open(shard).fileno(), part.nbytes, begin)
                if len(data) != part.nbytes:
                    raise UserError(f"{self.shards[shard].file} ends before its token {offset + len(part):,}.")
                part[:] = np.frombuffer(data, dtype=self.dtype)
            filled, shard, offset = filled + len(part), shard + 1, 0

    def _open(self, shard: int) -> FileIO:
        """Open a shard's file, or find it open; the one not read for longest is closed when there are too many."""
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = self.store.open(self.shards[shard])
        return self._files[shard]
