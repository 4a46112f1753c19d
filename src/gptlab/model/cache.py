"""Keys and values of the tokens so far, kept so that a token is computed once (Pope et al. 2023, section 2.1).

Shapes: B batch, T time (of the tokens that are added), S slots, nh heads, hs head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.model.config import GPTConfig


class Place(NamedTuple):
    """Where tokens that are added go.

    Attributes:
        slots: Of the tokens (T,), the same in every row; they follow each other.
        begins: First slot (B,) of every row, where the rows begin at different ones; what lies before is not seen.
        visible: Slots that are looked at, from the first on; those behind the tokens are not seen all the same.
    """

    slots: Tensor
    begins: Tensor | None
    visible: int

    @property
    def positions(self) -> Tensor:
        """Of the tokens in their rows (B or 1, T)."""
        if self.begins is None:
            return self.slots[None]
        return (self.slots - self.begins[:, None]).clamp(min=0)

    def mask(self, window: int | None) -> Tensor | None:
        """What the tokens see of the slots (B or 1, 1, T, visible); None is causal and no more."""
        if window is None and self.begins is None and len(self.slots) == self.visible:
            return None
        keys, tokens = torch.arange(self.visible, device=self.slots.device), self.slots[:, None]
        seen = keys <= tokens
        if window is not None:
            seen = seen & (tokens - keys < window)
        if self.begins is None:
            return seen[None, None]
        # a slot before the row's first sees itself, or its softmax would have nothing to go over
        return ((seen & (keys >= self.begins[:, None, None])) | (keys == tokens))[:, None]


class LayerCache(NamedTuple):
    """One block's part of the cache, with room for S slots (B, nh, S, hs)."""

    keys: Tensor
    values: Tensor
    place: Place

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, nh, T, hs); return those of all visible slots."""
        for kept, new in ((self.keys, k), (self.values, v)):
            kept.index_copy_(2, self.place.slots, new.to(kept.dtype))
        visible = slice(self.place.visible)
        return self.keys[:, :, visible].to(k.dtype), self.values[:, :, visible].to(v.dtype)


class KVCache:
    """Room for the keys and values of every block, taken once.

    Args:
        config: Of the network.
        rows: B.
        slots: S.
        device: Where it is.
        dtype: Of what is kept.
    """

    def __init__(self, config: GPTConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, rows, config.n_head, slots, config.head_size)
        self.kept = torch.zeros(shape, device=device, dtype=dtype)

    def layer(self, number: int, place: Place) -> LayerCache:
        """A block's part, for tokens that go to ``place``."""
        return LayerCache(self.kept[number, 0], self.kept[number, 1], place)
