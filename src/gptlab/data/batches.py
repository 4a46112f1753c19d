"""Micro-batches as map-style datasets: each depends only on its index, for any number of devices and workers.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gptlab.data.order import BatchSizeSchedule, WindowOrder
from gptlab.data.shards.streams import TokenStream

WINDOWS_PER_GROUP = 1024  # windows whose starts are computed together, in little more time than for a micro-batch
IGNORE_INDEX = -100  # default ignore_index of cross_entropy: excluded from the loss


class Batch(NamedTuple):
    """Micro-batch of token sequences.

    Attributes:
        idx: Token IDs (B, T).
        targets: IDs of the next tokens (B, T), ``IGNORE_INDEX`` where not scored.
        documents: Index (B, T) of the document of each token in its sequence, counted from 0. Each document except the
            first begins with an end-of-text token, as does text that is generated without a prompt. None unless
            attention is masked at document boundaries.
    """

    idx: Tensor
    targets: Tensor
    documents: Tensor | None


class RankSlice(NamedTuple):
    """One rank's slice of the ``world_size * micro_batch_size`` sequences of one forward pass on all ranks."""

    rank: int
    world_size: int
    micro_batch_size: int


class TrainBatches(Dataset[Batch]):
    """Training micro-batches of one rank, indexed by m >= 0 without an upper bound.

    With A gradient accumulation steps, index m is micro-batch m % A of optimizer step m // A. A is the same for all
    steps and is computed from the last stage of the batch size schedule. With a single stage, the windows of a
    micro-batch do not depend on A.

    Args:
        stream: Tokens of the train split.
        order: Order of the windows.
        part: Rank, world size, and micro-batch size in the last stage.
        eot_id: ID of the end-of-text token at which attention is masked, or None for packed documents.
        stages: Global batch size of every step, in windows. Default: ``world_size * micro_batch_size`` at every step.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: WindowOrder,
        part: RankSlice,
        eot_id: int | None = None,
        stages: BatchSizeSchedule | None = None,
    ) -> None:
        self.stream, self.order, self.part, self.eot_id = stream, order, part, eot_id
        windows_per_pass = part.world_size * part.micro_batch_size
        self.stages = stages or BatchSizeSchedule(windows_per_pass)
        self.accumulation = self.stages.sizes[-1] // windows_per_pass
        self.group_size = max(1, WINDOWS_PER_GROUP // part.micro_batch_size)
        self._latest: tuple[int, list[NDArray[np.int64]]] | None = None

    def positions(self, number: int) -> NDArray[np.int64]:
        """Returns the positions (B,) of the windows of micro-batch ``number`` in the training order."""
        step, micro = divmod(number, self.accumulation)
        size = self.stages.batch(step) // (self.part.world_size * self.accumulation)
        first = self.stages.first(step) + (micro * self.part.world_size + self.part.rank) * size
        return np.arange(first, first + size, dtype=np.int64)

    def __getitem__(self, number: int) -> Batch:
        self.stream.expect(self.order.ahead(int(self.positions(number)[0])))
        return _batch(self.stream, self._starts(number), self.order.block_size, self.eot_id)

    def _starts(self, number: int) -> NDArray[np.int64]:
        """Returns the start offsets (B,) of the windows of micro-batch ``number`` in the stream."""
        group, index = divmod(number, self.group_size)
        if self._latest is None or self._latest[0] != group:
            first = group * self.group_size
            positions = [self.positions(n) for n in range(first, first + self.group_size)]
            ends = np.cumsum([len(part) for part in positions])
            self._latest = group, np.split(self.order.starts(np.concatenate(positions)), ends[:-1])
        return self._latest[1][index]


class EvaluationBatches(Dataset[Batch]):
    """Evaluation micro-batches of one rank.

    All ranks have the same number of batches. They are padded with windows whose targets are ``IGNORE_INDEX``.

    Args:
        stream: Tokens of the evaluated split.
        starts: Start offsets (N,) of all windows, for all ranks.
        block_size: Sequence length T.
        part: Rank, world size and micro-batch size.
        eot_id: ID of the end-of-text token at which attention is masked, or None for packed documents.
    """

    def __init__(
        self,
        stream: TokenStream,
        starts: NDArray[np.int64],
        block_size: int,
        part: RankSlice,
        eot_id: int | None = None,
    ) -> None:
        self.stream, self.block_size, self.eot_id = stream, block_size, eot_id
        rows = -(-len(starts) // (part.world_size * part.micro_batch_size)) * part.micro_batch_size
        share = np.full(rows, -1, dtype=np.int64)
        mine = starts[part.rank :: part.world_size]
        share[: len(mine)] = mine
        self.starts = share.reshape(-1, part.micro_batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        starts = self.starts[number]
        batch = _batch(self.stream, np.maximum(starts, 0), self.block_size, self.eot_id)
        batch.targets[torch.from_numpy(starts < 0)] = IGNORE_INDEX
        return batch


def _batch(stream: TokenStream, starts: NDArray[np.int64], block_size: int, eot_id: int | None) -> Batch:
    rows = torch.from_numpy(stream.read(starts, block_size + 1))  # (B, T + 1)
    # clone(), not contiguous(): contiguous() of a single row is a view, and writing to targets would change idx
    idx = rows[:, :-1].clone(memory_format=torch.contiguous_format)
    targets = rows[:, 1:].clone(memory_format=torch.contiguous_format)
    documents = None if eot_id is None else (idx == eot_id).cumsum(dim=1)
    return Batch(idx, targets, documents)
