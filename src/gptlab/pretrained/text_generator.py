"""Texts out of a trained network: prompts to text, as it comes, and how fast that was."""

import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, prompt_ids
from gptlab.model.generation.bandwidth import measured_bandwidth
from gptlab.model.generation.generate import generate
from gptlab.model.generation.inference import Precision, bytes_per_token, decoder, for_inference
from gptlab.model.generation.sampling_config import Sampling
from gptlab.model.gpt import GPT

AT_ONCE = 16  # tokens a row between two looks at them, where nobody waits for the text: a look waits for the device
WORTH_COMPILING = 5000  # tokens a row, on a GPU


class Prepared(NamedTuple):
    """What writes: a network made for it, and its tokenizer."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    compiled: bool


class Speed(NamedTuple):
    """How fast texts were written.

    Attributes:
        prompt_tokens: Of all prompts, and the seconds until the first token of the texts.
        prefill_seconds: See there.
        tokens: Of all texts, after the first of each.
        decode_seconds: That these took.
        bytes_read: In these seconds: of weights, and of the cache.
    """

    prompt_tokens: int
    prefill_seconds: float
    tokens: int
    decode_seconds: float
    bytes_read: int


def prepare(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    precision: Precision,
    int8: bool,
    compile: Literal["auto"] | bool,  # noqa: A002  (the setting's name)
    max_new_tokens: int,
) -> Prepared:
    """Make a network ready to write, on this machine's first device; see conf/sample.yaml."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = (device.type == "cuda" and max_new_tokens >= WORTH_COMPILING) if compile == "auto" else compile
    model = for_inference(model, precision, device, int8=int8, packed=not compiled)
    return Prepared(model, tokenizer, device, compiled)


class Writing:
    """Texts that are being written: iterate over it to get what each row gains, then ask for its speed.

    Args:
        prepared: What writes.
        prompts: P of them.
        sampling: How to draw.
        stop: Strings before which a text ends.
        seeds: One for each text, P times as many as each prompt is continued.
        max_new_tokens: Most that each text gains.
        at_once: Tokens of a text between two pieces of it.
    """

    def __init__(
        self,
        prepared: Prepared,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        stop: Sequence[str],
        seeds: Sequence[int],
        max_new_tokens: int,
        at_once: int,
    ) -> None:
        self.prepared, self.sampling, self.seeds = prepared, sampling, seeds
        self.max_new_tokens, self.at_once = max_new_tokens, at_once
        self.ids = [prompt_ids(prepared.tokenizer, prompt) for prompt in prompts]
        self.streams = [TextStream(prepared.tokenizer, stop) for _ in seeds]
        self._begun = self._first = self._last = 0.0  # seconds of the clock; the first and the last token's
        self._steps = 0

    @property
    def beginnings(self) -> list[str]:
        """What each text begins with: its prompt."""
        copies = len(self.seeds) // len(self.ids)
        texts = [self.prepared.tokenizer.decode(ids).removeprefix(END_OF_TEXT) for ids in self.ids]
        return [text for text in texts for _ in range(copies)]

    @property
    def passes_the_block(self) -> bool:
        """Whether a text may become longer than the model's block."""
        return max(map(len, self.ids)) + self.max_new_tokens > self.prepared.model.config.block_size

    def __iter__(self) -> Iterator[list[str]]:
        """Yield the next piece of every text, until all have ended; pieces may be empty."""
        model, _, device, compiled = self.prepared
        rows = generate(
            model,
            self.ids,
            self.sampling,
            seeds=self.seeds,
            max_new_tokens=self.max_new_tokens,
            decoder=decoder(model, compiled=compiled),
            device=device,
        )
        self._begun = time.perf_counter()
        waiting: list[torch.Tensor] = []
        for ids in rows:
            waiting.append(ids)
            self._steps += 1
            if self._steps == 1 or len(waiting) == self.at_once:
                yield self._pieces(waiting)
                waiting = []
                if all(stream.ended for stream in self.streams):
                    return
        if waiting:
            yield self._pieces(waiting)
        yield [stream.close() for stream in self.streams]

    def _pieces(self, waiting: list[torch.Tensor]) -> list[str]:
        ids = torch.stack(waiting, dim=1).tolist()
        self._last = time.perf_counter()
        if self._steps == 1:
            self._first = self._last
        return [stream.push(row) for stream, row in zip(self.streams, ids, strict=True)]

    def speed(self) -> Speed:
        """How fast it was."""
        model, rows, prompt = self.prepared.model, len(self.seeds), max(map(len, self.ids))
        mean_length = min(prompt + self._steps // 2, model.config.block_size)
        each = bytes_per_token(model, rows, mean_length)
        return Speed(
            prompt_tokens=sum(map(len, self.ids)),
            prefill_seconds=self._first - self._begun,
            tokens=rows * (self._steps - 1),
            decode_seconds=self._last - self._first,
            bytes_read=each * (self._steps - 1),
        )


def report(speed: Speed, device: torch.device) -> str:
    """Say how fast texts were written, beside the bandwidth of the memory, which is measured now."""
    bandwidth = measured_bandwidth(device)
    prefill = speed.prompt_tokens / max(speed.prefill_seconds, 1e-9)
    lines = [f"prefill   {speed.prompt_tokens:,} tokens in {speed.prefill_seconds:.3f} s: {prefill:,.1f} tokens/s"]
    if speed.tokens:
        read = speed.bytes_read / speed.decode_seconds
        lines.append(
            f"decode    {speed.tokens:,} tokens in {speed.decode_seconds:.3f} s: "
            f"{speed.tokens / speed.decode_seconds:,.1f} tokens/s, {read / 1e9:.1f} GB/s of weights and cache"
        )
        lines.append(f"memory    {bandwidth / 1e9:.1f} GB/s measured; decoding reached {read / bandwidth:.0%} of it")
    return "\n".join(lines)
