"""A whole split scored: every token but the first exactly once, in windows that may overlap.

Shapes: B windows of a batch, T time (the block).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gptlab.data.batches import IGNORE_INDEX, Batch
from gptlab.data.shards.streams import TokenStream
from gptlab.evaluation.loss import LossSums
from gptlab.model.gpt import GPT


class EvalWindows(NamedTuple):
    """What is read, and what of it is scored: an array (N,) each.

    Attributes:
        begins: The first token that a window sees.
        lengths: Tokens that it sees, the block or, in the last window, fewer; it predicts what follows each.
        scored: How many of its predictions, the last ones, are scored.
    """

    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scored: NDArray[np.int64]


def cut_windows(tokens: int, block_size: int, stride: int, limit: int | None) -> EvalWindows:
    """Cut a stream into windows that begin ``stride`` tokens after each other.

    The first window scores all of its predictions, every other one those that no window before it has made, which are
    its last ``stride``: they have a context of ``block_size - stride`` tokens at least ("Perplexity of fixed-length
    models" in transformers' documentation). With a stride of the whole block no two windows overlap. A last, shorter
    window scores what is left.

    Args:
        tokens: Of the stream.
        block_size: T.
        stride: From 1 to T.
        limit: Score only so many whole windows, evenly spread, as evaluations during training do; None: all.

    Raises:
        ValueError: The stream has no token to be predicted.
    """
    if tokens < 2:
        raise ValueError(f"{tokens} tokens: the first of a text is not predicted, so two are needed at least")
    targets = tokens - 1
    number = 1 + max(0, -(-(targets - block_size) // stride))
    begins = np.arange(number, dtype=np.int64) * stride
    lengths = np.minimum(block_size, targets - begins)
    every = EvalWindows(begins, lengths, lengths - np.where(begins == 0, 0, block_size - stride))
    if limit is None:
        return every
    whole = max(1, int((lengths == block_size).sum()))
    count = min(limit, whole)
    chosen = np.arange(count, dtype=np.int64) * whole // count
    return EvalWindows(*(part[chosen] for part in every))


class WindowBatches:
    """A rank's share of the batches of windows.

    Which windows are in a batch does not depend on the number of ranks, so neither do its losses.

    Args:
        stream: The tokens.
        windows: Of the stream.
        block_size: T.
        batch_size: B; the last batch may have fewer.
        eot_id: The id that documents are told apart by; None leaves them packed.
        rank: Of this process.
        world_size: Processes among which the batches are dealt out.
    """

    def __init__(
        self,
        stream: TokenStream,
        windows: EvalWindows,
        block_size: int,
        batch_size: int,
        eot_id: int | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.windows, self.block_size, self.eot_id = stream, windows, block_size, eot_id
        firsts = range(0, len(windows.begins), batch_size)
        self.parts = [slice(first, first + batch_size) for first in firsts[rank::world_size]]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; targets that are not scored are -100."""
        self.stream.expect([(0, len(self.stream))])
        for part in self.parts:
            begins, lengths, scored = (values[part] for values in self.windows)
            rows = np.zeros((len(begins), self.block_size + 1), dtype=np.int64)  # (B, T + 1)
            whole = lengths == self.block_size
            rows[whole] = self.stream.read(begins[whole], self.block_size + 1)
            for row in np.flatnonzero(~whole):
                rows[row, : lengths[row] + 1] = self.stream.read(begins[row : row + 1], lengths[row] + 1)[0]
            place = np.arange(self.block_size)
            unscored = (place < (lengths - scored)[:, None]) | (place >= lengths[:, None])
            targets = np.where(unscored, IGNORE_INDEX, rows[:, 1:])
            idx = torch.from_numpy(rows[:, :-1]).contiguous()
            documents = None if self.eot_id is None else (idx == self.eot_id).cumsum(dim=1)
            yield Batch(idx, torch.from_numpy(targets), documents)


@torch.no_grad()
def accumulate_losses(sums: LossSums, model: GPT, batches: Iterable[Batch], chunk: int | None) -> None:
    """Add the losses of batches to ``sums``, on its device; ``chunk`` is that of ``GPT.token_losses``."""
    device = sums.token_bytes.device
    for batch in batches:
        idx, targets = batch.idx.to(device), batch.targets.to(device)
        documents = None if batch.documents is None else batch.documents.to(device)
        sums.add(model.token_losses(idx, targets, documents, chunk), targets)
