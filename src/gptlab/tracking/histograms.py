"""Histograms of weights and gradients for TensorBoard and W&B."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer

from gptlab.training.callbacks.gradient_stats import group_parameters, is_logged
from gptlab.training.distributed.strategies import full_tensor
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)


class Histogram(NamedTuple):
    """Histogram of the values of a tensor.

    Attributes:
        counts: Number of values in each bin (bins,).
        edges: Edges of the bins (bins + 1,), from the smallest to the largest value.
        total: Sum of the values.
        squares: Sum of their squares.
    """

    counts: list[float]
    edges: list[float]
    total: float
    squares: float


class Watch(L.Callback):
    """Logs histograms of the weights before a step, and of their gradients before clipping.

    TensorBoard and W&B show them; other loggers have no histograms. Parameters of a sharded model are gathered one at a
    time, on every rank. Steps that are not logged cost nothing.

    Args:
        every: Steps between histograms, in addition to those of the first step.
        bins: Number of bins of equal width.
        weights: Whether to log weights.
        gradients: Whether to log gradients.
        modules: Glob patterns of the modules whose parameters are logged. None: all parameters.
    """

    def __init__(
        self, every: PositiveInt, bins: PositiveInt, weights: bool, gradients: bool, modules: list[str] | None
    ) -> None:
        self.every, self.bins, self.weights, self.gradients, self.modules = every, bins, weights, gradients, modules
        self._loggers: list[Logger] = []
        self._parameters: dict[str, nn.Parameter] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects loggers and parameters; raises UserError if a pattern matches no module."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        self._loggers = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger | WandbLogger)]
        if not self._loggers:
            log.warning("callbacks.watch has no effect without logger=tensorboard or logger=wandb.")
        groups = group_parameters(pl_module.model, self.modules, "callbacks.watch.modules")
        chosen = {id(parameter) for parameters in groups.values() for parameter in parameters}
        self._parameters = {name: p for name, p in pl_module.model.named_parameters() if id(p) in chosen}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Logs the histograms, if the step is logged. Lightning clips the gradients after this hook."""
        step = trainer.global_step + 1
        if not self._loggers or not is_logged(step, self.every):
            return
        found: dict[str, Histogram] = {}
        for name, tensor in self._tensors():
            whole = full_tensor(tensor)  # collective
            if trainer.is_global_zero and (histogram := count_values(whole, self.bins)) is not None:
                found[name] = histogram
        for logger in self._loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                _write_to_tensorboard(logger.experiment, found, step)
            else:
                _write_to_wandb(logger, found, step)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            if self.weights:
                yield f"weights/{name}", parameter.detach()
            if self.gradients and parameter.grad is not None:
                yield f"gradients/{name}", parameter.grad


def count_values(tensor: Tensor, bins: int) -> Histogram | None:
    """Returns the histogram of a tensor; None if a value is not finite."""
    values = tensor.detach().float().flatten()
    low, high, total, squares = torch.stack([*values.aminmax(), values.sum(), values.square().sum()]).tolist()
    if not torch.tensor([low, high, total, squares]).isfinite().all():
        return None
    if low == high:
        low, high = low - 0.5, high + 0.5  # as in numpy.histogram
    counts = torch.histc(values, bins, min=low, max=high).tolist()
    return Histogram(counts, torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist(), total, squares)


def _write_to_tensorboard(writer: Any, histograms: dict[str, Histogram], step: int) -> None:
    for name, one in histograms.items():
        writer.add_histogram_raw(
            name,
            min=one.edges[0],
            max=one.edges[-1],
            num=sum(one.counts),
            sum=one.total,
            sum_squares=one.squares,
            bucket_limits=one.edges[1:],
            bucket_counts=one.counts,
            global_step=step,
        )


def _write_to_wandb(logger: Logger, histograms: dict[str, Histogram], step: int) -> None:
    import wandb

    rows: dict[str, Any] = {
        name: wandb.Histogram(np_histogram=(np.array(one.counts), np.array(one.edges)))
        for name, one in histograms.items()
    }
    logger.log_metrics(rows, step)
