"""Continue texts: every token computed once, its keys and values kept (Pope et al. 2023, section 2.1).

Shapes: B rows, P prompts (each for B / P rows), T time, S slots of the cache, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gptlab.model.generation.kv_cache import KVCache, Place
from gptlab.model.generation.sampler import next_ids, uniform_numbers
from gptlab.model.generation.sampling_config import Sampling
from gptlab.model.gpt import GPT

Score = Callable[[Tensor, KVCache, Place], Tensor]  # as GPT.next_logits


class Decoder:
    """Scores one token after the other.

    Args:
        score: ``next_logits`` of the network, or what computes the same.
        bucket: The slots that are looked at are a multiple of this; a compiled ``score`` has a graph for each number.
    """

    def __init__(self, score: Score, bucket: int) -> None:
        self.score, self.bucket = score, bucket


def plain_decoder(model: GPT) -> Decoder:
    """Look at no slot that is not needed."""
    return Decoder(model.next_logits, 1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    decoder: Decoder,
    device: torch.device,
) -> Iterator[Tensor]:
    """Continue prompts of any lengths, all at once.

    A row depends on its prompt and its seed, and on no other row (but for how floating point rounds in batches of
    different sizes). What grows past the block goes on from the last half of a block, computed anew; so does a prompt
    that is longer than the block.

    Args:
        model: Its training mode is restored in the end.
        prompts: Token ids of P prompts, none of them empty.
        sampling: How to draw.
        seeds: Of all rows, P times as many as each prompt is continued; those of a prompt follow each other.
        max_new_tokens: How many tokens each row gains.
        decoder: Of ``model``.
        device: That the model computes on.

    Yields:
        The next token id of every row (B,), on the device; nothing waits for it.
    """
    rows = _Rows(model, prompts, len(seeds) // len(prompts), max_new_tokens, decoder, device)
    uniforms = uniform_numbers(seeds, max_new_tokens).to(device)
    seen = rows.seen() if sampling.repetition_penalty != 1 else None
    training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            ids = next_ids(rows.logits(), seen, uniforms[:, step], sampling)
            rows.append(ids)
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            yield ids
    finally:
        model.train(training)


class _Rows:
    """The rows so far, padded on their left, and what the cache has of them."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        copies: int,
        more: int,
        decoder: Decoder,
        device: torch.device,
    ) -> None:
        self.model, self.copies, self.decoder, self.device = model, copies, decoder, device
        self.lengths = [len(prompt) for prompt in prompts]  # of what the model sees, of each prompt or row
        self.end = max(self.lengths)  # tokens of the longest row
        padded = [[0] * (self.end - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.zeros((len(prompts), self.end + more), dtype=torch.long, device=device)
        self.ids[:, : self.end] = torch.tensor(padded)
        self.prompts = prompts
        block = model.config.block_size
        self.room = min(block, -(-(self.end + more) // decoder.bucket) * decoder.bucket)
        self.slots = torch.arange(self.room, device=device)
        self.cache: KVCache | None = None
        self.begins: Tensor | None = None
        self.next_slot = 0

    def logits(self) -> Tensor:
        """What follows every row (B, V)."""
        if self.cache is None:
            self.cache = KVCache(self.model.config.n_layer, self.room)
            logits = self._prefilled(self.cache)
            if self.copies > 1:
                self._repeat(self.copies)
            return logits.repeat_interleave(self.copies, dim=0)
        if self.next_slot == self.room:
            return self._prefilled(self.cache)
        at, self.next_slot = self.next_slot, self.next_slot + 1
        exactly = self.decoder.bucket == 1  # where it is not, that is the same for every token, as graphs want it
        place = Place(self.slots[at : self.next_slot], self.begins, self._visible(self.next_slot), ends=exactly)
        return self.decoder.score(self.ids[:, self.end - 1 : self.end], self.cache, place)

    def append(self, ids: Tensor) -> None:
        """Lengthen every row by one token (B,)."""
        self.ids[:, self.end] = ids
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def seen(self) -> Tensor:
        """Which tokens every row has (B, V)."""
        seen = torch.zeros((len(self.prompts), self.model.config.known_vocab_size), dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, list(prompt)] = True
        return seen.to(self.device).repeat_interleave(self.copies, dim=0)

    def _prefilled(self, cache: KVCache) -> Tensor:
        """Compute all that the model sees of the rows; return what follows (B, V)."""
        block = self.model.config.block_size
        self.lengths = [length if length <= block else max(block // 2, 1) for length in self.lengths]
        width = max(self.lengths)
        begins = torch.tensor([width - length for length in self.lengths])
        self.begins = begins.to(self.device) if begins.any() else None
        self.next_slot = width
        place = Place(self.slots[:width], self.begins, width, ends=True)
        return self.model.next_logits(self.ids[:, self.end - width : self.end], cache, place)

    def _repeat(self, times: int) -> None:
        """From here on, every row stands so many times, one after the other."""
        assert self.cache is not None  # noqa: S101
        self.cache, self.ids = self.cache.repeated(times), self.ids.repeat_interleave(times, dim=0)
        self.begins = None if self.begins is None else self.begins.repeat_interleave(times, dim=0)
        self.lengths = [length for length in self.lengths for _ in range(times)]

    def _visible(self, needed: int) -> int:
        return min(self.room, -(-needed // self.decoder.bucket) * self.decoder.bucket)


def continued(rows: Iterator[Tensor]) -> Tensor:
    """All tokens of ``generate`` (B, max_new_tokens)."""
    return torch.stack(list(rows), dim=1)
