"""Training losses: functions of logits and targets. Shapes: N tokens, V vocabulary."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, *, gamma: Annotated[float, Field(ge=1)]) -> Tensor:
    """Returns the focal loss (), in which likely tokens have less weight (Lin et al. 2017, equation 4).

    Args:
        logits: Logits (N, V), from gptlab.
        targets: Token IDs (N,), from gptlab; -100 where not scored.
        gamma: Exponent of the weight, at least 1.
    """
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    weights = (1 - torch.exp(-losses)) ** gamma
    return (weights * losses).sum() / (targets != -100).sum()
