"""Keys and values of the tokens so far, kept so that a token is computed once (Pope et al. 2023, section 2.1).

Shapes: B batch, T time (of the tokens that are added), S slots, nh heads, hs head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where tokens that are added go.

    Attributes:
        slots: Of the tokens (T,), the same in every row; they follow each other.
        begins: First slot (B,) of every row, where the rows begin at different ones; what lies before is not seen.
        visible: Slots that are looked at, from the first on; those behind the tokens are not seen all the same.
        ends: Whether the tokens are the last of the visible ones, so that nothing is behind them.
    """

    slots: Tensor
    begins: Tensor | None
    visible: int
    ends: bool

    @property
    def positions(self) -> Tensor:
        """Of the tokens in their rows (B or 1, T)."""
        if self.begins is None:
            return self.slots[None]
        return (self.slots - self.begins[:, None]).clamp(min=0)

    def mask(self, window: int | None) -> Tensor | None:
        """What the tokens see of the slots (B or 1, 1, T, visible); None is causal and no more."""
        if window is None and self.begins is None and self.ends and len(self.slots) in {1, self.visible}:
            return None
        keys, tokens = torch.arange(self.visible, device=self.slots.device), self.slots[:, None]
        seen = keys <= tokens
        if window is not None:
            seen = seen & (tokens - keys < window)
        if self.begins is None:
            return seen[None, None]
        # a slot before the row's first sees itself, or its softmax would have nothing to go over
        return ((seen & (keys >= self.begins[:, None, None])) | (keys == tokens))[:, None]


def cache_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type in which keys and values of ``dtype`` are kept: a CPU attends over float32 faster, and it holds the same."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


class LayerCache:
    """One block's keys and values (B, nh, S, hs): their device and heads are those that come from the block.

    A plain class, since FSDP casts and copies the tensors that it finds in the tuples a block is called with.

    Args:
        slots: S.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extended(self, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, nh, T, hs) at ``place``; return those of all slots that are visible from it."""
        if self.keys is None or self.values is None:
            shape, dtype = (*k.shape[:2], self.slots, k.size(3)), cache_type(k.dtype, k.device)
            self.keys, self.values = k.new_zeros(shape, dtype=dtype), v.new_zeros(shape, dtype=dtype)
        self.keys.index_copy_(2, place.slots, k.to(self.keys.dtype))
        self.values.index_copy_(2, place.slots, v.to(self.values.dtype))
        return self.keys[:, :, : place.visible], self.values[:, :, : place.visible]

    def repeated(self, times: int) -> "LayerCache":
        """A cache in which every row stands so many times, one after the other."""
        other = LayerCache(self.slots)
        if self.keys is not None and self.values is not None:
            other.keys, other.values = (kept.repeat_interleave(times, dim=0) for kept in (self.keys, self.values))
        return other


class KVCache:
    """Room for the keys and values of every block, taken once, when the first come.

    Args:
        layers: L.
        slots: S.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.layers = [LayerCache(slots) for _ in range(layers)]

    def repeated(self, times: int) -> "KVCache":
        """A cache in which every row stands so many times, one after the other."""
        other = KVCache(0, 0)
        other.layers = [layer.repeated(times) for layer in self.layers]
        return other
