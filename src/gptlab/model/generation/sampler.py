"""Drawing tokens, without waiting for the device.

Shapes: B batch, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.generation.sampling_config import Sampling


def row_seeds(seed: int, rows: int) -> list[int]:
    """One seed of 64 bits for each row: a function of the seed and the row's number alone."""
    sequences = (np.random.SeedSequence((seed, row)) for row in range(rows))
    return [int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences]


def uniform_numbers(seeds: Sequence[int], many: int) -> Tensor:
    """Numbers in [0, 1) for each row (B, many), on the CPU: its own, whatever its neighbours and however many follow.

    They have 24 bits, so that in float64 no product of theirs reaches what they multiply.
    """
    drawn = [np.random.default_rng(seed).random(many, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn))


def next_ids(logits: Tensor, seen: Tensor | None, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one id (B,) for each row, by the inverse of the cumulated distribution.

    Args:
        logits: (B, V).
        seen: Which tokens the rows have (B, V); None where nothing is asked of repetitions.
        uniforms: A number in [0, 1) for each row (B,); the only source of randomness.
        sampling: From what.
    """
    if seen is not None:
        logits = penalised(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = candidates(logits, sampling)
    cumulated = probabilities(values.float() / sampling.temperature, sampling).cumsum(dim=-1, dtype=torch.float64)
    # the first whose sum is above the drawn share: never one of probability 0, which adds nothing to the sum
    at = torch.searchsorted(cumulated, uniforms.double()[:, None] * cumulated[:, -1:], right=True)
    return (at if ids is None else ids.gather(1, at))[:, 0]


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely (Keskar et al. 2019, section 4.1); (B, V) as given."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Logits (B, K) that may be drawn from, and their ids, the likeliest first; or all logits, in order, and None."""
    vocabulary = logits.size(-1)
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        return logits.topk(sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        return logits.sort(dim=-1, descending=True)
    return logits, None


def probabilities(values: Tensor, sampling: Sampling) -> Tensor:
    """Shares (B, K) of candidates, 0 for those that ``top_p`` and ``min_p`` leave out; they need not sum to 1."""
    shares = F.softmax(values, dim=-1)
    kept = shares
    if sampling.top_p is not None and sampling.top_p < 1:
        before = shares.cumsum(dim=-1) - shares
        kept = kept.where(before < sampling.top_p, 0)
    if sampling.min_p is not None:
        kept = kept.where(shares >= sampling.min_p * shares.amax(dim=-1, keepdim=True), 0)
    return kept
