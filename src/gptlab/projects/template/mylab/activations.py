"""Activations: modules with ``forward(x)``."""

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """Sigmoid approximation of GELU (Hendrycks and Gimpel 2016, section 2).

    Args:
        slope: Slope of the sigmoid, 1.702 in the paper.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Transforms ``x`` elementwise; same shape."""
        return x * torch.sigmoid(self.slope * x)
