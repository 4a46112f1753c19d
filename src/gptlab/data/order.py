"""The order of training: which window stands at each position, without an index.

The window at global position p is a pure function of the data, the seed and p. Step s of a run with a global batch of G
windows reads positions [s G, (s+1) G); devices, workers and micro-batches only slice that range.
"""

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gptlab.data.config import DataConfig
from gptlab.data.shards import Manifest

ROUNDS = 6  # four make a Feistel network pseudo-random (Luby and Rackoff 1988); two more for small domains

BLOCK = 1024  # windows that stay together in the block order


def permute(index: NDArray[np.uint64], size: int, key: int) -> NDArray[np.uint64]:
    """Permute [0, size): each index to its place under ``key``, in O(1) memory.

    A balanced Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 3, cycle walking).

    Args:
        index: Any shape, values in [0, size).
        size: At most 2^62.
        key: 64 bits.

    Returns:
        The shape of ``index``.
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
    """Mix 64 bits thoroughly: the finalizer of SplitMix64 (Steele et al. 2014, figure 18)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class WindowOrder:
    """Where the training window at each position starts.

    Every epoch cuts the stream into windows of T tokens that do not overlap (each needs one token more, for its last
    target), and shuffles them anew. Each epoch also moves the cuts by its own offset below T, so that over epochs a
    token is seen at every place of a window. An epoch ends where the next begins, in the middle of a batch if need be.

    Args:
        tokens: Length of the stream.
        block_size: T.
        seed: The run's seed.
        fingerprint: The data's fingerprint.
        order: "shuffled", "sequential", or "block" (blocks of neighbours in a shuffled order, shuffled inside).
        limit_windows: Use only the first so many windows, without the offset.

    Raises:
        ValueError: The stream is shorter than 2 T.
    """

    def __init__(
        self,
        tokens: int,
        block_size: int,
        seed: int,
        fingerprint: str,
        order: Literal["shuffled", "sequential", "block"],
        limit_windows: int | None,
    ) -> None:
        self.block_size, self.seed, self.fingerprint, self.order = block_size, seed, fingerprint, order
        self.windows = (tokens - block_size) // block_size  # as many as fit after any offset
        self.moves = limit_windows is None
        if limit_windows is not None:
            self.windows = min(self.windows, limit_windows)
        if self.windows < 1:
            raise ValueError(f"{tokens} tokens are fewer than two windows of {block_size}")

    def starts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens (N,) of the windows at ``positions`` (N,)."""
        epochs, indices = np.divmod(positions, self.windows)
        starts = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows = self._ordered(indices[here].astype(np.uint64), int(epoch))
            offset = self._draw("offset", int(epoch)) % self.block_size if self.moves else 0
            starts[here] = windows.astype(np.int64) * self.block_size + offset
        return starts

    def _ordered(self, indices: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        """Put the windows of an epoch in their order."""
        if self.order == "sequential":
            return indices
        key = self._draw("order", epoch)
        if self.order == "shuffled":
            return permute(indices, self.windows, key)
        blocks, places = np.divmod(indices, np.uint64(BLOCK))
        whole = self.windows // BLOCK  # the windows left over make a last, shorter block, which stays the last
        out = np.empty_like(indices)
        for block in np.unique(blocks):
            here = blocks == block
            size = BLOCK if block < whole else self.windows - whole * BLOCK
            at = permute(np.array([block], dtype=np.uint64), whole, key)[0] if block < whole else block
            out[here] = at * np.uint64(BLOCK) + permute(places[here], size, self._draw(f"block {block}", epoch))
        return out

    def _draw(self, purpose: str, epoch: int) -> int:
        """Draw 64 bits for one purpose in one epoch."""
        content = f"{self.fingerprint}\0{self.seed}\0{purpose}\0{epoch}".encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def training_order(manifest: Manifest, config: DataConfig, block_size: int, seed: int) -> WindowOrder:
    """Build the order that a run with this data, block and seed trains in."""
    tokens, fingerprint = manifest.tokens("train"), manifest.fingerprint()
    return WindowOrder(tokens, block_size, seed, fingerprint, config.order, config.limit_windows)


def evaluation_starts(tokens: int, block_size: int, windows: int | None) -> NDArray[np.int64]:
    """First tokens of the windows that every evaluation scores: all of them, or so many evenly spread ones."""
    available = (tokens - 1) // block_size
    count = available if windows is None else min(windows, available)
    return (np.arange(count, dtype=np.int64) * available // max(count, 1)) * block_size
