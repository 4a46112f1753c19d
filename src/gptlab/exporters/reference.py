"""Reference to which an export is compared, computed from the model before the export is written.

Shapes: B prompts, T tokens of a prompt, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.errors import UserError
from gptlab.model.external import to_external
from gptlab.model.gpt import GPT

PROMPTS, MAX_PROMPT_TOKENS = 2, 64
BEGINNING, CONTINUATION = 8, 16  # number of tokens of the greedy continuation's prompt, and of the continuation
ScoreFunction = Callable[[Tensor], Tensor]  # maps token IDs (B, T) to logits (B, T, V)


class GreedyContinuation(NamedTuple):
    """Greedy continuation of a text.

    Attributes:
        ids: Token IDs of the continuation.
        margins: Difference between the highest and the second highest logit at each token.
    """

    ids: list[int]
    margins: list[float]


class Reference(NamedTuple):
    """Outputs and weights that an exported model must reproduce.

    Attributes:
        prompts: Token IDs (B, T).
        logits: Logits (B, T, V) of the prompts, with the weights rounded to their stored dtype.
        beginning: Token IDs of the prompt of the greedy continuation.
        greedy: The greedy continuation.
        tensors: SHA-256 of each tensor in its stored dtype, with the name and in the orientation of nanoGPT.
        rounding: Largest absolute change of the logits caused by rounding the weights, or None without rounding.
        end_of_text: ID of the end-of-text token, at which other programs stop, or None.
    """

    prompts: Tensor
    logits: Tensor
    beginning: list[int]
    greedy: GreedyContinuation
    tensors: dict[str, str]
    rounding: float | None
    end_of_text: int | None

    @property
    def scale(self) -> float:
        """Largest absolute logit, but at least 1. Tolerances are relative to it."""
        return max(1.0, self.logits.abs().max().item())


@torch.no_grad()
def make_reference(
    model: GPT, stored: Mapping[str, torch.dtype], *, biases: bool, end_of_text: int | None
) -> Reference:
    """Rounds the weights to their stored dtypes, and computes the reference.

    Args:
        model: Model on the CPU, in float32. Its weights are rounded in place.
        stored: dtype of each tensor of ``to_external`` in the file.
        biases: As in ``to_external``.
        end_of_text: ID of the end-of-text token, or None.
    """
    prompts = _prompts(model.config.known_vocab_size, model.config.block_size, end_of_text)
    exact = model(prompts)
    rounded = _round(model, stored)
    logits = model(prompts) if rounded else exact
    beginning = prompts[0, : max(1, min(BEGINNING, model.config.block_size // 2))].tolist()
    tensors = to_external(model, transposed=False, biases=biases)
    return Reference(
        prompts,
        logits,
        beginning,
        greedy_continuation(model, beginning, min(CONTINUATION, model.config.block_size - len(beginning))),
        {name: tensor_hash(tensor.to(stored[name])) for name, tensor in tensors.items()},
        (logits - exact).abs().max().item() if rounded else None,
        end_of_text,
    )


def greedy_continuation(score: ScoreFunction, beginning: Sequence[int], tokens: int) -> GreedyContinuation:
    """Continues a text by ``tokens`` tokens with greedy decoding."""
    ids, margins = list(beginning), []
    for _ in range(tokens):
        logits = score(torch.tensor([ids]))[0, -1]
        best = logits.topk(min(2, len(logits)))
        margins.append((best.values[0] - best.values[-1]).item())
        ids.append(int(best.indices[0]))
    return GreedyContinuation(ids[len(beginning) :], margins)


def tensor_hash(tensor: Tensor) -> str:
    """Returns the SHA-256 of the elements of a tensor."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _prompts(vocab_size: int, block_size: int, end_of_text: int | None) -> Tensor:
    """Returns token IDs (B, T) from the whole vocabulary except the end-of-text token, which is the last ID."""
    known = max(1, vocab_size - (end_of_text is not None))
    numbers = torch.arange(PROMPTS * min(block_size, MAX_PROMPT_TOKENS))
    return ((numbers * 7919 + 13) % known).view(PROMPTS, -1)


def _round(model: GPT, stored: Mapping[str, torch.dtype]) -> bool:
    """Rounds weights in place to their stored dtypes. Returns whether any dtype is not float32.

    Raises:
        UserError: A weight is too large for its dtype.
    """
    reduced = {name: dtype for name, dtype in stored.items() if dtype != torch.float32}
    for name, parameter in model.named_parameters():
        dtype = reduced.get(name) or reduced.get(f"transformer.{name}")
        if dtype is not None:
            largest = parameter.abs().max().item()
            if torch.finfo(dtype).max < largest < math.inf:
                raise UserError(
                    f"dtype={str(dtype).removeprefix('torch.')} cannot hold the weights: {name} has an element of "
                    f"{largest:,.6g}, but the largest number is {torch.finfo(dtype).max:,.6g}. Use dtype=float32."
                )
            parameter.copy_(parameter.to(dtype))  # copies memory-mapped pages into the memory of this process
    return bool(reduced)
