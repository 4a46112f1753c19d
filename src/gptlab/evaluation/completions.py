"""Multiple-choice accuracy: the HellaSwag score that reproductions of GPT-2 report.

The model chooses the ending with the lowest loss, summed over the tokens of the ending (acc) or averaged over them
(acc_norm), as in llm.c (dev/data/hellaswag.py). lm-evaluation-harness tokenizes the texts differently and normalizes by
characters, so its results differ.

Shapes: B rows, T tokens of a row.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptlab.data.batches import IGNORE_INDEX
from gptlab.evaluation.hellaswag import Example


class Scorer(Protocol):
    """Model that computes the loss of each token; see ``gptlab.model.gpt.GPT``."""

    def token_losses(self, idx: Tensor, targets: Tensor, documents: Tensor | None, chunk: int | None) -> Tensor:
        """Returns the loss of every token (B, T), 0 for tokens that are not scored."""
        ...


class EndingLoss(NamedTuple):
    """Loss of one ending: the sum in nats, and the number of tokens."""

    nats: float
    tokens: int


class AccuracyCounts(NamedTuple):
    """Number of examples, and of correct answers by the lowest sum and by the lowest mean of the losses."""

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
    """Returns the batches of one rank, with examples of similar length in a batch.

    All ranks have the same number of batches. The last batch of a rank may be empty.

    Args:
        examples: Examples of all ranks.
        rank: Rank of this process.
        world_size: Number of processes.
        batch_size: Number of examples per batch.
    """
    own = sorted(examples[rank::world_size], key=_length, reverse=True)
    largest_share = -(-len(examples) // world_size)
    return [own[first : first + batch_size] for first in range(0, largest_share, batch_size)]


@torch.no_grad()
def ending_losses(
    model: Scorer, examples: Sequence[Example], *, block_size: int, device: torch.device, chunk: int | None
) -> list[list[EndingLoss]]:
    """Computes the loss of every ending of the examples, in one batch.

    Args:
        model: Model on ``device``.
        examples: Examples of the batch.
        block_size: Maximum number of tokens of a row. Longer texts are truncated on the left.
        device: Device of the model.
        chunk: Chunk size of the loss, as in ``GPT.token_losses``.

    Returns:
        The losses of the endings of each example.
    """
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
    """Counts the correct answers. If several endings have the lowest loss, the first one is the answer.

    An example whose losses are not all finite has no answer: it counts as not correct.
    """
    by_sum = by_mean = 0
    for endings, label in zip(losses, labels, strict=True):
        if not all(math.isfinite(loss.nats) for loss in endings):
            continue
        sums, means = [loss.nats for loss in endings], [loss.nats / loss.tokens for loss in endings]
        by_sum += sums.index(min(sums)) == label
        by_mean += means.index(min(means)) == label
    return AccuracyCounts(by_sum, by_mean, len(labels))


def _length(example: Example) -> int:
    return len(example.context) + max(map(len, example.endings))
