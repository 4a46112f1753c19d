"""Sampling of tokens, without synchronizing with the device.

Shapes: B batch, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.config import SamplingConfig

NOT_FINITE = -1  # returned instead of a token ID if the logits are NaN or infinite
MIN_TEMPERATURE = 1e-20  # logits divided by less could exceed float32


def row_seeds(seed: int, rows: int) -> list[int]:
    """Returns one 64-bit seed per row, which depends only on ``seed`` and the row's index."""
    sequences = (np.random.SeedSequence((seed, row)) for row in range(rows))
    return [int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences]


def uniform_numbers(seeds: Sequence[int], count: int) -> Tensor:
    """Draws uniform numbers in [0, 1) of shape (B, count) on the CPU.

    A row depends only on its seed: a larger ``count`` appends numbers. The numbers have 24 bits, so their float64
    product with a positive number is always less than that number.
    """
    numbers = [np.random.default_rng(seed).random(count, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(numbers))


def sample_next_token(logits: Tensor, seen: Tensor | None, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Samples one token ID per row (B,), by inverting the cumulative distribution; ``NOT_FINITE`` if that has NaNs.

    Args:
        logits: Next-token logits (B, V).
        seen: Mask (B, V) of the tokens that each row contains; None without a repetition penalty.
        uniforms: Uniform numbers (B,) in [0, 1), the only source of randomness.
        sampling: Temperature, filters and repetition penalty.
    """
    if seen is not None:
        logits = apply_repetition_penalty(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature < MIN_TEMPERATURE:
        largest, greedy = logits.max(dim=-1)  # NaN if there is one
        return greedy.where(largest.isfinite(), NOT_FINITE)
    values, ids = top_candidates(logits, sampling)
    probabilities = filtered_probabilities(values.float() / sampling.temperature, sampling)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # the first candidate whose cumulative probability exceeds the number, so never one with probability 0
    index = torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)
    index = index.clamp(max=values.size(-1) - 1)  # NaN exceeds no number
    return (index if ids is None else ids.gather(1, index))[:, 0].where(cumulative[:, -1] > 0, NOT_FINITE)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens in ``seen`` (B, V) less likely (Keskar et al. 2019, section 4.1); returns logits (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_candidates(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Returns the logits (B, K) of the candidates and their IDs, most likely first; or all logits unsorted and None."""
    vocabulary = logits.size(-1)
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        return logits.topk(sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        return logits.sort(dim=-1, descending=True)
    return logits, None


def filtered_probabilities(values: Tensor, sampling: SamplingConfig) -> Tensor:
    """Returns probabilities (B, K), 0 for tokens that ``top_p`` or ``min_p`` excludes; they may sum to less than 1."""
    probabilities = F.softmax(values, dim=-1)
    kept = probabilities
    if sampling.top_p is not None and sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = kept.where(before < sampling.top_p, 0)
    if sampling.min_p is not None:
        kept = kept.where(probabilities >= sampling.min_p * probabilities.amax(dim=-1, keepdim=True), 0)
    return kept
