"""Attention: modules with ``forward(x, ctx)``. Shapes: B batch, T time, C channels."""

from gptlab.model.attention import AttentionContext, CausalSelfAttention
from gptlab.model.config import GPTConfig
from torch import Tensor, nn


class GatedAttention(CausalSelfAttention):
    """GPT-2's attention, whose output is multiplied by a gate between 0 and 1 that depends on the input.

    Args:
        config: Configuration of the model, from gptlab.
        layer: Number of the block, from gptlab.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.gate = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Computes gated self-attention over ``x`` (B, T, C); same shape."""
        return self.gate(x).sigmoid() * super().forward(x, ctx)
