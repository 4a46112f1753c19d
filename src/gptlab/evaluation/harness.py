"""Model adapter of lm-evaluation-harness (Gao et al. 2023) for a GPT in this process.

It follows the harness' own ``hf`` model: texts are encoded, cut from the left and scored as there, so that a model and
its export to Hugging Face give the same answers. Shapes: B rows, T time, N scored tokens, V vocabulary.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, prompt_ids
from gptlab.errors import UserError
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import generate, plain_decoder
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.gpt import GPT

Request = tuple[Any, list[int], list[int]]  # its texts, the ids of its context and those of its continuation
Answer = tuple[float, bool]  # log-likelihood of the continuation, and whether every token of it is the likeliest
MAX_GEN_TOKS = 256  # where a task does not say: HFLM.max_gen_toks
SEED = 1234  # simple_evaluate's own default, of what is not greedy
GENERATION_BATCH = 8  # tokens between two looks at whether all texts have ended
SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class HarnessModel(TemplateLM):
    """Answers the requests of lm-evaluation-harness.

    Args:
        model: On its device.
        tokenizer: The model's.
        batch_size: Rows at a time.
        device: The model's.
        autocast: Returns the context manager of a forward pass, which sets its precision.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.model, self.encoding, self.batch_size, self.autocast = model.eval(), tokenizer, batch_size, autocast
        self.max_length = model.config.block_size
        self._placed_on = device

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self._placed_on

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of processes, which share the requests."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def eot_token_id(self) -> int:
        """The end of text, which stands before a text that has no context."""
        if (end := self.encoding.end_of_text) is None:
            raise UserError(
                "The task has texts without a context, before which an end of text would stand; this model's "
                f"tokenizer, {self.encoding.record()['name']}, has none."
            )
        return end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text; <|endoftext|> in it becomes the token, as with ``hf``."""
        if (end := self.encoding.end_of_text) is None:
            return self.encoding.encode(string).tolist()
        first, *others = (self.encoding.encode(part).tolist() for part in string.split(END_OF_TEXT))
        return [*first, *(id_ for part in others for id_ in (end, *part))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns log-likelihoods of whole texts, in windows of the block that overlap in their first token only."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[Answer]:
        """Answers tokenized requests, longest first; contexts that several one-token continuations share are run once.

        The harness asks ``loglikelihood`` of a model, and TemplateLM, which cuts texts into ids, asks this of its
        subclasses: abstract there, though its name is private (read in lm_eval 0.4.13).

        Raises:
            UserError: A continuation is longer than the block.
        """
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)  # what the model sees, and the requests for that
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"A continuation has {len(continuation)} tokens, more than the model's block of {self.max_length}."
                )
            context = context or [self.prefix_token_id]  # it was of spaces, which have gone over to the continuation
            asked[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        rows = sorted(asked, key=lambda row: (-len(row), row))
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for first in self._watched(range(0, len(rows), self.batch_size), "scoring"):
            batch = rows[first : first + self.batch_size]
            counts = [max(len(requests[number][2]) for number in asked[row]) for row in batch]
            for row, logits in zip(batch, self._logits(batch, counts), strict=True):
                for number in asked[row]:
                    texts, _, continuation = requests[number]
                    answers[number] = _score_continuation(logits[-len(continuation) :], continuation)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return answers

    def _logits(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> Sequence[Tensor]:
        """Logits (N, V) of what follows the last so many tokens of each row."""
        idx = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        scored = torch.zeros_like(idx, dtype=torch.bool)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            idx[number, : len(row)] = torch.tensor(row)
            scored[number, len(row) - count : len(row)] = True
        with self.autocast():
            return self.model.logits_at(idx.to(self.device), scored.to(self.device)).split(list(counts))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop string; requests with the same settings are batched."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            ids = {number: self.tok_encode(requests[number].args[0]) for number in numbers}
            numbers.sort(key=lambda number, ids=ids: -len(ids[number]))  # type: ignore[misc]
            for first in self._watched(range(0, len(numbers), self.batch_size), "writing"):
                batch = numbers[first : first + self.batch_size]
                settings = requests[batch[0]].args[1]
                for number, text in zip(batch, self._continued([ids[n] for n in batch], settings, first), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _continued(self, contexts: Sequence[list[int]], settings: dict[str, Any], first: int) -> list[str]:
        """Continues contexts with the same settings; ``first`` is the index of the first one among these."""
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(settings, MAX_GEN_TOKS)}
        stops = handle_stop_sequences(kwargs.pop("until"), eos=END_OF_TEXT)
        most = kwargs.pop("max_gen_toks")
        if most >= self.max_length:
            raise UserError(
                f"The task has the model write {most} tokens, which leaves no room for a context in its block of "
                f"{self.max_length} (max_gen_toks in the task's generation_kwargs)."
            )
        prompts = [ids[-(self.max_length - most) :] or prompt_ids(self.encoding, "") for ids in contexts]
        streams = [TextStream(self.encoding, [stop for stop in stops if stop]) for _ in prompts]
        texts, waiting = [""] * len(prompts), []
        seeds = row_seeds(SEED + self.rank, first + len(prompts))[first:]
        sampling = _sampling_config(kwargs)
        with self.autocast():
            rows = generate(
                self.model,
                prompts,
                sampling,
                seeds=seeds,
                max_new_tokens=most,
                decoder=plain_decoder(self.model),
                device=self.device,
            )
            for step, ids in enumerate(rows, 1):
                waiting.append(ids)
                if step % GENERATION_BATCH == 0 or step == most:
                    pieces = torch.stack(waiting, dim=1).tolist()
                    texts = [text + s.push(piece) for text, s, piece in zip(texts, streams, pieces, strict=True)]
                    waiting = []
                    if all(stream.ended for stream in streams):
                        break
        return [text + stream.close() for text, stream in zip(texts, streams, strict=True)]

    def _watched(self, batches: range, what: str) -> Iterable[int]:
        """Wraps batches in a progress bar, on the first rank and in a terminal."""
        bar: Iterable[int] = tqdm(batches, desc=what, unit="batch", disable=True if self.rank else None)
        return bar

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gathers one number of every rank."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gathers objects of all ranks on rank ``dst``; returns None on the others."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Waits for the other ranks."""
        if self.world_size > 1:
            dist.barrier()


def model_fingerprint(model: GPT) -> str:
    """A hash of a model: the harness keeps answers by their questions alone, whoever has given them."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _score_continuation(logits: Tensor, continuation: list[int]) -> Answer:
    """Scores a continuation (N) by the logits (N, V) before its tokens."""
    targets = torch.tensor(continuation, device=logits.device)
    chances = torch.log_softmax(logits.float(), dim=-1)
    value = chances.gather(1, targets[:, None]).sum(dtype=torch.float64)
    return value.item(), bool((logits.argmax(dim=-1) == targets).all())


def _sampling_config(kwargs: dict[str, Any]) -> SamplingConfig:
    """Converts a task's generation settings; raises UserError for one without a counterpart."""
    sampled = kwargs.pop("do_sample")
    if unknown := set(kwargs) - SAMPLING_KEYS:
        raise UserError(f"The task's generation_kwargs have {', '.join(sorted(unknown))}, which gptlab does not have.")
    given = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0, **kwargs}
    return SamplingConfig(**(given if sampled else {**given, "temperature": 0.0}))
