"""Cross-entropy loss of the head, optionally in chunks of tokens, to avoid storing the logits of a full batch.

Shapes: N tokens, C channels, R rows of the head's weight (including padding), V vocabulary.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.kernels import compiled_function

IGNORED = -100  # target that is not scored; the default ignore_index of cross_entropy


class LogitSettings(NamedTuple):
    """Options of the head, other than its weight.

    Attributes:
        vocab_size: Vocabulary size V; further rows of the weight are padding.
        soft_cap: See ``GPTConfig.logit_soft_cap``.
    """

    vocab_size: int
    soft_cap: float | None

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Computes logits (..., V) from hidden states (..., C) and the head's weight (R, C)."""
        return self.cap(F.linear(x, weight)[..., : self.vocab_size])

    def cap(self, logits: Tensor) -> Tensor:
        """Limits logits to [-soft_cap, soft_cap] with tanh (Gemma Team 2024, Gemma 2, section 2)."""
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings, chunk: int | None) -> Tensor:
    """Returns the loss in nats of every token (N,), 0 where not scored, for evaluation.

    Args:
        x: Hidden states (N, C).
        weight: Weight (R, C) of the head.
        targets: Token IDs (N,), -100 where not scored.
        settings: Options of the head.
        chunk: Number of tokens whose logits are in memory at a time; None for all tokens.
    """
    if chunk is None or chunk >= len(x):
        return _token_losses(x, weight, targets, settings)
    return _chunked_token_losses(x, weight, targets, settings, chunk, compiled=_compiles_chunks(x))


def lm_loss(x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings, chunk: int | None) -> Tensor:
    """Returns the mean loss () in nats per scored token, for training; arguments as in ``token_losses``."""
    if chunk is None or chunk >= len(x):
        return F.cross_entropy(settings.logits(x, weight).float(), targets, ignore_index=IGNORED)
    if torch.is_autocast_enabled(x.device.type):  # autocast does not apply inside an autograd.Function
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _chunked_loss(x, weight, targets, settings, chunk, compiled=_compiles_chunks(x))


def custom_loss(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings
) -> Tensor:
    """Returns the loss () of a loss function of the user; see ``GPT.loss``.

    Args:
        function: Loss function.
        x: Hidden states (N, C).
        weight: Weight (R, C) of the head.
        targets: Token IDs (N,), -100 where not scored.
        settings: Options of the head.
    """
    if next(iter(signature(function).parameters), None) == "states":
        return function(x, weight[: settings.vocab_size], targets)
    return function(settings.logits(x, weight).float(), targets)


def _compiles_chunks(x: Tensor) -> bool:
    """Whether to compile the work on each chunk: in a compiled model on a GPU, where it is several times faster."""
    return torch.compiler.is_compiling() and x.is_cuda


def _token_losses(x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings) -> Tensor:
    logits = settings.logits(x, weight).float()
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the loop would be unrolled
def _chunked_token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings, chunk: int, *, compiled: bool
) -> Tensor:
    score = compiled_function(_token_losses) if compiled else _token_losses
    parts = zip(x.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([score(part, weight, target, settings) for part, target in parts])


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the loop would be unrolled, with all chunks in memory
def _chunked_loss(
    x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings, chunk: int, *, compiled: bool
) -> Tensor:
    loss: Tensor = _ChunkedLoss.apply(x, weight, targets, settings, chunk, compiled)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of each chunk together with its logits, which are neither stored nor recomputed.

    Source: Liger's fused linear cross entropy (Hsu et al. 2024, section 3.2). PyTorch's ``linear_cross_entropy`` does
    the same, but returns the loss in the dtype of the hidden states, and supports neither padding nor soft caps.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, settings: LogitSettings, chunk: int, compiled: bool
    ) -> Tensor:
        chunk_loss = compiled_function(_chunk_loss) if compiled else _chunk_loss
        matrix = weight.to(x.dtype)
        count = (targets != IGNORED).sum()
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        x_grads: list[Tensor] = []
        is_trained = ctx.needs_input_grad[1]  # false with LoRA
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if is_trained else None
        for part, target in zip(x.split(chunk), targets.split(chunk), strict=True):
            loss, gradient = chunk_loss(part, matrix, target, settings, count)
            total = total + loss
            x_grads.append(gradient @ matrix)
            if weight_grad is not None:
                weight_grad += gradient.T @ part
        ctx.save_for_backward(torch.cat(x_grads), None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad.mul_(upstream[0])  # in place, because it is as large as the head's weight
        # in float32: 1/12, the factor for accumulation over 12 micro-batches, is 0.2 % too large in bfloat16
        return (x_grad.float() * upstream[0]).to(x_grad.dtype), weight_grad, None, None, None, None


def _chunk_loss(
    x: Tensor, matrix: Tensor, targets: Tensor, settings: LogitSettings, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of a chunk divided by ``count``, and its gradient with respect to the logits (N, R)."""
    raw = x @ matrix.T
    logits = settings.cap(raw.float())
    logits[:, settings.vocab_size :] = -torch.inf
    log_p = F.log_softmax(logits, dim=1)
    soft_cap = settings.soft_cap
    softcap_grad = None if soft_cap is None else 1 - (logits.nan_to_num(neginf=0) / soft_cap).square()
    del logits  # at most two tensors of this size exist at a time
    scored = (targets != IGNORED)[:, None]
    ids = targets.clamp(min=0)[:, None]
    loss = -(log_p.gather(1, ids) * scored).sum() / count
    gradient = log_p.exp_()
    gradient.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=gradient.dtype))
    gradient.mul_(scored / count)
    return loss, (gradient if softcap_grad is None else gradient.mul_(softcap_grad)).to(raw.dtype)
