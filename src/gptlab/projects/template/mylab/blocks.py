"""Blocks: modules with ``forward(x, ctx)``. Shapes: B batch, T time, C channels."""

import torch
from gptlab.model.attention import AttentionContext
from gptlab.model.config import GPTConfig
from gptlab.model.gpt import Block
from torch import Tensor, nn


class LayerScaleBlock(Block):
    """GPT-2's block with a learned scale per channel of both residual branches (Touvron et al. 2021, LayerScale).

    Args:
        config: Configuration of the model, from gptlab.
        layer: Number of the block, from gptlab.
        scale: Initial scale. With 1, the block is GPT-2's until the first step.
    """

    def __init__(self, config: GPTConfig, layer: int, scale: float) -> None:
        super().__init__(config, layer)
        self.attn_scale = nn.Parameter(torch.full((config.n_embd,), scale))
        self.mlp_scale = nn.Parameter(torch.full((config.n_embd,), scale))

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Transforms the residual stream ``x`` (B, T, C); same shape."""
        x = x + self.attn_scale * self.attn(self.ln_1(x), ctx)
        return x + self.mlp_scale * self.mlp(self.ln_2(x))
