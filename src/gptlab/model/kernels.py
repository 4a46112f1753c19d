"""Attention kernels and their selection.

Shapes: B batch, T time (of the queries), S time of the keys, nh heads, hs head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from gptlab.files import use_private_compile_cache

SHORT_SEQUENCE = 256  # number of keys up to which the attention weights of a head fit in a core's cache
Mask = Tensor | BlockMask | None  # (B or 1, 1, T, S), or FlexAttention's block mask; None for causal attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """Computes attention with the fastest kernel for the given inputs.

    A single query (T = 1) belongs to the last key, so without a mask it attends to all keys.

    Args:
        q: Queries (B, nh, T, hs).
        k: Keys (B, nh, S, hs).
        v: Values (B, nh, S, hs).
        mask: Mask of the keys that each query attends to; None for causal attention.
        dropout: Dropout probability of the attention weights.

    Returns:
        The output of every head (B, nh, T, hs), in the dtype of q.
    """
    if isinstance(mask, BlockMask):
        return _flex_attention(q.is_cuda)(q, k, v, block_mask=mask)
    if q.dtype != k.dtype:  # the cache may have a wider dtype, in which attention is then computed
        return attend(q.to(k.dtype), k, v, mask, dropout).to(q.dtype)
    is_single_token = q.size(2) == 1
    if q.device.type == "cpu" and q.dtype == torch.float32:
        if is_single_token and q.size(0) > 1:
            return _single_token_attention(q, k, v, mask, dropout)
        if not is_single_token and k.size(2) <= SHORT_SEQUENCE:
            return _materialized_attention(q, k, v, mask, dropout)
    is_causal = mask is None and not is_single_token
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


def attention_weights(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """Returns the attention weights (B, nh, T, S), which the kernels of ``attend`` do not return."""
    if isinstance(mask, BlockMask):
        mask = create_mask(mask.mask_mod, mask.shape[0], None, q.size(2), k.size(2), device=q.device)
    return F.softmax(_masked(q @ k.transpose(2, 3) * q.size(-1) ** -0.5, mask), dim=-1)


def _materialized_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Computes attention with the full matrix of attention weights (Vaswani et al. 2017, equation 1).

    PyTorch's CPU kernel splits attention into many small matmuls, for which oneDNN has a high overhead.
    """
    return F.dropout(attention_weights(q, k, mask), dropout) @ v


def _single_token_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Computes attention of one query per row, as matrix-vector products that do not transpose the cache."""
    scores = (k @ (q * q.size(-1) ** -0.5).transpose(2, 3)).transpose(2, 3)  # (B, nh, 1, S)
    if mask is not None:
        scores = _masked(scores, mask)
    return F.dropout(F.softmax(scores, dim=-1), dropout) @ v


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones(*scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, -torch.inf)


@cache
def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled for each shape of its arguments; the same object for the same function."""
    use_private_compile_cache()
    return torch.compile(function, dynamic=False)


@cache
def _flex_attention(compiled: bool) -> Any:
    """Returns FlexAttention, which skips the empty blocks of a mask only when it is compiled."""
    use_private_compile_cache()
    return torch.compile(flex_attention) if compiled else flex_attention
