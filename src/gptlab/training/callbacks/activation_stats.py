"""Statistics of the activations of the model."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

import lightning as L
import torch
from pydantic import PositiveInt
from torch import Tensor

from gptlab.data.batches import Batch
from gptlab.errors import UserError, did_you_mean
from gptlab.model.capture import WEIGHTS, activation_names, replace_activations
from gptlab.training.callbacks.gradient_stats import is_logged
from gptlab.training.callbacks.metrics import log_step_metrics
from gptlab.training.distributed.strategies import reduce_over_data_ranks, scoring
from gptlab.training.module import GPTModule


class ActivationStats(L.Callback):
    """Logs mean, standard deviation, kurtosis, fraction of zeros and largest absolute value of activations.

    They are those of an additional forward pass on the first micro-batch of the step, over all ranks, before the step
    and without dropout. This pass is not compiled: hooks in compiled code would need another compilation, and the
    losses of the run would differ in the last bits.

    Args:
        every: Steps between rows, in addition to the first step.
        modules: Glob patterns of activation names (``gptlab.model.capture``).
    """

    def __init__(self, every: PositiveInt, modules: list[str]) -> None:
        self.every, self.modules = every, modules
        self._names: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the activations; raises UserError if a pattern matches none."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        known = [name for name in activation_names(pl_module.model) if not name.endswith(WEIGHTS)]
        for pattern in self.modules:
            found = [name for name in known if fnmatchcase(name, pattern)]
            if not found:
                raise UserError(
                    f"callbacks.activation_stats.modules: {pattern} matches no activation."
                    f"{did_you_mean(pattern, known)}"
                )
            self._names += found

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Logs the statistics, if the step is logged and this is its first micro-batch.

        The module seeds the random number generators after this hook, so the pass does not change them.
        """
        step = trainer.global_step + 1
        if batch_idx % trainer.accumulate_grad_batches or not is_logged(step, self.every):
            return
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        sums = _measure(trainer, pl_module, batch, self._names)
        if not sums:
            return
        names, rows = list(sums), torch.stack(list(sums.values()))  # (N, 7)
        totals = reduce_over_data_ranks(rows[:, :-1].contiguous(), trainer, "sum").tolist()
        largest = reduce_over_data_ranks(rows[:, -1].contiguous(), trainer, "max").tolist()
        metrics: dict[str, float] = {}
        for name, total, maximum in zip(names, totals, largest, strict=True):
            metrics |= {f"activation_{kind}/{name}": value for kind, value in _moments(*total).items()}
            metrics[f"activation_max/{name}"] = maximum
        log_step_metrics(trainer, metrics, step)


@torch.no_grad()
def _measure(trainer: L.Trainer, module: GPTModule, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Runs a forward pass; returns (count, sums of x, x², x³, x⁴, zeros, max |x|) (7,) of each activation x."""
    sums: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> Tensor:
        values = x.double()
        powers = [values.pow(power).sum() for power in (1, 2, 3, 4)]
        sums[name] = torch.stack([values.new_tensor(x.numel()), *powers, (x == 0).sum(), values.abs().max()])
        return x

    hooks: dict[str, Callable[[Tensor], Tensor]] = {name: partial(record, name) for name in names}
    with scoring(trainer, module.model), replace_activations(module.model, hooks):
        module.model.loss(batch.idx, batch.targets, batch.documents, module.loss_chunk)
    return sums


def _moments(count: float, first: float, second: float, third: float, fourth: float, zeros: float) -> dict[str, float]:
    """Returns mean, standard deviation, kurtosis (3 for a normal distribution) and fraction of zeros.

    Args:
        count: Number of values.
        first: Sum of the values.
        second: Sum of their squares.
        third: Sum of their third powers.
        fourth: Sum of their fourth powers.
        zeros: Number of values that are 0.
    """
    mean, m2, m3, m4 = (power / count for power in (first, second, third, fourth))
    variance = max(m2 - mean**2, 0.0)
    central = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
    kurtosis = central / variance**2 if variance > 0 else float("nan")
    return {"mean": mean, "std": variance**0.5, "kurtosis": kurtosis, "zeros": zeros / count}
