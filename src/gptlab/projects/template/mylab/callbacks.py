"""Callbacks: any ``lightning.pytorch.Callback``."""

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Decades:
    """Range of powers of 10, both included."""

    first: int
    last: int


class GradientHistogram(pl.Callback):
    """Logs a histogram of the gradient before clipping: the share of its values in each decade.

    The metric ``gradient_decade/-3`` is the share of the absolute values from 1e-3 to 1e-2. The first and the last
    decade also have all smaller and all larger values. Every logger has these metrics, metrics.csv included.

    Args:
        every: Steps between histograms, in addition to that of the first step.
        decades: Range of the histogram.
    """

    def __init__(self, every: int, decades: Decades) -> None:
        self.every, self.decades = every, decades

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Logs the histogram, if the step is the first one or a multiple of ``every``."""
        step = trainer.global_step + 1
        if step == 1 or step % self.every == 0:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            shares = decade_shares(gradients, self.decades)
            metrics = {f"gradient_decade/{decade}": share for decade, share in enumerate(shares, self.decades.first)}
            pl_module.log_dict(metrics, sync_dist=True)  # the mean over the ranks, whose shards are of equal size


def decade_shares(tensors: list[Tensor], decades: Decades) -> Tensor:
    """Returns the share of the absolute values in each decade (last - first + 1,)."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    edges = 10.0 ** torch.arange(decades.first + 1, decades.last + 1, device=local[0].device)
    counts: Tensor = sum(  # type: ignore[assignment]
        torch.bincount(torch.bucketize(tensor.abs().flatten(), edges, right=True), minlength=len(edges) + 1)
        for tensor in local
    )
    return counts / counts.sum()
