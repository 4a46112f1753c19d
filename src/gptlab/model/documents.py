"""Several documents in one sequence that do not see each other.

Shapes: B batch, T time, nh heads, hs head size. ``documents`` (B, T) numbers the document that each token belongs to;
the tokens of a document stand together.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask | None  # (B, 1, T, T), or FlexAttention's own; None is causal and no more


def positions_within(documents: Tensor) -> Tensor:
    """Position of every token in its document (B, T), counted from 0."""
    at = torch.arange(documents.size(1), device=documents.device)
    begins = documents != documents.roll(1, dims=1)
    return at - torch.where(begins, at, 0).cummax(dim=1).values


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the mask is made outside of the compiled network
def document_mask(documents: Tensor, *, flex: bool) -> Mask:
    """Let a token see itself and what came before it in its document."""
    B, T = documents.shape  # noqa: N806

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    if flex:
        return create_block_mask(seen, B, None, T, T, device=documents.device)
    together = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
    return together.tril()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """Attention over (B, nh, T, hs), through the kernel that takes the mask."""
    if isinstance(mask, BlockMask):
        return _flex(q.is_cuda)(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


@cache
def _flex(compiled: bool) -> Any:
    """FlexAttention, which skips the blocks that a mask empties only when it is compiled."""
    return torch.compile(flex_attention) if compiled else flex_attention
