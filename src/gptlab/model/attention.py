"""Causal self-attention: positions, masks and heads.

Shapes: B batch, T time (of the queries), S time of the keys, C channels, nh heads, hs head size. ``documents`` (B, T)
holds the index of each token's document; the tokens of a document are consecutive.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from gptlab.model.config import GPTConfig
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.kernels import Mask, attend, attention_weights, compiled_function

RotaryTables = tuple[Tensor, Tensor]  # cosines and sines (B or 1, 1, T, hs / 2)


class AttentionContext:
    """Positions, masks, rotary tables and KV cache of one forward pass, shared by the attention of all blocks.

    Args:
        positions: Position (B or 1, T) of every token in its document, counted from 0.
        mask: Mask of the blocks that attend to all earlier tokens.
        window_mask: Mask of the blocks that attend to a sliding window.
        rotary: Rotary tables; None with learned positions.
        cache: Keys and values of earlier tokens; None for a forward pass without KV cache.
        cache_position: Slots of the tokens in the cache.
    """

    def __init__(
        self,
        positions: Tensor,
        mask: Mask,
        window_mask: Mask,
        rotary: RotaryTables | None = None,
        cache: KVCache | None = None,
        cache_position: CachePosition | None = None,
    ) -> None:
        self.positions, self.mask, self.window_mask, self.rotary = positions, mask, window_mask, rotary
        self.cache, self.cache_position = cache, cache_position


def build_attention_context(
    config: GPTConfig, idx: Tensor, documents: Tensor | None, dtype: torch.dtype, *, flex: bool
) -> AttentionContext:
    """Builds the context of a forward pass over full sequences, in which attention stays within each document.

    Args:
        config: Configuration of the model.
        idx: Token IDs (B, T).
        documents: Document index (B, T) of every token; None if each sequence is one document.
        dtype: Dtype of the model's weights.
        flex: Whether to build the masks for FlexAttention.
    """
    if documents is None:
        positions, mask = torch.arange(idx.size(1), device=idx.device)[None], None
    else:
        positions, mask = positions_within(documents), attention_mask(idx, documents, None, flex=flex)
    has_window = not all(config.is_global(layer) for layer in range(config.n_layer))
    window_mask = attention_mask(idx, documents, config.attention_window, flex=flex) if has_window else mask
    return AttentionContext(positions, mask, window_mask, _rotary(config, positions, dtype))


def build_cached_context(
    config: GPTConfig, cache: KVCache, position: CachePosition, dtype: torch.dtype
) -> AttentionContext:
    """Builds the context of a forward pass over new tokens; the earlier tokens are in ``cache``.

    Args:
        config: Configuration of the model.
        cache: KV cache.
        position: Slots of the new tokens in the cache.
        dtype: Dtype of the model's weights.
    """
    mask = position.mask(None)
    window_mask = position.mask(config.attention_window) if config.attention_window else mask
    rotary = _rotary(config, position.positions, dtype)
    return AttentionContext(position.positions, mask, window_mask, rotary, cache, position)


def positions_within(documents: Tensor) -> Tensor:
    """Returns the position of every token in its document (B, T), counted from 0."""
    t = torch.arange(documents.size(1), device=documents.device)
    is_first = documents != documents.roll(1, dims=1)
    return t - torch.where(is_first, t, 0).cummax(dim=1).values


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the mask is built outside of the compiled model
def attention_mask(idx: Tensor, documents: Tensor | None, window: int | None, *, flex: bool) -> Mask:
    """Builds a causal mask, restricted to the token's document and to a sliding window if these are given.

    Args:
        idx: Token IDs (B, T), of which only the shape and the device are used.
        documents: Document index (B, T) of every token; None if each sequence is one document.
        window: Number of tokens that a token attends to, including itself; None for no limit.
        flex: Whether to build a mask for FlexAttention.

    Returns:
        FlexAttention's block mask if ``flex``, otherwise a boolean mask (B or 1, 1, T, T), true where a query attends
        to a key.
    """
    B, T = idx.shape  # noqa: N806
    if flex and documents is None:
        return _causal_block_mask(T, window, idx.device)
    is_visible = _mask_function(documents, window)
    batch = B if documents is not None else 1
    if flex:
        # compiled on a GPU, since a mask of documents is built for every micro-batch
        create = compiled_function(create_block_mask) if idx.is_cuda else create_block_mask
        return create(is_visible, batch, None, T, T, device=idx.device)
    t = torch.arange(T, device=idx.device)
    rows = torch.arange(batch, device=idx.device).view(-1, 1, 1, 1)
    return is_visible(rows, t, t.view(-1, 1), t).expand(batch, 1, T, T)


def _mask_function(documents: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    """Returns FlexAttention's mask function: whether query q attends to key k in row b."""

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = q >= k
        if window is not None:
            visible = visible & (q - k < window)
        return visible if documents is None else visible & (documents[b, q] == documents[b, k])

    return is_visible


@lru_cache(maxsize=8)
def _causal_block_mask(length: int, window: int | None, device: torch.device) -> BlockMask:
    with torch.inference_mode(mode=False):  # the mask of an evaluation is also used in training
        return create_block_mask(_mask_function(None, window), 1, None, length, length, device=device)


def rotary_tables(positions: Tensor, head_size: int, base: float, dtype: torch.dtype, *, half: bool) -> RotaryTables:
    """Computes the cosines and sines of the angles by which ``rotate`` rotates queries and keys.

    Args:
        positions: Positions (B or 1, T).
        head_size: Head size hs.
        base: Base of the geometric series of frequencies (Su et al. 2021, section 3.2.2).
        dtype: Dtype of the model; the tables are at least float32.
        half: Whether to rotate only the first half of the channel pairs. The others get the frequency 0.

    Returns:
        Cosines and sines, each (B or 1, 1, T, hs / 2).
    """
    pairs = head_size // 2
    rotated = pairs // 2 if half else pairs
    exponents = torch.arange(rotated, device=positions.device, dtype=torch.float32) / rotated
    frequencies = F.pad(base**-exponents, (0, pairs - rotated))
    angles = (positions[:, None, :, None] * frequencies).to(torch.promote_types(dtype, torch.float32))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotates the channel pairs (i, i + hs / 2) of every head of x (B, nh, T, hs); same shape and dtype."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    uses_window = False

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.dropout = layer, config.head_size, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Computes self-attention over ``x`` (B, T, C); same shape."""
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        return self.attend(self.split_heads(q), self.split_heads(k), self.split_heads(v), ctx)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
        """Attends to ``k`` and ``v`` (B, nh, T, hs) and those in the cache; returns the projected output (B, T, C)."""
        if ctx.cache is not None and ctx.cache_position is not None:
            k, v = ctx.cache.layers[self.layer].update(k, v, ctx.cache_position)
        y = attend(q, k, v, self.mask(ctx), self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Returns the attention weights (B, nh, T, T) of a forward pass without KV cache."""
        q, k, _ = self.c_attn(x).chunk(3, dim=2)
        return attention_weights(self.split_heads(q), self.split_heads(k), self.mask(ctx))

    def mask(self, ctx: AttentionContext) -> Mask:
        """Returns the mask of this block."""
        return ctx.window_mask if self.uses_window else ctx.mask

    def split_heads(self, x: Tensor) -> Tensor:
        """Views x (B, T, C) as heads (B, nh, T, hs)."""
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


def _rotary(config: GPTConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTables | None:
    if config.positions == "learned":
        return None
    half = config.positions == "rotary_half"
    return rotary_tables(positions, config.head_size, config.rope_base, dtype, half=half)
