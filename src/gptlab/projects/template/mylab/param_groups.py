"""Parameter groups of an optimizer: functions of the model."""

from typing import Any

from torch import nn


def embedding_groups(model: nn.Module, embedding_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Gives embeddings their own learning rate, and weight decay only to the other matrices."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    others = [parameter for parameter in model.parameters() if all(parameter is not e for e in embeddings)]
    return [
        {"params": embeddings, "lr": embedding_lr, "weight_decay": 0.0},
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
