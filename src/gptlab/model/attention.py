"""Causal self-attention: positions, masks and heads.

Shapes: B batch, T time (of the queries), S time of the keys, C channels, nh heads, hs head size. ``documents`` (B, T)
numbers the document that each token belongs to; the tokens of a document stand together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from gptlab.model.config import GPTConfig
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.kernels import Mask, attend, attention_weights

RotaryTables = tuple[Tensor, Tensor]  # cosines and sines (B or 1, 1, T, hs / 2)


class AttentionContext:
    """What the attention of every block needs to know about a forward pass.

    A plain class: of the arguments of a block, FSDP casts the floating-point tensors in tuples and dataclasses too, and
    the rotary tables must keep their precision.

    Args:
        positions: Position (B or 1, T) of every token in its document, counted from 0.
        mask: Mask of the blocks that see all earlier tokens.
        window_mask: Mask of the blocks that see a window of them.
        rotary: Rotary tables; None with learned positions.
        cache: Keys and values of earlier tokens; None without any.
        cache_position: Where the tokens go in the cache.
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
    """Builds the context of a pass over whole sequences: a token sees what precedes it in its document.

    Args:
        config: Configuration of the model.
        idx: Token ids (B, T).
        documents: Document numbers (B, T); None if each sequence is one document.
        dtype: Type of the model's weights.
        flex: Whether the masks are FlexAttention's.
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
    """Builds the context of a pass over tokens whose predecessors are in ``cache``."""
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
    """Lets a token see itself and what precedes it, within its document and the window where there are such."""
    B, T = idx.shape  # noqa: N806

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = q >= k
        if window is not None:
            visible = visible & (q - k < window)
        return visible if documents is None else visible & (documents[b, q] == documents[b, k])

    batch = B if documents is not None else 1
    if flex:
        return create_block_mask(is_visible, batch, None, T, T, device=idx.device)
    t = torch.arange(T, device=idx.device)
    rows = torch.arange(batch, device=idx.device).view(-1, 1, 1, 1)
    return is_visible(rows, t, t.view(-1, 1), t).expand(batch, 1, T, T)


def rotary_tables(positions: Tensor, head_size: int, base: float, dtype: torch.dtype, *, half: bool) -> RotaryTables:
    """Computes cosines and sines of the angles by which ``rotate`` turns queries and keys.

    Args:
        positions: (B or 1, T).
        head_size: hs.
        base: The slowest pair turns ``base`` times slower than the fastest (Su et al. 2021, section 3.2.2).
        dtype: Type of the model; the tables have at least float32.
        half: Leave the slower half of the pairs unturned.
    """
    pairs = head_size // 2
    turning = pairs // 2 if half else pairs
    exponents = torch.arange(turning, device=positions.device, dtype=torch.float32) / turning
    frequencies = F.pad(base**-exponents, (0, pairs - turning))
    angles = (positions[:, None, :, None] * frequencies).to(torch.promote_types(dtype, torch.float32))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turns the pairs of channels (i, i + hs / 2) of every head of x (B, nh, T, hs)."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what precedes it (Vaswani et al. 2017, section 3.2)."""

    uses_window = False

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.dropout = layer, config.head_size, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Returns what each position of ``x`` (B, T, C) takes from the positions it sees; same shape."""
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        return self.attend(self.split_heads(q), self.split_heads(k), self.split_heads(v), ctx)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
        """Attends over keys and values (B, nh, T, hs) and those of the cache, and projects the result (B, T, C)."""
        if ctx.cache is not None and ctx.cache_position is not None:
            k, v = ctx.cache.layers[self.layer].update(k, v, ctx.cache_position)
        y = attend(q, k, v, self.mask(ctx), self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Returns the attention weights (B, nh, T, T) of a pass without a cache."""
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
