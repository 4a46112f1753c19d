"""Model adapter of lm-evaluation-harness (Gao et al. 2023) for a GPT.

Encodes, truncates and scores texts as the ``hf`` model of the harness does, so that a model and its Hugging Face export
give the same results. Shapes: B rows, T tokens of a row, N scored tokens, V vocabulary.
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

from gptlab.data.tokenizers.text import END_OF_TEXT
from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from gptlab.errors import UserError
from gptlab.evaluation.loss import check_finite
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import collect_tokens, generate, plain_decoder
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.gpt import GPT

Request = tuple[Any, list[int], list[int]]  # texts, token IDs of the context, token IDs of the continuation
Answer = tuple[float, bool]  # log-likelihood of the continuation in nats, and whether greedy decoding would generate it
MAX_GEN_TOKS = 256  # default, as HFLM.max_gen_toks
SEED = 1234  # of sampling; default of simple_evaluate
GENERATION_BATCH = 8  # number of tokens after which to check whether all texts have ended
SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class HarnessModel(TemplateLM):
    """Model interface of lm-evaluation-harness for a GPT.

    Args:
        model: The model, on ``device``.
        tokenizer: Tokenizer of the model.
        batch_size: Number of rows per batch.
        device: Device of the model.
        autocast: Function that returns a context manager, which sets the precision of a forward pass.
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
        """Device of the model."""
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
        """ID of the end-of-text token, which precedes a text without a context. Raises UserError if there is none."""
        if (end := self.encoding.end_of_text) is None:
            raise UserError(
                f"tokenizer={self.encoding.record()['name']} of this model has no end-of-text token, but the task has "
                "texts without a context, which must start with one."
            )
        return end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the token IDs of a text. Encodes <|endoftext|> as the end-of-text token, like the ``hf`` model."""
        if (end := self.encoding.end_of_text) is None:
            return self.encoding.encode(string).tolist()
        first, *others = (self.encoding.encode(part).tolist() for part in string.split(END_OF_TEXT))
        return [*first, *(id_ for part in others for id_ in (end, *part))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text in nats, scored in windows that overlap by one token."""
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
        """Scores tokenized requests, longest first. One-token continuations of the same context share a row.

        Implements the abstract method of TemplateLM that its ``loglikelihood`` calls with tokenized texts (lm_eval
        0.4.13).

        Raises:
            UserError: A continuation is longer than ``block_size`` tokens, or its log-likelihood is not finite.
        """
        requests_by_input: dict[tuple[int, ...], list[int]] = defaultdict(list)  # requests by the input of the model
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"A continuation of the task has {len(continuation)} tokens, which exceeds block_size="
                    f"{self.max_length} of the model."
                )
            context = context or [self.prefix_token_id]  # a context of spaces was moved to the continuation
            requests_by_input[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        rows = sorted(requests_by_input, key=lambda row: (-len(row), row))
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for first in self._with_progress(range(0, len(rows), self.batch_size), "scoring"):
            batch = rows[first : first + self.batch_size]
            counts = [max(len(requests[number][2]) for number in requests_by_input[row]) for row in batch]
            for row, logits in zip(batch, self._logits(batch, counts), strict=True):
                for number in requests_by_input[row]:
                    texts, _, continuation = requests[number]
                    answers[number] = _score_continuation(logits[-len(continuation) :], continuation)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return answers

    def _logits(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> Sequence[Tensor]:
        """Returns, for each row, the logits (N, V) after its last N tokens, with N from ``counts``."""
        idx = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        scored = torch.zeros_like(idx, dtype=torch.bool)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            idx[number, : len(row)] = torch.tensor(row)
            scored[number, len(row) - count : len(row)] = True
        with self.autocast():
            return self.model.logits_at(idx.to(self.device), scored.to(self.device)).split(list(counts))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until a stop string. Batches requests with the same options.

        Raises:
            UserError: The options of a task are not supported, or leave no room for a context.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            ids = {number: self.tok_encode(requests[number].args[0]) for number in numbers}
            numbers.sort(key=lambda number, ids=ids: -len(ids[number]))  # type: ignore[misc]
            for first in self._with_progress(range(0, len(numbers), self.batch_size), "generating"):
                batch = numbers[first : first + self.batch_size]
                settings = requests[batch[0]].args[1]
                for number, text in zip(batch, self._continued([ids[n] for n in batch], settings, first), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _continued(self, contexts: Sequence[list[int]], settings: dict[str, Any], first: int) -> list[str]:
        """Continues contexts with the same options. ``first`` is the index of the first context in its group."""
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(settings, MAX_GEN_TOKS)}
        stops = handle_stop_sequences(kwargs.pop("until"), eos=END_OF_TEXT)
        max_new_tokens = kwargs.pop("max_gen_toks")
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks={max_new_tokens} in the task's generation_kwargs leaves no room for a context, because "
                f"the model has block_size={self.max_length}."
            )
        prompts = [ids[-(self.max_length - max_new_tokens) :] or prompt_ids(self.encoding, "") for ids in contexts]
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
                max_new_tokens=max_new_tokens,
                decoder=plain_decoder(self.model),
                device=self.device,
            )
            for step, ids in enumerate(rows, 1):
                waiting.append(ids)
                if step % GENERATION_BATCH == 0 or step == max_new_tokens:
                    pieces = collect_tokens(waiting)
                    texts = [text + s.push(piece) for text, s, piece in zip(texts, streams, pieces, strict=True)]
                    waiting = []
                    if all(stream.ended for stream in streams):
                        break
        return [text + stream.close() for text, stream in zip(texts, streams, strict=True)]

    def _with_progress(self, batches: range, description: str) -> Iterable[int]:
        """Wraps batches in a progress bar on the first rank, if the output is a terminal."""
        bar: Iterable[int] = tqdm(batches, desc=description, unit="batch", disable=True if self.rank else None)
        return bar

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gathers a scalar tensor from every rank."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gathers objects from all ranks on rank ``dst``. Returns None on the other ranks."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def model_fingerprint(model: GPT) -> str:
    """Returns a hash of the config and weights of a model, for the harness cache, whose keys do not include it."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _score_continuation(logits: Tensor, continuation: list[int]) -> Answer:
    """Scores a continuation (N,) with the logits (N, V) that predict its tokens."""
    targets = torch.tensor(continuation, device=logits.device)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    value = log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
    check_finite([value], "the task")
    return value, bool((logits.argmax(dim=-1) == targets).all())


def _sampling_config(kwargs: dict[str, Any]) -> SamplingConfig:
    """Converts the generation_kwargs of a task. Raises UserError for an option that gptlab does not support."""
    sampled = kwargs.pop("do_sample")
    if unknown := set(kwargs) - SAMPLING_KEYS:
        raise UserError(
            f"generation_kwargs of the task have {', '.join(sorted(unknown))}, which gptlab does not support."
        )
    given = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0, **kwargs}
    return SamplingConfig(**(given if sampled else {**given, "temperature": 0.0}))
