"""Sampling of tokens, without synchronizing with the device.

Shapes: B batch, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.config import SamplingConfig


def row_seeds(seed: int, rows: int) -> list[int]:
    """Returns a 64-bit seed for each row, a function of the seed and the row's number alone."""
    sequences = (np.random.SeedSequence((seed, row)) for row in range(rows))
    return [int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences]


def uniform_numbers(seeds: Sequence[int], count: int) -> Tensor:
    """Draws numbers in [0, 1) for each row (B, count), on the CPU; a row does not depend on other rows or on ``count``.

    They have 24 bits, so that in float64 their product with a number is below that number.
    """
    numbers = [np.random.default_rng(seed).random(count, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(numbers))


def sample_next_token(logits: Tensor, seen: Tensor | None, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Draws one id (B,) for each row, by inverting the cumulative distribution.

    Args:
        logits: (B, V).
        seen: Which tokens the rows have (B, V); None without a repetition penalty.
        uniforms: A number in [0, 1) for each row (B,); the only source of randomness.
        sampling: Temperature, filters and repetition penalty.
    """
    if seen is not None:
        logits = apply_repetition_penalty(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = top_candidates(logits, sampling)
    shares = filtered_probabilities(values.float() / sampling.temperature, sampling)
    cumulative = shares.cumsum(dim=-1, dtype=torch.float64)
    # the first whose sum is above the drawn number: never one of probability 0, which does not increase the sum
    index = torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)
    return (index if ids is None else ids.gather(1, index))[:, 0]


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens in ``seen`` (B, V) less likely (Keskar et al. 2019, section 4.1); returns logits (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_candidates(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Returns the logits (B, K) to draw from and their ids, the likeliest first; or all logits, in order, and None."""
    vocabulary = logits.size(-1)
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        return logits.topk(sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        return logits.sort(dim=-1, descending=True)
    return logits, None


def filtered_probabilities(values: Tensor, sampling: SamplingConfig) -> Tensor:
    """Returns probabilities (B, K), 0 for what ``top_p`` and ``min_p`` leave out; they need not sum to 1."""
    shares = F.softmax(values, dim=-1)
    kept = shares
    if sampling.top_p is not None and sampling.top_p < 1:
        before = shares.cumsum(dim=-1) - shares
        kept = kept.where(before < sampling.top_p, 0)
    if sampling.min_p is not None:
        kept = kept.where(shares >= sampling.min_p * shares.amax(dim=-1, keepdim=True), 0)
    return kept
