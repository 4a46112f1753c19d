"""Micro-batches, each a function of its number alone: identical for any number of devices and workers.

Shapes: B sequences of the micro-batch, T time.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gptlab.data.order import BatchSizeSchedule, WindowOrder
from gptlab.data.shards.streams import TokenStream

AT_ONCE = 1024  # windows whose starts are computed together, which costs little more than those of one batch
IGNORE_INDEX = -100  # default ignore_index of cross_entropy: the target is not scored


class Batch(NamedTuple):
    """Token ids (B, T), next token ids (B, T), and document numbers.

    ``documents`` (B, T) numbers the documents within each sequence. Each but the first begins with an end-of-text
    token, as a text generated without a prompt does. It is None if documents are not separated.
    """

    idx: Tensor
    targets: Tensor
    documents: Tensor | None


class RankSlice(NamedTuple):
    """One rank's share of the sequences that all ranks process at once: at most ``world_size * micro_batch_size``."""

    rank: int
    world_size: int
    micro_batch_size: int


class TrainBatches(Dataset[Batch]):
    """Training micro-batches of one rank: number m, for any m >= 0.

    With A micro-batches per step, number m is micro-batch m % A of optimizer step m // A. A is the same for all steps
    and is computed from the last stage; with a single stage, the windows of a micro-batch do not depend on A.

    Args:
        stream: Tokens of the train split.
        order: Order of the windows.
        part: Rank, world size, and micro-batch size of the last stage.
        eot_id: End-of-text id that separates documents; None if they are not separated.
        stages: Number of windows of every step; None for a constant number.
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
        at_once = part.world_size * part.micro_batch_size
        self.stages = stages or BatchSizeSchedule(at_once)
        self.accumulation = self.stages.sizes[-1] // at_once
        self.at_once = max(1, AT_ONCE // part.micro_batch_size)
        self._latest: tuple[int, list[NDArray[np.int64]]] | None = None

    def positions(self, number: int) -> NDArray[np.int64]:
        """Returns the global positions (B,) of micro-batch ``number`` in the order of the windows."""
        step, micro = divmod(number, self.accumulation)
        size = self.stages.batch(step) // (self.part.world_size * self.accumulation)
        first = self.stages.first(step) + (micro * self.part.world_size + self.part.rank) * size
        return np.arange(first, first + size, dtype=np.int64)

    def __getitem__(self, number: int) -> Batch:
        self.stream.expect(self.order.ahead(int(self.positions(number)[0])))
        return _batch(self.stream, self._starts(number), self.order.block_size, self.eot_id)

    def _starts(self, number: int) -> NDArray[np.int64]:
        """Returns the first tokens (B,) of the windows of micro-batch ``number``."""
        group, index = divmod(number, self.at_once)
        if self._latest is None or self._latest[0] != group:
            first = group * self.at_once
            positions = [self.positions(n) for n in range(first, first + self.at_once)]
            ends = np.cumsum([len(part) for part in positions])
            self._latest = group, np.split(self.order.starts(np.concatenate(positions)), ends[:-1])
        return self._latest[1][index]


class EvaluationBatches(Dataset[Batch]):
    """One rank's share of the evaluation windows. All ranks have equally many batches, padded with unscored windows."""

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
    # clone(), not contiguous(): for a single row that is a view, and writing into targets would change idx
    idx = rows[:, :-1].clone(memory_format=torch.contiguous_format)
    targets = rows[:, 1:].clone(memory_format=torch.contiguous_format)
    documents = None if eot_id is None else (idx == eot_id).cumsum(dim=1)
    return Batch(idx, targets, documents)
