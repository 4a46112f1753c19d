"""KV cache: keys and values of earlier tokens, so that each token is computed once (Pope et al. 2023, section 2.1).

Shapes: B batch, T time (of the new tokens), S slots, nh heads, hs head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CachePosition(NamedTuple):
    """Position of new tokens in the KV cache.

    Attributes:
        slots: Consecutive slots (T,) of the new tokens, the same in every row.
        row_starts: First slot (B,) of every row; earlier slots are masked. None if all rows start at slot 0.
        num_slots: Number of slots attended over, starting at slot 0; those after the new tokens are masked.
        is_end: Whether the new tokens are in the last of these slots.
    """

    slots: Tensor
    row_starts: Tensor | None
    num_slots: int
    is_end: bool

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens in their rows (B or 1, T)."""
        if self.row_starts is None:
            return self.slots[None]
        return (self.slots - self.row_starts[:, None]).clamp(min=0)

    def mask(self, window: int | None) -> Tensor | None:
        """Returns the attention mask (B or 1, 1, T, num_slots); None for plain causal attention.

        Args:
            window: Number of tokens that a token attends to, including itself; None for no limit.
        """
        if window is None and self.row_starts is None and self.is_end and len(self.slots) in {1, self.num_slots}:
            return None
        keys, tokens = torch.arange(self.num_slots, device=self.slots.device), self.slots[:, None]
        visible = keys <= tokens
        if window is not None:
            visible = visible & (tokens - keys < window)
        if self.row_starts is None:
            return visible[None, None]
        # a slot before the row's first one attends to itself, because a softmax over no elements is NaN
        return ((visible & (keys >= self.row_starts[:, None, None])) | (keys == tokens))[:, None]


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of the cache for keys and values of ``dtype``; on a CPU, attention is faster in float32."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


class LayerCache:
    """Keys and values (B, nh, S, hs) of one block, allocated by the first update.

    Args:
        slots: Number of slots S.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, k: Tensor, v: Tensor, position: CachePosition) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, nh, T, hs) at ``position``; returns those of the first ``num_slots`` slots."""
        if self.keys is None or self.values is None:
            shape, dtype = (*k.shape[:2], self.slots, k.size(3)), cache_dtype(k.dtype, k.device)
            self.keys, self.values = k.new_zeros(shape, dtype=dtype), v.new_zeros(shape, dtype=dtype)
        self.keys.index_copy_(2, position.slots, k.to(self.keys.dtype))
        self.values.index_copy_(2, position.slots, v.to(self.values.dtype))
        return self.keys[:, :, : position.num_slots], self.values[:, :, : position.num_slots]

    def repeat_rows(self, times: int) -> "LayerCache":
        """Returns a cache in which every row is repeated ``times`` times, consecutively."""
        other = LayerCache(self.slots)
        if self.keys is not None and self.values is not None:
            other.keys, other.values = (part.repeat_interleave(times, dim=0) for part in (self.keys, self.values))
        return other


class KVCache:
    """Keys and values of all blocks.

    Args:
        layers: Number of blocks L.
        slots: Number of slots S.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.layers = [LayerCache(slots) for _ in range(layers)]

    @property
    def is_filled(self) -> bool:
        """Whether every block has written to the cache."""
        return all(layer.keys is not None for layer in self.layers)

    def mark_static(self) -> None:
        """Marks the keys and values as tensors that stay at their address, without which CUDA graphs cannot write them.

        A compiled function records its CUDA graph again for another cache.
        """
        for layer in self.layers:
            for part in (layer.keys, layer.values):
                if part is not None:
                    torch._dynamo.mark_static_address(part)  # noqa: SLF001  (no public function)

    def repeat_rows(self, times: int) -> "KVCache":
        """Returns a cache in which every row is repeated ``times`` times, consecutively."""
        other = KVCache(0, 0)
        other.layers = [layer.repeat_rows(times) for layer in self.layers]
        return other
