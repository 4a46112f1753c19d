"""The loss of the head, in chunks of tokens: the logits of a whole batch never exist.

Shapes: N tokens, C channels, R rows of the head (its padding included), V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # cross_entropy's own ignore_index: a target that is not scored


class Head(NamedTuple):
    """What turns states into logits, beside the matrix.

    Attributes:
        vocab_size: V; the rows beyond it only pad the matrix.
        soft_cap: See ``GPTConfig.logit_soft_cap``.
    """

    vocab_size: int
    soft_cap: float | None

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Score states (..., C) with a matrix (R, C): (..., V)."""
        return self.capped(F.linear(x, weight)[..., : self.vocab_size])

    def capped(self, logits: Tensor) -> Tensor:
        """Bend logits so that they stay between -cap and cap (Gemma Team 2024, Gemma 2, section 2)."""
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def nats(x: Tensor, weight: Tensor, targets: Tensor, head: Head, chunk: int | None) -> Tensor:
    """Loss of every token (N,), 0 where it is not scored, for evaluation: nothing is learnt from it in chunks.

    Args:
        x: States (N, C).
        weight: Of the head (R, C).
        targets: Ids (N,), -100 where not scored.
        head: What else the head does.
        chunk: Tokens at a time; None takes all.
    """
    parts = zip(x.split(chunk or len(x)), targets.split(chunk or len(x)), strict=True)
    return torch.cat(
        [F.cross_entropy(head.logits(a, weight).float(), b, reduction="none", ignore_index=IGNORED) for a, b in parts]
    )


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, head: Head, chunk: int | None) -> Tensor:
    """Mean loss () in nats per scored token, to be learnt from; the arguments are those of ``nats``."""
    if chunk is None or chunk >= len(x):
        return F.cross_entropy(head.logits(x, weight).float(), targets, ignore_index=IGNORED)
    if torch.is_autocast_enabled(x.device.type):  # which does not reach into a function that has its own gradient
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _in_chunks(x, weight, targets, head, chunk)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be unrolled, chunk after chunk, and kept at once
def _in_chunks(x: Tensor, weight: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
    loss: Tensor = _ChunkedLoss.apply(x, weight, targets, head, chunk)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradient of each chunk when its logits are there, and so needs neither to keep nor to repeat them.

    The way of Liger's fused linear cross entropy (Hsu et al. 2024, section 3.2). torch's ``linear_cross_entropy`` does
    the same, but gives the loss in the precision of the states, and knows neither padding nor soft caps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
        matrix = weight.to(x.dtype)
        count = (targets != IGNORED).sum()
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        to_x: list[Tensor] = []
        is_learnt = ctx.needs_input_grad[1]  # an adapted network's is not
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if is_learnt else None
        for part, target in zip(x.split(chunk), targets.split(chunk), strict=True):
            loss, gradient = _chunk(part @ matrix.T, target, head, count)
            total = total + loss
            to_x.append(gradient @ matrix)
            if to_weight is not None:
                to_weight += gradient.T @ part
        ctx.save_for_backward(torch.cat(to_x), None if to_weight is None else to_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_weight = ctx.saved_tensors
        if to_weight is not None:
            to_weight.mul_(upstream[0])  # as large as the head: no second one
        # one share of an accumulated batch, say 1/12, would in bfloat16 be 0.2 % too much for all of the states
        return (to_x.float() * upstream[0]).to(to_x.dtype), to_weight, None, None, None


def _chunk(raw: Tensor, targets: Tensor, head: Head, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a chunk over ``count``, and its gradient to the products (N, R), in their precision."""
    logits = head.capped(raw.float())
    logits[:, head.vocab_size :] = -torch.inf
    log_p = F.log_softmax(logits, dim=1)
    bent = None if head.soft_cap is None else 1 - (logits.nan_to_num(neginf=0) / head.soft_cap).square()
    del logits  # no more than two tensors of this size are there at a time
    scored = (targets != IGNORED)[:, None]
    ids = targets.clamp(min=0)[:, None]
    loss = -(log_p.gather(1, ids) * scored).sum() / count
    gradient = log_p.exp_()
    gradient.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=gradient.dtype))
    gradient.mul_(scored / count)
    return loss, (gradient if bent is None else gradient.mul_(bent)).to(raw.dtype)
