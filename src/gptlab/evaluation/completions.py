"""Accuracy on completions: the HellaSwag score that reproductions of GPT-2 report.

The loss of an ending after its context is summed over its tokens (acc), or their mean is taken (acc_norm); the model
chooses the ending with the lowest (llm.c, dev/data/hellaswag.py). The harness encodes the same texts in another way and
divides by characters, so that its figures are others.

Shapes: B rows, T time.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptlab.data.batches import IGNORE_INDEX
from gptlab.evaluation.hellaswag import Example


class Scorer(Protocol):
    """Model that returns token losses; see ``gptlab.model.gpt.GPT``."""

    def token_losses(self, idx: Tensor, targets: Tensor, documents: Tensor | None, chunk: int | None) -> Tensor:
        """Returns the loss of every token (B, T), 0 where it is not scored."""
        ...


class EndingLoss(NamedTuple):
    """Loss of one ending: the sum in nats, and the number of its tokens."""

    nats: float
    tokens: int


class AccuracyCounts(NamedTuple):
    """Number of examples, and of those answered correctly by the lowest sum and by the lowest mean."""

    by_sum: int
    by_mean: int
    examples: int

    @property
    def acc(self) -> float:
        """Accuracy by the lowest sum."""
        return self.by_sum / self.examples

    @property
    def acc_norm(self) -> float:
        """Accuracy by the lowest mean."""
        return self.by_mean / self.examples


def rank_batches(examples: Sequence[Example], rank: int, world_size: int, batch_size: int) -> list[list[Example]]:
    """Returns a rank's batches; all ranks have equally many, of which the last may be empty.

    Examples of similar length are batched together.
    """
    mine = sorted(examples[rank::world_size], key=_length, reverse=True)
    most = -(-len(examples) // world_size)
    return [mine[first : first + batch_size] for first in range(0, most, batch_size)]


@torch.no_grad()
def ending_losses(
    model: Scorer, examples: Sequence[Example], *, block_size: int, device: torch.device, chunk: int | None
) -> list[list[EndingLoss]]:
    """Scores all endings of some examples in one batch; texts longer than the block lose their beginning."""
    rows, counts = [], []
    for example in examples:
        for ending in example.endings:
            row = (example.context + ending)[-(block_size + 1) :]
            rows.append(row)
            counts.append(min(len(ending), len(row) - 1))
    longest = max(map(len, rows))
    padded = torch.zeros((len(rows), longest), dtype=torch.long)
    targets = torch.full((len(rows), longest - 1), IGNORE_INDEX)
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        padded[number, : len(row)] = torch.tensor(row)
        targets[number, len(row) - 1 - count : len(row) - 1] = torch.tensor(row[-count:])
    nats = model.token_losses(padded[:, :-1].contiguous().to(device), targets.to(device), None, chunk)  # (B, T)
    sums = iter(nats.double().sum(dim=1).tolist())
    tokens = iter(counts)
    return [[EndingLoss(next(sums), next(tokens)) for _ in example.endings] for example in examples]


def count_correct(losses: Sequence[Sequence[EndingLoss]], labels: Sequence[int]) -> AccuracyCounts:
    """Counts correct answers; of equally likely endings, the first is the answer."""
    by_sum = by_mean = 0
    for endings, label in zip(losses, labels, strict=True):
        sums, means = [loss.nats for loss in endings], [loss.nats / loss.tokens for loss in endings]
        by_sum += sums.index(min(sums)) == label
        by_mean += means.index(min(means)) == label
    return AccuracyCounts(by_sum, by_mean, len(labels))


def _length(example: Example) -> int:
    return len(example.context) + max(map(len, example.endings))
