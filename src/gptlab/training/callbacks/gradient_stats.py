"""Statistics of the gradients, and of the weight updates, of parts of the model."""

from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from gptlab.errors import UserError, did_you_mean
from gptlab.training.callbacks.metrics import ends_step, log_step_metrics
from gptlab.training.distributed.strategies import full_tensor
from gptlab.training.module import GPTModule

Groups = dict[str, list[nn.Parameter]]


class GradientStats(L.Callback):
    """Logs norm, root mean square and largest absolute value of the gradient of parts of the model.

    The gradient is that of the global batch, before clipping. Steps that are not logged cost nothing.

    Args:
        every: Steps between rows, in addition to the first step.
        modules: Glob patterns of module names, each matching module being one part. None: each block, and each module
            outside of the blocks.
        update_ratio: Whether to log the norm of the weight update divided by the norm of the weights. This keeps a copy
            of the weights during the steps that are logged.
    """

    def __init__(self, every: PositiveInt, modules: list[str] | None, update_ratio: bool) -> None:
        self.every, self.modules, self.update_ratio = every, modules, update_ratio
        self._groups: Groups = {}
        self._gradients: dict[str, Tensor] = {}  # norms () by metric, from the hook below until the end of the step
        self._weights: dict[str, list[Tensor]] = {}  # copies of the weights before the step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the parameters of each part; raises UserError if a pattern matches no module."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        self._groups = group_parameters(pl_module.model, self.modules, "callbacks.gradient_stats.modules")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Computes the statistics, if the step is logged. Lightning clips the gradients after this hook."""
        if not is_logged(trainer.global_step + 1, self.every):
            return
        for name, parameters in self._groups.items():
            if not (gradients := [p.grad for p in parameters if p.grad is not None]):
                continue  # frozen, with LoRA
            norm = full_tensor(get_total_norm(gradients))
            self._gradients |= {
                f"grad_norm/{name}": norm,
                f"grad_rms/{name}": norm / sum(gradient.numel() for gradient in gradients) ** 0.5,
                f"grad_max/{name}": full_tensor(get_total_norm(gradients, norm_type=torch.inf)),
            }
            if self.update_ratio:
                self._weights[name] = [p.detach().clone() for p in parameters if p.grad is not None]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the statistics of the step, if it is logged."""
        if not self._gradients or not ends_step(trainer, batch_idx):
            return
        ratios = {f"update_ratio/{name}": self._ratio(name) for name in self._weights}
        metrics = {name: value.item() for name, value in (self._gradients | ratios).items()}
        self._gradients, self._weights = {}, {}
        log_step_metrics(trainer, metrics, trainer.global_step)

    def _ratio(self, name: str) -> Tensor:
        """Returns the norm of the last update divided by that of the weights () before it."""
        before = self._weights[name]
        after = [p.detach() for p in self._groups[name] if p.grad is not None]
        update = full_tensor(get_total_norm([new - old for new, old in zip(after, before, strict=True)]))
        return update / full_tensor(get_total_norm(before))


def is_logged(step: int, every: int) -> bool:
    """Returns whether a step is the first one or a multiple of ``every``."""
    return step == 1 or step % every == 0


def group_parameters(model: nn.Module, patterns: list[str] | None, key: str) -> Groups:
    """Returns the parameters of each part of a model by its name.

    Args:
        model: The model.
        patterns: Glob patterns of module names. None: each block, and each module outside of the blocks.
        key: Config key of the patterns, for messages.

    Raises:
        UserError: A pattern matches no module that has parameters.
    """
    groups: Groups = {}
    if patterns is None:
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            groups.setdefault(".".join(parts[:2] if parts[1:2] and parts[1].isdigit() else parts[:1]), []).append(
                parameter
            )
        return groups
    known = {name: list(module.parameters()) for name, module in model.named_modules() if name}
    for pattern in patterns:
        found = {name: params for name, params in known.items() if params and fnmatchcase(name, pattern)}
        if not found:
            raise UserError(f"{key}: {pattern} matches no module with parameters.{did_you_mean(pattern, known)}")
        groups |= found
    return groups
