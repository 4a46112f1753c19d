"""Optimizers and their parameter groups."""

from torch import nn
from torch.optim import AdamW, Optimizer

from gptlab.training.config import AdamWConfig


def build_optimizer(model: nn.Module, config: AdamWConfig, *, fused: bool) -> Optimizer:
    """Build AdamW over the decay groups of ``model``."""
    groups = decay_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the parameters as GPT-2 does: matrices and embeddings decay, biases and LayerNorms do not.

    A tied parameter appears once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
