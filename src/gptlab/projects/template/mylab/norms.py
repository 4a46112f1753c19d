"""Norms: modules with ``forward(x)``. Shapes: C channels."""

import torch
import torch.nn.functional as F
from gptlab.model.config import GPTConfig
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """L2 norm with one learned scale, initially sqrt(C) (Nguyen and Salazar 2019, section 2.2).

    Args:
        config: Configuration of the model, from gptlab.
        eps: Smallest norm by which the input is divided.
    """

    def __init__(self, config: GPTConfig, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([config.n_embd**0.5]))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``x`` (..., C); same shape."""
        return self.scale * F.normalize(x, dim=-1, eps=self.eps)
