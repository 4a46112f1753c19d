"""Loss and bits per byte: sums over tokens, and a whole split scored in windows that may overlap.

Shapes: N windows of a split, B windows of a batch, T time (the block), V vocabulary.
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
from gptlab.model.gpt import GPT


class LossSums:
    """Sums over scored tokens, which can be added over batches and devices in any order.

    Bits per byte, unlike the loss, does not depend on the tokenizer: the nats of all tokens of text, over ln 2 times
    the bytes of that text. Special tokens are left out (Gao et al. 2020, The Pile, section 3.1).

    Args:
        token_bytes: Bytes of text of each id (V,); 0 for special tokens.
    """

    def __init__(self, token_bytes: Tensor) -> None:
        self.token_bytes = token_bytes
        # nats, tokens; nats and bytes of the tokens that stand for text
        self.sums = torch.zeros(4, dtype=torch.float64, device=token_bytes.device)

    def add(self, nats: Tensor, targets: Tensor) -> None:
        """Adds the losses (B, T) of ``targets`` (B, T), which are -100 where not scored."""
        nats, targets = nats.flatten().double(), targets.flatten()
        scored = targets != IGNORE_INDEX
        lengths = torch.where(scored, self.token_bytes[targets.clamp(min=0)].long(), 0)
        text_nats = torch.where(lengths > 0, nats, 0)
        self.sums += torch.stack((nats.sum(), scored.sum(), text_nats.sum(), lengths.sum()))

    def result(self) -> tuple[float, float]:
        """Returns the loss (nats per token) and bits per byte of everything added; nan if nothing was."""
        nats, tokens, text_nats, text_bytes = self.sums.tolist()
        return (
            nats / tokens if tokens else math.nan,
            text_nats / (math.log(2) * text_bytes) if text_bytes else math.nan,
        )


class EvalWindows(NamedTuple):
    """Windows of a token stream, an array (N,) each.

    Attributes:
        begins: First token of a window.
        lengths: Tokens of a window: the block or, in the last one, fewer; the token after each is predicted.
        scored: Number of a window's predictions that are scored, the last ones.
    """

    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scored: NDArray[np.int64]


def cut_windows(tokens: int, block_size: int, stride: int, limit: int | None) -> EvalWindows:
    """Cuts a stream into windows that begin ``stride`` tokens after each other.

    The first window scores all of its predictions, every other one those that no window before it has made, which are
    its last ``stride``: they have a context of ``block_size - stride`` tokens at least ("Perplexity of fixed-length
    models" in transformers' documentation). With a stride of the whole block no two windows overlap. A last, shorter
    window scores what is left.

    Args:
        tokens: Length of the stream.
        block_size: T.
        stride: Tokens between the beginnings of two windows, 1 to T.
        limit: Number of whole windows to score, evenly spread, as evaluations during training do; None scores all.

    Raises:
        ValueError: The stream has fewer than two tokens.
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
    """One rank's share of the batches of windows.

    Which windows are in a batch does not depend on the number of ranks, so neither do its losses.

    Args:
        stream: The tokens.
        windows: Windows of the stream.
        block_size: T.
        batch_size: B; the last batch may have fewer.
        eot_id: End-of-text id, at which attention is masked; None leaves documents packed.
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
        """Yields the batches; targets that are not scored are -100."""
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
    """Adds the losses of batches to ``sums``, on its device; ``chunk`` as in ``GPT.token_losses``."""
    device = sums.token_bytes.device
    for batch in batches:
        idx, targets = batch.idx.to(device), batch.targets.to(device)
        documents = None if batch.documents is None else batch.documents.to(device)
        sums.add(model.token_losses(idx, targets, documents, chunk), targets)
