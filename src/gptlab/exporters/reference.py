"""Reference that an export is compared with, computed from the model before it is written.

Shapes: B prompts, T time, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.model.external import to_external
from gptlab.model.gpt import GPT

PROMPTS, LONGEST = 2, 64
BEGINNING, CONTINUATION = 8, 16  # tokens of what is continued, and of what is added
ScoreFunction = Callable[[Tensor], Tensor]  # ids (B, T) to logits (B, T, V)


class GreedyContinuation(NamedTuple):
    """Greedy continuation of a text.

    Attributes:
        ids: That were added.
        margins: By how much the logit of each is above the next best.
    """

    ids: list[int]
    margins: list[float]


class Reference(NamedTuple):
    """Outputs and weights that an exported model must reproduce.

    Attributes:
        prompts: Token ids (B, T).
        logits: Of them (B, T, V).
        beginning: Token ids that are continued.
        greedy: How.
        tensors: SHA-256 of each tensor by the name and in the orientation of nanoGPT, as it is stored.
        rounding: The largest difference that storing the weights in fewer bits made to the logits; None: none was made.
        end_of_text: The id at which other programs end a text.
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
        """The largest logit, which differences are relative to, but at least 1."""
        return max(1.0, self.logits.abs().max().item())


@torch.no_grad()
def make_reference(
    model: GPT, stored: Mapping[str, torch.dtype], *, biases: bool, end_of_text: int | None
) -> Reference:
    """Rounds the weights to the format's dtypes, and computes what the exported model must reproduce.

    Args:
        model: On the CPU, in float32; its weights are rounded.
        stored: Type of each tensor of ``to_external`` in the file.
        biases: See ``to_external``.
        end_of_text: The tokenizer's.
    """
    prompts = _prompts(model.config.known_vocab_size, model.config.block_size, end_of_text)
    exact = model(prompts)
    rounded = _round(model, stored)
    logits = model(prompts) if rounded else exact
    beginning = prompts[0, : max(1, min(BEGINNING, model.config.block_size // 2))].tolist()
    named = to_external(model, transposed=False, biases=biases)
    return Reference(
        prompts,
        logits,
        beginning,
        greedy_continuation(model, beginning, min(CONTINUATION, model.config.block_size - len(beginning))),
        {name: tensor_hash(tensor.to(stored[name])) for name, tensor in named.items()},
        (logits - exact).abs().max().item() if rounded else None,
        end_of_text,
    )


def greedy_continuation(score: ScoreFunction, beginning: Sequence[int], tokens: int) -> GreedyContinuation:
    """Continues a text by ``tokens`` tokens, always the likeliest."""
    ids, margins = list(beginning), []
    for _ in range(tokens):
        logits = score(torch.tensor([ids]))[0, -1]
        best = logits.topk(min(2, len(logits)))
        margins.append((best.values[0] - best.values[-1]).item())
        ids.append(int(best.indices[0]))
    return GreedyContinuation(ids[len(beginning) :], margins)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _prompts(vocab_size: int, block_size: int, end_of_text: int | None) -> Tensor:
    """Returns ids from the whole vocabulary, without the end of text, which is its last id."""
    known = max(1, vocab_size - (end_of_text is not None))
    numbers = torch.arange(PROMPTS * min(block_size, LONGEST))
    return ((numbers * 7919 + 13) % known).view(PROMPTS, -1)


def _round(model: GPT, stored: Mapping[str, torch.dtype]) -> bool:
    """Rounds weights in place to the dtypes that they are stored in; returns whether any changes."""
    less = {name: dtype for name, dtype in stored.items() if dtype != torch.float32}
    for name, parameter in model.named_parameters():
        dtype = less.get(name) or less.get(f"transformer.{name}")
        if dtype is not None:
            parameter.copy_(parameter.to(dtype))  # where it is a file's own page, that becomes a page of this process
    return bool(less)
