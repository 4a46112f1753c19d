"""Order of the training windows, computed without an index, and the range of windows that each step consumes.

The window at global position p is a pure function of the data, the seed and p. Step s consumes the positions
[first(s), first(s + 1)) of the ``BatchSizeSchedule``. For a constant global batch of G windows that is
[s G, (s + 1) G). Devices, workers and micro-batches only slice that range. Imports no torch.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptlab.data.config import DataConfig
from gptlab.data.shards.manifest import Manifest

ROUNDS = 6  # four rounds make a Feistel network pseudo-random (Luby and Rackoff 1988); two more for small domains


def permute(index: NDArray[np.uint64], size: int, key: int) -> NDArray[np.uint64]:
    """Permutes [0, size) under ``key``, in O(1) memory.

    Applies a balanced Feistel network over the next even power of two, again until the result is below ``size`` (cycle
    walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3).

    Args:
        index: Values in [0, size), of any shape.
        size: Size of the domain, at most 2^62.
        key: 64-bit key.

    Returns:
        The permuted values, with the shape of ``index``.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = _mix(np.uint64(key) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[outside] = left << shift | right
        outside = out >= np.uint64(size)
    return out


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes 64 bits: the finalizer of SplitMix64 (Steele et al. 2014, figure 18)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ShardSequence(NamedTuple):
    """Order of the shards in an epoch, and the cumulative number of windows per shard and per block of shards."""

    shards: NDArray[np.int64]
    ends: NDArray[np.int64]
    block_ends: NDArray[np.int64]


class WindowOrder:
    """Maps each position of the training order to the start of a window in the token stream.

    Every epoch divides the stream into windows of T tokens, plus one token for the last target, that do not overlap,
    and shuffles them. An offset below T, drawn for each epoch, shifts all windows, so that over the epochs a token
    occurs at every position of a window. An epoch follows the previous one without a gap, also within a batch.

    The order "block" divides each shard separately, so that no window spans two shards. It shuffles the shards, and
    then the windows of ``block_shards`` consecutive shards together, so that few shards are in use at a time.

    Args:
        shards: Number of tokens of each shard of the stream.
        block_size: Sequence length T.
        seed: Seed of the run.
        fingerprint: Fingerprint of the data.
        order: "shuffled", "sequential" or "block".
        block_shards: Number of shards that "block" shuffles together.
        limit_windows: Uses only the first ``limit_windows`` windows of the stream, without the offset.

    Raises:
        ValueError: The stream (for "block", every shard) is shorter than 2 T tokens.
    """

    def __init__(
        self,
        shards: list[int],
        block_size: int,
        seed: int,
        fingerprint: str,
        order: Literal["shuffled", "sequential", "block"],
        block_shards: int,
        limit_windows: int | None,
    ) -> None:
        self.block_size, self.seed, self.fingerprint = block_size, seed, fingerprint
        self.order = "shuffled" if order == "block" and limit_windows is not None else order
        self.block_shards, self.has_offset = block_shards, limit_windows is None
        self.tokens_per_block = -(-block_shards * sum(shards) // len(shards))  # on average
        # Segments that are divided into windows separately, each into as many windows as fit after any offset.
        self.ends = np.cumsum(shards if self.order == "block" else [sum(shards)], dtype=np.int64)
        self.begins = np.concatenate(([0], self.ends[:-1]))
        self.num_windows = np.maximum(self.ends - self.begins - block_size, 0) // block_size
        self.usable = np.flatnonzero(self.num_windows)  # segments that hold at least one window
        self.windows = int(self.num_windows.sum())
        if limit_windows is not None:
            self.windows = min(self.windows, limit_windows)
        if self.windows < 1:
            longest = int((self.ends - self.begins).max())
            raise ValueError(f"{longest} tokens are fewer than two sequences of block_size={block_size}")
        self._sequences: dict[int, ShardSequence] = {}

    def starts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the start offsets (N,) in the stream of the windows at ``positions`` (N,)."""
        epochs, indices = np.divmod(positions, self.windows)
        starts = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            offset = self._draw("offset", epoch) % self.block_size if self.has_offset else 0
            starts[in_epoch] = self._ordered(indices[in_epoch], epoch) + offset
        return starts

    def ahead(self, position: int) -> list[tuple[int, int]]:
        """Returns the token ranges (begin, end) that are read next, starting at ``position``, in order of use.

        For "block" these are the shards of the current and the next block, for "sequential" about as many tokens, and
        for "shuffled" all tokens.
        """
        epoch, index = divmod(position, self.windows)
        total = int(self.ends[-1]) if self.has_offset else self.windows * self.block_size + 1
        if self.order == "shuffled":
            return [(0, total)]
        if self.order == "sequential":
            start = index * self.block_size
            return [(start, min(start + 2 * self.tokens_per_block, total))]
        sequence = self._sequence(epoch)
        block = int(np.searchsorted(sequence.block_ends, index, side="right"))
        wanted = sequence.shards[block * self.block_shards : (block + 2) * self.block_shards].tolist()
        if block == len(sequence.block_ends) - 1:
            wanted += self._sequence(epoch + 1).shards[: self.block_shards].tolist()
        return [(int(self.begins[shard]), int(self.ends[shard])) for shard in wanted]

    def _ordered(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Returns the start offsets of an epoch's windows, before the epoch's offset is added."""
        if self.order == "sequential":
            return indices * self.block_size
        if self.order == "shuffled":
            return self._permute(indices, self.windows, "order", epoch) * self.block_size
        shards, ends, block_ends = self._sequence(epoch)
        blocks = np.searchsorted(block_ends, indices, side="right")
        ranks = np.empty_like(indices)  # index of each window when shards are concatenated in the order of the epoch
        for block in np.unique(blocks).tolist():
            in_block, begin = blocks == block, int(block_ends[block - 1]) if block else 0
            size = int(block_ends[block]) - begin
            ranks[in_block] = begin + self._permute(indices[in_block] - begin, size, f"block {block}", epoch)
        at = np.searchsorted(ends, ranks, side="right")
        windows = ranks - (ends - self.num_windows[shards])[at]
        return self.begins[shards[at]] + windows * self.block_size

    def _sequence(self, epoch: int) -> ShardSequence:
        """Returns the order of the shards in an epoch. Caches two, because the end of an epoch also needs the next."""
        if epoch not in self._sequences:
            self._sequences = dict([*self._sequences.items()][-1:]) | {epoch: self._new_sequence(epoch)}
        return self._sequences[epoch]

    def _new_sequence(self, epoch: int) -> ShardSequence:
        shards = self.usable[self._permute(np.arange(len(self.usable)), len(self.usable), "shards", epoch)]
        ends = np.cumsum(self.num_windows[shards])
        lasts = range(self.block_shards - 1, len(ends) + self.block_shards - 1, self.block_shards)
        return ShardSequence(shards, ends, ends[np.minimum(lasts, len(ends) - 1)])

    def _permute(self, indices: NDArray[np.int64], size: int, purpose: str, epoch: int) -> NDArray[np.int64]:
        return permute(indices.astype(np.uint64), size, self._draw(purpose, epoch)).astype(np.int64)

    def _draw(self, purpose: str, epoch: int) -> int:
        """Draws 64 bits for one purpose in one epoch."""
        content = f"{self.fingerprint}\0{self.seed}\0{purpose}\0{epoch}".encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def training_order(manifest: Manifest, config: DataConfig, block_size: int, seed: int) -> WindowOrder:
    """Builds the training order of a run from its data, block size and seed.

    Raises:
        ValueError: The data is shorter than two windows.
    """
    shards = [shard.tokens for shard in manifest.splits["train"]]
    return WindowOrder(
        shards, block_size, seed, manifest.fingerprint(), config.order, config.block_shards, config.limit_windows
    )


def evaluation_starts(tokens: int, block_size: int, windows: int | None) -> NDArray[np.int64]:
    """Returns the start offsets (N,) of the windows that every evaluation scores.

    Args:
        tokens: Number of tokens of the split.
        block_size: Sequence length T. Windows do not overlap.
        windows: Number of windows, evenly spaced over the split. None scores all of them.
    """
    available = (tokens - 1) // block_size
    count = available if windows is None else min(windows, available)
    return (np.arange(count, dtype=np.int64) * available // max(count, 1)) * block_size


BatchSizeStage = tuple[int, int]  # last step of the stage (counted from 1), global batch size in windows


class BatchSizeSchedule:
    """Piecewise constant global batch size, and the range of positions that each step consumes.

    The batch size usually grows, because the noise of the gradient matters more at a lower loss (McCandlish et al.
    2018, An Empirical Model of Large-Batch Training, section 2.2; Smith et al. 2018, Don't Decay the Learning Rate,
    Increase the Batch Size).

    Args:
        batch: Global batch size of the last stage, in windows.
        earlier: Earlier stages, in order.
        past: Stages before ``earlier`` that have ended, whose batch sizes may be any.

    Attributes:
        sizes: Batch sizes of the stages that have not ended.
    """

    def __init__(self, batch: int, earlier: Sequence[BatchSizeStage] = (), past: Sequence[BatchSizeStage] = ()) -> None:
        self.sizes = [*(size for _, size in earlier), batch]
        stages = [*past, *earlier]
        self._all_sizes = [*(size for _, size in stages), batch]
        self._begins = [0, *(end for end, _ in stages)]  # steps before each stage
        lengths = [end - begin for begin, (end, _) in zip(self._begins, stages, strict=False)]
        self._firsts = [0, *accumulate(length * size for length, (_, size) in zip(lengths, stages, strict=True))]

    def batch(self, step: int) -> int:
        """Returns the global batch size, in windows, of step ``step`` (counted from 0)."""
        return self._all_sizes[bisect_right(self._begins, step) - 1]

    def first(self, step: int) -> int:
        """Returns the first position of step ``step`` (counted from 0): the number of windows of all earlier steps."""
        stage = bisect_right(self._begins, step) - 1
        return self._firsts[stage] + (step - self._begins[stage]) * self._all_sizes[stage]

    def steps(self, windows: int) -> int:
        """Returns the smallest number of steps, at least one, that consume at least ``windows`` windows."""
        stage = bisect_left(self._firsts, windows) - 1
        return self._begins[stage] - (self._firsts[stage] - windows) // self._all_sizes[stage]
