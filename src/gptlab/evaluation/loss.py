"""Loss and bits per byte of a whole split, scored in windows that may overlap.

Shapes: N windows of a split, B windows of a batch, T tokens of a window (block size), V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlab.data.batches import IGNORE_INDEX, Batch
from gptlab.data.shards.streams import TokenStream
from gptlab.errors import UserError
from gptlab.model.gpt import GPT


def check_finite(losses: Iterable[float], what: str) -> None:
    """Raises UserError if a loss of a model on ``what`` is not finite."""
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"The loss on {what} is not finite (NaN or infinite), so the model cannot be evaluated. Its training may "
            "have diverged."
        )


class LossSums:
    """Running sums for the loss and bits per byte, which can be added over batches and devices in any order.

    Unlike the loss, bits per byte does not depend on the tokenizer: it is the sum of the losses in nats, divided by
    ln 2 and the number of UTF-8 bytes, without special tokens (Gao et al. 2020, The Pile, section 3.1).

    Args:
        token_bytes: Number of UTF-8 bytes of each token (V,), 0 for special tokens.
    """

    def __init__(self, token_bytes: Tensor) -> None:
        self.token_bytes = token_bytes
        # nats, tokens, nats without special tokens, bytes
        self.sums = torch.zeros(4, dtype=torch.float64, device=token_bytes.device)

    def add(self, nats: Tensor, targets: Tensor) -> None:
        """Adds the losses ``nats`` (B, T) of ``targets`` (B, T). Targets of -100 are not scored."""
        nats, targets = nats.flatten().double(), targets.flatten()
        scored = targets != IGNORE_INDEX
        lengths = torch.where(scored, self.token_bytes[targets.clamp(min=0)].long(), 0)
        text_nats = torch.where(lengths > 0, nats, 0)
        self.sums += torch.stack((nats.sum(), scored.sum(), text_nats.sum(), lengths.sum()))

    def result(self) -> tuple[float, float]:
        """Returns the mean loss in nats per token and the bits per byte, or NaN if there are no tokens."""
        nats, tokens, text_nats, text_bytes = self.sums.tolist()
        return (
            nats / tokens if tokens else math.nan,
            text_nats / (math.log(2) * text_bytes) if text_bytes else math.nan,
        )


class EvalWindows(NamedTuple):
    """Evaluation windows of a token stream, as arrays (N,).

    Attributes:
        begins: Start offset of each window in the stream.
        lengths: Number of input tokens of each window: the block size, or less for the last window.
        scored: Number of predictions of each window that are scored, counted from its end.
    """

    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scored: NDArray[np.int64]


def cut_windows(tokens: int, block_size: int, stride: int, limit: int | None) -> EvalWindows:
    """Divides a stream into windows that start every ``stride`` tokens.

    The first window scores all of its predictions. Every other window scores its last ``stride`` predictions, which no
    earlier window has scored, with a context of at least ``block_size - stride`` tokens ("Perplexity of fixed-length
    models" in the documentation of transformers). The last window may be shorter. With ``stride=block_size``, windows
    do not overlap.

    Args:
        tokens: Length of the stream.
        block_size: Sequence length T.
        stride: Distance between the starts of two windows, 1 to T tokens.
        limit: Number of full windows to score, evenly spaced, as in evaluations during training. None scores all.

    Raises:
        ValueError: The stream has fewer than two tokens.
    """
    if tokens < 2:
        unit = "token" if tokens == 1 else "tokens"
        raise ValueError(f"the split has {tokens} {unit}, but at least two are required")
    targets = tokens - 1
    number = 1 + max(0, -(-(targets - block_size) // stride))
    begins = np.arange(number, dtype=np.int64) * stride
    lengths = np.minimum(block_size, targets - begins)
    windows = EvalWindows(begins, lengths, lengths - np.where(begins == 0, 0, block_size - stride))
    if limit is None:
        return windows
    num_full = max(1, int((lengths == block_size).sum()))
    count = min(limit, num_full)
    chosen = np.arange(count, dtype=np.int64) * num_full // count
    return EvalWindows(*(part[chosen] for part in windows))


class WindowBatches:
    """Batches of evaluation windows of one rank.

    The windows of a batch, and therefore its losses, do not depend on the number of ranks.

    Args:
        stream: The token stream.
        windows: Windows of the stream.
        block_size: Sequence length T.
        batch_size: Batch size B. The last batch may be smaller.
        eot_id: ID of the end-of-text token at which attention is masked, or None for packed documents.
        rank: Rank of this process.
        world_size: Number of processes that share the batches.
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
        """Yields the batches. Targets that are not scored are -100."""
        self.stream.expect([(0, len(self.stream))])
        for part in self.parts:
            begins, lengths, scored = (values[part] for values in self.windows)
            rows = np.zeros((len(begins), self.block_size + 1), dtype=np.int64)  # (B, T + 1)
            whole = lengths == self.block_size
            rows[whole] = self.stream.read(begins[whole], self.block_size + 1)
            for row in np.flatnonzero(~whole):
                rows[row, : lengths[row] + 1] = self.stream.read(begins[row : row + 1], lengths[row] + 1)[0]
            position = np.arange(self.block_size)
            unscored = (position < (lengths - scored)[:, None]) | (position >= lengths[:, None])
            targets = np.where(unscored, IGNORE_INDEX, rows[:, 1:])
            idx = torch.from_numpy(rows[:, :-1]).contiguous()
            documents = None if self.eot_id is None else (idx == self.eot_id).cumsum(dim=1)
            yield Batch(idx, torch.from_numpy(targets), documents)


@torch.no_grad()
def accumulate_losses(sums: LossSums, model: GPT, batches: Iterable[Batch], chunk: int | None) -> None:
    """Adds the losses of batches to ``sums``.

    Args:
        sums: Running sums, on the device of the model.
        model: The model.
        batches: Batches, on any device.
        chunk: Chunk size of the loss, as in ``GPT.token_losses``.
    """
    device = sums.token_bytes.device
    for batch in batches:
        idx, targets = batch.idx.to(device), batch.targets.to(device)
        documents = None if batch.documents is None else batch.documents.to(device)
        sums.add(model.token_losses(idx, targets, documents, chunk), targets)
