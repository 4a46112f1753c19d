"""HellaSwag accuracy during training."""

import logging
from collections.abc import Callable

import lightning as L
import torch

from gptlab.evaluation.completions import AccuracyCounts, count_correct, ending_losses, rank_batches
from gptlab.evaluation.hellaswag import Example
from gptlab.training.callbacks.metrics import is_evaluation_due, log_metrics
from gptlab.training.callbacks.watchdog import record_progress
from gptlab.training.config import HellaSwagConfig
from gptlab.training.distributed.strategies import data_rank, num_data_ranks, reduce_over_data_ranks, scoring
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)


class HellaSwag(L.Callback):
    """Logs hellaswag/acc and hellaswag/acc_norm after validation, with the same weights as in validation.

    Scoring is deterministic and restores the model's training mode. The examples are split over the data ranks.

    Args:
        config: Steps between two scorings, and the batch size.
        examples: All examples, the same on every rank.
        eval_every: Steps between evaluations.
        max_steps: Length of the run; the last step is always scored.
        tokens: Returns the number of tokens of the first n steps.

    Attributes:
        latest: The latest counts; None before the first scoring.
    """

    evaluation_metrics = ("hellaswag/acc", "hellaswag/acc_norm")

    def __init__(
        self,
        config: HellaSwagConfig,
        examples: list[Example],
        eval_every: int,
        max_steps: int,
        tokens: Callable[[int], int],
    ) -> None:
        self.config, self.examples, self.tokens = config, examples, tokens
        self.eval_every, self.max_steps = eval_every, max_steps
        self.latest: AccuracyCounts | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether the evaluation at ``step`` is the first of an ``every``-step interval, or the run's last."""
        return is_evaluation_due(step, self.config.every, self.eval_every, self.max_steps)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores this rank's share of the examples and logs the accuracy over all ranks."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        if not self.is_due(step := trainer.global_step):
            return
        self.latest = self._score(trainer, pl_module)
        metrics = {"hellaswag/acc": self.latest.acc, "hellaswag/acc_norm": self.latest.acc_norm}
        log_metrics(trainer, {**metrics, "tokens": self.tokens(step)}, step)
        if trainer.is_global_zero:
            accuracy = f"acc {self.latest.acc:.2%}, acc_norm {self.latest.acc_norm:.2%}"
            log.info("step %s · HellaSwag %s of %s examples", f"{step:,}", accuracy, f"{self.latest.examples:,}")

    def _score(self, trainer: L.Trainer, module: GPTModule) -> AccuracyCounts:
        block_size, ranks = module.model.config.block_size, num_data_ranks(trainer)
        counts = torch.zeros(3, dtype=torch.long, device=module.device)
        with scoring(trainer, module.model):
            for batch in rank_batches(self.examples, data_rank(trainer), ranks, self.config.batch_size):
                # the forward pass of a sharded model needs all ranks, including those without examples left
                losses = ending_losses(
                    module.model,
                    batch or self.examples[:1],
                    block_size=block_size,
                    device=module.device,
                    chunk=module.loss_chunk,
                )
                if batch:
                    counts += torch.tensor(count_correct(losses, [e.label for e in batch]), device=module.device)
                record_progress(trainer)
        return AccuracyCounts(*reduce_over_data_ranks(counts, trainer, "sum").tolist())
