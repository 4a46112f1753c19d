"""Text generation: streams the continuations of prompts and measures the speed."""

import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from gptlab.data.tokenizers.text import END_OF_TEXT
from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import collect_tokens, generate
from gptlab.model.generation.inference import (
    Precision,
    build_decoder,
    bytes_per_token,
    measure_memory_bandwidth,
    prepare_for_inference,
)
from gptlab.model.gpt import GPT
from gptlab.training.hardware import has_compiler

TOKENS_PER_PIECE = 16  # for text that is not streamed to a user; each piece synchronizes with the device
MIN_TOKENS_TO_COMPILE = 5000  # new tokens per text above which compile=auto compiles the model on a GPU


class InferenceModel(NamedTuple):
    """Model prepared for inference, with its tokenizer."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    compiled: bool


class Speed(NamedTuple):
    """Speed of text generation.

    Attributes:
        prompt_tokens: Number of tokens of all prompts.
        prefill_seconds: Time until the first new tokens.
        tokens: Number of new tokens of all texts, without the first of each.
        decode_seconds: Time to generate ``tokens``.
        bytes_read: Bytes of the weights and of the KV cache that were read in ``decode_seconds``.
    """

    prompt_tokens: int
    prefill_seconds: float
    tokens: int
    decode_seconds: float
    bytes_read: int


def build_inference_model(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    precision: Precision,
    int8: bool,
    compile: Literal["auto"] | bool,  # noqa: A002  (name of the config key)
    max_new_tokens: int,
) -> InferenceModel:
    """Prepares a model for inference on the GPU if there is one, otherwise on the CPU.

    Args:
        model: Model, on the CPU.
        tokenizer: Tokenizer of the model.
        precision: dtype of the weights and of the computation.
        int8: Whether to quantize the weights to int8.
        compile: Whether to compile the decoding step; "auto" compiles on a GPU if there is a C compiler and
            ``max_new_tokens`` is large enough.
        max_new_tokens: Maximum number of new tokens per text.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compile == "auto":
        compiled = device.type == "cuda" and max_new_tokens >= MIN_TOKENS_TO_COMPILE and has_compiler()
    else:
        compiled = compile
    model = prepare_for_inference(model, precision, device, int8=int8, packed=not compiled)
    return InferenceModel(model, tokenizer, device, compiled)


class TextGenerator:
    """Iterator over the pieces of generated texts. ``speed`` is available after the iteration.

    Args:
        inference: Model prepared for inference.
        prompts: Prompts.
        sampling: Sampling options.
        stop: Strings before which a text ends.
        seeds: One seed per text. Their number is a multiple of the number of prompts.
        max_new_tokens: Maximum number of new tokens per text.
        tokens_per_piece: Number of tokens per piece.
    """

    def __init__(
        self,
        inference: InferenceModel,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        *,
        stop: Sequence[str],
        seeds: Sequence[int],
        max_new_tokens: int,
        tokens_per_piece: int,
    ) -> None:
        self.inference, self.sampling, self.seeds = inference, sampling, seeds
        self.max_new_tokens, self.tokens_per_piece = max_new_tokens, tokens_per_piece
        self.ids = [prompt_ids(inference.tokenizer, prompt) for prompt in prompts]
        self.streams = [TextStream(inference.tokenizer, stop) for _ in seeds]
        self._start = self._first = self._last = 0.0  # clock times of the start, the first and the last token
        self._steps = 0

    @property
    def prompts(self) -> list[str]:
        """The prompt of each text."""
        copies = len(self.seeds) // len(self.ids)
        texts = [self.inference.tokenizer.decode(ids).removeprefix(END_OF_TEXT) for ids in self.ids]
        return [text for text in texts for _ in range(copies)]

    @property
    def may_exceed_block(self) -> bool:
        """Whether a text may become longer than ``block_size`` tokens."""
        return max(map(len, self.ids)) + self.max_new_tokens > self.inference.model.config.block_size

    def __iter__(self) -> Iterator[list[str]]:
        """Yields the next piece of every text until all texts have ended. A piece may be empty."""
        model, _, device, compiled = self.inference
        rows = generate(
            model,
            self.ids,
            self.sampling,
            seeds=self.seeds,
            max_new_tokens=self.max_new_tokens,
            decoder=build_decoder(model, compiled=compiled),
            device=device,
        )
        self._start = time.perf_counter()
        pending: list[torch.Tensor] = []
        for ids in rows:
            pending.append(ids)
            self._steps += 1
            if self._steps == 1 or len(pending) == self.tokens_per_piece:
                yield self._pieces(pending)
                pending = []
                if all(stream.ended for stream in self.streams):
                    return
        if pending:
            yield self._pieces(pending)
        yield [stream.close() for stream in self.streams]

    def _pieces(self, pending: list[torch.Tensor]) -> list[str]:
        ids = collect_tokens(pending)
        self._last = time.perf_counter()
        if self._steps == 1:
            self._first = self._last
        return [stream.push(row) for stream, row in zip(self.streams, ids, strict=True)]

    def speed(self) -> Speed:
        """Returns the speed of the texts that have been generated so far."""
        model, rows, prompt = self.inference.model, len(self.seeds), max(map(len, self.ids))
        mean_length = min(prompt + self._steps // 2, model.config.block_size)
        step_bytes = bytes_per_token(model, rows, mean_length)
        return Speed(
            prompt_tokens=sum(map(len, self.ids)),
            prefill_seconds=self._first - self._start,
            tokens=rows * (self._steps - 1),
            decode_seconds=self._last - self._first,
            bytes_read=step_bytes * (self._steps - 1),
        )


def report(speed: Speed, device: torch.device) -> str:
    """Formats a speed and compares it with the memory bandwidth of ``device``, which this function measures."""
    bandwidth = measure_memory_bandwidth(device)
    prefill = speed.prompt_tokens / max(speed.prefill_seconds, 1e-9)
    lines = [f"prefill   {speed.prompt_tokens:,} tokens in {speed.prefill_seconds:.3f} s: {prefill:,.1f} tokens/s"]
    if speed.tokens:
        read = speed.bytes_read / speed.decode_seconds
        lines.append(
            f"decode    {speed.tokens:,} tokens in {speed.decode_seconds:.3f} s: "
            f"{speed.tokens / speed.decode_seconds:,.1f} tokens/s, {read / 1e9:.1f} GB/s of weights and KV cache"
        )
        lines.append(f"memory    {bandwidth / 1e9:.1f} GB/s measured, of which decoding used {read / bandwidth:.0%}")
    return "\n".join(lines)
