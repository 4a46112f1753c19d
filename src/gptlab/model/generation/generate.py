"""Generation with a KV cache: each token is computed once (Pope et al. 2023, section 2.1).

Shapes: B rows, P prompts (B / P rows each), T time, S slots of the cache, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gptlab.errors import UserError
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.generation.sampler import NOT_FINITE, sample_next_token, uniform_numbers
from gptlab.model.gpt import GPT

NextLogits = Callable[[Tensor, KVCache, CachePosition], Tensor]  # signature of GPT.next_logits


class Decoder:
    """Next-token function of a model, and the bucket size of the KV cache.

    Args:
        next_logits: ``GPT.next_logits`` or an equivalent function.
        bucket: The number of slots attended over is rounded up to a multiple of this. A compiled function has one graph
            per multiple.
    """

    def __init__(self, next_logits: NextLogits, bucket: int) -> None:
        self.next_logits, self.bucket = next_logits, bucket


def plain_decoder(model: GPT) -> Decoder:
    """Returns a decoder that is not compiled and attends only over the slots in use."""
    return Decoder(model.next_logits, 1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    decoder: Decoder,
    device: torch.device,
) -> Iterator[Tensor]:
    """Generates continuations of a batch of prompts, which may have different lengths.

    A row depends only on its prompt and its seed, not on other rows (except for floating-point rounding in batches of
    different sizes). If a prompt or a row is longer than ``block_size``, generation continues from its last
    ``block_size // 2`` tokens, for which the cache is recomputed.

    Args:
        model: The model; its training mode is restored at the end.
        prompts: Token IDs of P prompts, none of them empty.
        sampling: Sampling parameters.
        seeds: One seed per row: P times the number of continuations per prompt. The seeds of a prompt are consecutive.
        max_new_tokens: Number of new tokens per row.
        decoder: Decoder of ``model``.
        device: Device of the model.

    Yields:
        The next token ID of every row (B,), on the device, or -1 for a row whose logits are not finite, for
        ``collect_tokens``. The host does not synchronize with the device.
    """
    rows = _Rows(model, prompts, len(seeds) // len(prompts), max_new_tokens, decoder, device)
    uniforms = uniform_numbers(seeds, max_new_tokens).to(device)
    seen = rows.seen_tokens() if sampling.repetition_penalty != 1 else None
    training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            ids = sample_next_token(rows.next_logits(), seen, uniforms[:, step], sampling)
            valid = ids.clamp(min=0)
            rows.append(valid)
            if seen is not None:
                seen.scatter_(1, valid[:, None], True)
            yield ids
    finally:
        model.train(training)


class _Rows:
    """Token IDs of the rows, left-padded, and their KV cache."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new_tokens: int,
        decoder: Decoder,
        device: torch.device,
    ) -> None:
        self.model, self.copies, self.decoder, self.device = model, copies, decoder, device
        self.lengths = [len(prompt) for prompt in prompts]  # context length of each prompt or row
        self.end = max(self.lengths)  # length of the longest row
        padded = [[0] * (self.end - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.zeros((len(prompts), self.end + max_new_tokens), dtype=torch.long, device=device)
        self.ids[:, : self.end] = torch.tensor(padded)
        self.prompts = prompts
        block = model.config.block_size
        self.num_slots = min(block, -(-(self.end + max_new_tokens) // decoder.bucket) * decoder.bucket)
        self.slots = torch.arange(self.num_slots, device=device)
        self.cache: KVCache | None = None
        self.has_cache = True  # whether the model uses it
        self.row_starts: Tensor | None = None
        self.next_slot = 0

    def next_logits(self) -> Tensor:
        """Computes the next-token logits (B, V) of every row."""
        if self.cache is None:
            self.cache = KVCache(self.model.config.n_layer, self.num_slots)
            logits = self._prefill(self.cache)
            self.has_cache = self.cache.is_filled
            if self.copies > 1:
                self._repeat_rows(self.copies)
            return logits.repeat_interleave(self.copies, dim=0) if self.has_cache else self._uncached_logits()
        if not self.has_cache:
            return self._uncached_logits()
        if self.next_slot == self.num_slots:
            return self._prefill(self.cache)
        slot, self.next_slot = self.next_slot, self.next_slot + 1
        is_end = self.decoder.bucket == 1  # constant with buckets, as a compiled graph requires
        slots, num_slots = self.slots[slot : self.next_slot], self._bucketed(self.next_slot)
        position = CachePosition(slots, self.row_starts, num_slots, is_end)
        return self.decoder.next_logits(self.ids[:, self.end - 1 : self.end], self.cache, position)

    def append(self, ids: Tensor) -> None:
        """Appends one token (B,) to every row."""
        self.ids[:, self.end] = ids
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def seen_tokens(self) -> Tensor:
        """Returns a mask (B, V) of the tokens that each row contains."""
        seen = torch.zeros((len(self.prompts), self.model.config.known_vocab_size), dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, list(prompt)] = True
        return seen.to(self.device).repeat_interleave(self.copies, dim=0)

    def _prefill(self, cache: KVCache) -> Tensor:
        """Fills the cache with the full context of the rows; returns their next-token logits (B, V)."""
        block = self.model.config.block_size
        self.lengths = [length if length <= block else max(block // 2, 1) for length in self.lengths]
        width = max(self.lengths)
        row_starts = torch.tensor([width - length for length in self.lengths])
        self.row_starts = row_starts.to(self.device) if row_starts.any() else None
        self.next_slot = width
        position = CachePosition(self.slots[:width], self.row_starts, width, is_end=True)
        return self.model.next_logits(self.ids[:, self.end - width : self.end], cache, position)

    def _uncached_logits(self) -> Tensor:
        """Computes the next-token logits (B, V) from the whole context of the rows, for a model without KV cache."""
        lengths = [min(length, self.model.config.block_size) for length in self.lengths]
        logits: list[Tensor] = [torch.empty(0)] * len(lengths)
        for length in set(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            found = self.model(self.ids[rows, self.end - length : self.end])[:, -1]
            for row, part in zip(rows, found, strict=True):
                logits[row] = part
        return torch.stack(logits)

    def _repeat_rows(self, times: int) -> None:
        """Repeats every row ``times`` times, consecutively."""
        assert self.cache is not None  # noqa: S101
        self.cache, self.ids = self.cache.repeat_rows(times), self.ids.repeat_interleave(times, dim=0)
        self.row_starts = None if self.row_starts is None else self.row_starts.repeat_interleave(times, dim=0)
        self.lengths = [length for length in self.lengths for _ in range(times)]

    def _bucketed(self, needed: int) -> int:
        return min(self.num_slots, -(-needed // self.decoder.bucket) * self.decoder.bucket)


class NonFiniteLogitsError(UserError):
    """Error of a model whose logits are NaN or infinite."""


def collect_tokens(tokens: Iterable[Tensor]) -> list[list[int]]:
    """Copies tokens that ``generate`` yields to the host; returns the token IDs of every row.

    Raises:
        NonFiniteLogitsError: The logits of a row are not finite.
    """
    ids: list[list[int]] = torch.stack(list(tokens), dim=1).tolist()
    if any(NOT_FINITE in row for row in ids):
        raise NonFiniteLogitsError(
            "The model cannot generate text, because its logits are not finite (NaN or infinite). Its training may "
            "have diverged."
        )
    return ids
