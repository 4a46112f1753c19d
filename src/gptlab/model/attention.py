"""What a token may see, where it stands, and how it looks.

Shapes: B batch, T time (of the queries), S time of the keys, C channels, nh heads, hs head size. ``documents`` (B, T)
numbers the document that each token belongs to; the tokens of a document stand together.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from gptlab.model.config import NORM_EPSILON, GPTConfig
from gptlab.model.generation.kv_cache import LayerCache, Place

SHORT = 256  # keys; up to here the weights of a head fit a core's cache
Mask = Tensor | BlockMask | None  # (B or 1, 1, T, S), or FlexAttention's own; None is causal and no more


class Sight(NamedTuple):
    """Where the tokens stand, and what they see: the same for all blocks.

    Attributes:
        positions: Of every token in its document (B or 1, T), counted from 0.
        everything: Mask of the blocks that see everything before a token.
        window: Mask of those that see the nearest of it.
    """

    positions: Tensor
    everything: Mask
    window: Mask


def sight(config: GPTConfig, idx: Tensor, documents: Tensor | None, *, flex: bool) -> Sight:
    """Say what the tokens ``idx`` (B, T) see: what came before in their document, if there are several.

    Args:
        config: Of the network.
        idx: Token ids.
        documents: Numbers (B, T); None where a sequence is one document.
        flex: Whether masks are FlexAttention's.
    """
    if documents is None:
        positions, wide = torch.arange(idx.size(1), device=idx.device)[None], None
    else:
        positions, wide = positions_within(documents), attention_mask(idx, documents, None, flex=flex)
    has_window = not all(config.sees_everything(layer) for layer in range(config.n_layer))
    narrow = attention_mask(idx, documents, config.attention_window, flex=flex) if has_window else wide
    return Sight(positions, wide, narrow)


def positions_within(documents: Tensor) -> Tensor:
    """Position of every token in its document (B, T), counted from 0."""
    at = torch.arange(documents.size(1), device=documents.device)
    begins = documents != documents.roll(1, dims=1)
    return at - torch.where(begins, at, 0).cummax(dim=1).values


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the mask is made outside of the compiled network
def attention_mask(idx: Tensor, documents: Tensor | None, window: int | None, *, flex: bool) -> Mask:
    """Let a token see itself and what came before it, in its document and within the window where there are such."""
    B, T = idx.shape  # noqa: N806

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = q >= k
        if window is not None:
            found = found & (q - k < window)
        return found if documents is None else found & (documents[b, q] == documents[b, k])

    many = B if documents is not None else 1
    if flex:
        return create_block_mask(seen, many, None, T, T, device=idx.device)
    at = torch.arange(T, device=idx.device)
    rows = torch.arange(many, device=idx.device).view(-1, 1, 1, 1)
    return seen(rows, at, at.view(-1, 1), at).expand(many, 1, T, T)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """Attention of q (B, nh, T, hs) over k and v (B, nh, S, hs), through the kernel that takes the mask."""
    if isinstance(mask, BlockMask):
        return _flex(q.is_cuda)(q, k, v, block_mask=mask)
    if q.dtype != k.dtype:  # what the cache keeps is computed on in its type
        return attend(q.to(k.dtype), k, v, mask, dropout).to(q.dtype)
    single = q.size(2) == 1  # which is the last: None hides nothing from it
    if q.device.type == "cpu" and q.dtype == torch.float32:
        if single and q.size(0) > 1:
            return _of_single_tokens(q, k, v, mask, dropout)
        if not single and k.size(2) <= SHORT:
            return _in_products(q, k, v, mask, dropout)
    causal = mask is None and not single
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def _in_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention as it is written down (Vaswani et al. 2017, equation 1), with all of its weights at once.

    torch's kernel for the CPU makes many small products of its own, which oneDNN is slow to begin.
    """
    scores = q @ k.transpose(2, 3) * q.size(-1) ** -0.5  # (B, nh, T, S)
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    weights = F.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return F.dropout(weights, dropout) @ v


def _of_single_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same for the last token of every row: products of a matrix with a vector, the cache not turned around."""
    scores = (k @ (q * q.size(-1) ** -0.5).transpose(2, 3)).transpose(2, 3)  # (B, nh, 1, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(F.softmax(scores, dim=-1), dropout) @ v


@cache
def _flex(compiled: bool) -> Any:
    """FlexAttention, which skips the blocks that a mask empties only when it is compiled."""
    return torch.compile(flex_attention) if compiled else flex_attention


def rotate(x: Tensor, positions: Tensor, base: float, *, half: bool) -> Tensor:
    """Turn the pairs of parts (i, i + hs/2) of every head by angles that grow with the position.

    Args:
        x: Queries or keys (B, nh, T, hs).
        positions: (B or 1, T).
        base: The slowest pair turns ``base`` times slower than the fastest (Su et al. 2021, section 3.2.2).
        half: Leave the slower half of the pairs alone.
    """
    pairs = x.size(-1) // 2
    turning = pairs // 2 if half else pairs
    exponents = torch.arange(turning, device=x.device, dtype=torch.float32) / turning
    frequencies = F.pad(base**-exponents, (0, pairs - turning))
    angles = (positions[:, None, :, None] * frequencies).to(torch.promote_types(x.dtype, torch.float32))
    cosine, sine = angles.cos(), angles.sin()  # (B or 1, 1, T, hs/2)
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cosine - other * sine, other * cosine + one * sine), dim=-1).to(x.dtype)


class Mix(nn.Module):
    """A sum of equally shaped tensors, each with a weight that is learnt."""

    def __init__(self, *initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(initial))

    def forward(self, *terms: Tensor) -> Tensor:
        """Add up as many terms as there are weights."""
        return sum(weight * term for weight, term in zip(self.weight.unbind(), terms, strict=True))  # type: ignore[return-value]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.head_size, self.dropout = config, config.head_size, config.dropout
        self.sees_everything = config.sees_everything(layer)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        others = (config.value_residual and layer > 0) + (config.value_embedding(layer) is not None)
        self.mix_values = Mix(*[0.5] * (1 + others)) if others else None  # modded-nanogpt's weights

    def forward(
        self, x: Tensor, seen: Sight, others: tuple[Tensor, ...], cache: LayerCache | None, place: Place | None
    ) -> tuple[Tensor, Tensor]:
        """Mix the positions of ``x`` (B, T, C), causally and within the mask.

        Args:
            x: The input.
            seen: Of all blocks.
            others: Values (B, T, C) to be mixed into this block's own.
            cache: What earlier tokens had for keys and values; None where there are none.
            place: Where those of these go in the cache.

        Returns:
            The output, and the values before anything is mixed into them; both (B, T, C).
        """
        q, k, v, values = self.heads(x, seen, others)
        if cache is not None and place is not None:
            k, v = cache.extended(k, v, place)
        mask = seen.everything if self.sees_everything else seen.window
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2))), values

    def heads(self, x: Tensor, seen: Sight, others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make queries, keys and values of every head (B, nh, T, hs); and values (B, T, C) before they are mixed."""
        config = self.config
        query, key, values = self.c_attn(x).chunk(3, dim=2)
        mixed = values if self.mix_values is None else self.mix_values(values, *others)
        q, k, v = (part.view(*x.shape[:2], -1, self.head_size).transpose(1, 2) for part in (query, key, mixed))
        if config.qk_norm:
            q, k = (F.rms_norm(part, (self.head_size,), eps=NORM_EPSILON) for part in (q, k))
        if config.positions != "learned":
            half = config.positions == "rotary_half"
            q, k = (rotate(part, seen.positions, config.rope_base, half=half) for part in (q, k))
        return q, k, v, values

    def weights(self, x: Tensor, seen: Sight, others: tuple[Tensor, ...]) -> Tensor:
        """How much each position looks at each (B, nh, T, T), which the kernels of ``forward`` never write down."""
        q, k, _, _ = self.heads(x, seen, others)
        mask = seen.everything if self.sees_everything else seen.window
        if isinstance(mask, BlockMask):
            mask = create_mask(mask.mask_mod, mask.shape[0], None, x.size(1), x.size(1), device=x.device)
        if mask is None:
            mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
        scores = q @ k.transpose(2, 3) * self.head_size**-0.5
        return F.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
