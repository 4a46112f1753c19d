"""Logs metrics to every logger and to the console."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import lightning as L
import torch

from gptlab.data.order import BatchSizeSchedule
from gptlab.training.callbacks.logger_connector import StepLoggerConnector
from gptlab.training.callbacks.preemption import Preempted
from gptlab.training.callbacks.progress import ProgressDisplay
from gptlab.training.datamodule import TokenDataModule
from gptlab.training.devices import peak_memory
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)


class Stopwatch:
    """Measures seconds of training since the last reading, excluding evaluation, samples and checkpoints.

    Args:
        clock: Returns the current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds, self._since = 0.0, None  # type: float, float | None

    def run(self) -> None:
        """Starts the stopwatch, if it is not running."""
        if self._since is None:
            self._since = self._clock()

    def pause(self) -> None:
        """Pauses the stopwatch, if it is running."""
        if self._since is not None:
            self._seconds += self._clock() - self._since
            self._since = None

    def read(self) -> float:
        """Returns the seconds measured and resets them to 0."""
        running = self._since is not None
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        if running:
            self.run()
        return seconds


class MetricsCallback(L.Callback):
    """Logs the metrics that docs/run-directory.md lists, and those that other callbacks log with Lightning's ``log``.

    Args:
        log_every: Steps between rows.
        max_steps: Length of the run; the last step is always logged and evaluated.
        stages: Number of sequences of every step.
        block_size: Tokens per sequence.
        flops_per_token: FLOPs of the model per token, forward and backward.
        peak_flops: Peak FLOPs per second of all devices together. If None (unknown), mfu is not logged.
    """

    evaluation_metrics = ("val/loss", "val/bits_per_byte")

    def __init__(
        self,
        *,
        log_every: int,
        max_steps: int,
        stages: BatchSizeSchedule,
        block_size: int,
        flops_per_token: int,
        peak_flops: float | None,
    ) -> None:
        self.log_every, self.max_steps, self.stages, self.block_size = log_every, max_steps, stages, block_size
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.best: dict[str, float] = {}  # evaluation with the lowest loss: step, val/loss, val/bits_per_byte
        self.counts: list[Callable[[], dict[str, float]]] = []  # called for every row, for metrics of other callbacks
        self.mfu: float | None = None  # of the latest row (Chowdhery et al. 2022, appendix B)
        self.seconds = 0.0  # duration of training, including evaluation
        self.has_started = False  # whether training has begun, after a checkpoint is restored
        self._watch = Stopwatch()
        self._waiting = Stopwatch(lambda: 0.0)  # time spent waiting for data
        self._display: ProgressDisplay | None = None

    def tokens(self, steps: int) -> int:
        """Returns the number of tokens of the first ``steps`` steps."""
        return self.stages.first(steps) * self.block_size

    def is_due(self, step: int) -> bool:
        """Returns whether a step has a row of metrics: the first and the last step, and every ``log_every`` steps."""
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Records values of Lightning's ``log`` at their steps."""
        trainer._logger_connector = StepLoggerConnector(trainer, self.is_due, self._log_values)  # noqa: SLF001

    def _log_values(self, trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
        log_metrics(trainer, {**metrics, "tokens": self.tokens(step)}, step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Creates the progress display and starts the clocks."""
        self.has_started = True
        connector = trainer._logger_connector  # noqa: SLF001
        assert isinstance(connector, StepLoggerConnector)  # noqa: S101
        connector.start()
        self._last_step = trainer.global_step
        self._began = time.monotonic() - self.seconds
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenDataModule)  # noqa: S101
        self._waiting = Stopwatch(data.waited)
        if trainer.is_global_zero:
            self._display = ProgressDisplay(trainer.global_step, self.max_steps)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the stopwatches."""
        self._watch.run()
        self._waiting.run()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the display if this micro-batch completed a step; logs a row if one is due."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if self._display:
            self._display.step(step)
        if self.is_due(step):
            self._record_step(trainer, pl_module, step)
        if step == self.max_steps:
            trainer.should_stop = True  # makes Lightning evaluate after the last step, regardless of the interval

    def _record_step(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        assert isinstance(module, GPTModule)  # noqa: S101
        loss = module.global_step_loss()  # synchronizes with the device, so the times read below include its work
        seconds, waited = self._watch.read(), self._waiting.read()
        tokens_per_second = (self.tokens(step) - self.tokens(self._last_step)) / seconds
        self._last_step = step
        metrics = {
            "train/loss": loss,
            "lr": module.lr(step - 1),
            **module.group_lrs(),
            "grad_norm": module.grad_norm.item(),
            "weight_norm": module.weight_norm(),
            "tokens": self.tokens(step),
            "tokens_per_second": tokens_per_second,
            "data_wait": waited / seconds,
            "peak_memory_gb": peak_memory(module.device) / 1e9,
        }
        for count in self.counts:
            metrics |= count()
        if self.peak_flops is not None:
            metrics["mfu"] = self.mfu = tokens_per_second * self.flops_per_token / self.peak_flops
        log_metrics(trainer, metrics, step)
        if self._display:
            self._display.metrics(step, metrics)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pauses the stopwatches, after the device has completed its queued steps."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._watch.pause()
        self._waiting.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the evaluation."""
        step = trainer.global_step
        metrics = {name: trainer.callback_metrics[name].item() for name in ("val/loss", "val/bits_per_byte")}
        log_metrics(trainer, {**metrics, "tokens": self.tokens(step)}, step)
        is_best = metrics["val/loss"] < self.best.get("val/loss", math.inf)
        if is_best:
            self.best = {"step": step, **metrics}
        self.seconds = time.monotonic() - self._began
        log.info(
            "step %*d/%d · val loss %.4f · %.4f bits per byte%s",
            *(len(str(self.max_steps)), step, self.max_steps, metrics["val/loss"], metrics["val/bits_per_byte"]),
            " · the best so far" if is_best else "",
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the progress display; records the values of the last step before preemption."""
        self._close()
        if isinstance(exception, Preempted) and trainer.training:
            trainer._logger_connector.update_train_step_metrics()  # noqa: SLF001

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the duration and closes the progress display."""
        self.seconds = time.monotonic() - self._began
        self._close()

    def _close(self) -> None:
        if self._display:
            self._display.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the best evaluation and the duration so far."""
        return {"best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best evaluation and the duration."""
        if best := state_dict["best"]:
            self.best = {"step": int(best["step"]), **{name: float(best[name]) for name in self.evaluation_metrics}}
        self.seconds = float(state_dict["seconds"])


def log_metrics(trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
    """Logs a row to every logger, and to ``trainer.callback_metrics``, from which early stopping reads."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float64).unbind()
    trainer.callback_metrics.update(zip(metrics, values, strict=True))
    with defer_interrupt():  # a row is written by all loggers or by none
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


def log_step_metrics(trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
    """Logs metrics of another callback, with the tokens seen up to a step, to every logger.

    Unlike Lightning's ``log``, this costs no time in later steps.
    """
    recorder = next(callback for callback in trainer.callbacks if isinstance(callback, MetricsCallback))  # type: ignore[attr-defined]
    log_metrics(trainer, {**metrics, "tokens": recorder.tokens(step)}, step)


def is_evaluation_due(step: int, every: int | None, eval_every: int, max_steps: int) -> bool:
    """Returns whether the evaluation at a step is the first of an ``every``-step interval, or the run's last.

    Args:
        step: Step of the evaluation.
        every: Length of the interval; None if every evaluation is due.
        eval_every: Steps between evaluations.
        max_steps: Length of the run.
    """
    return every is None or step % every < eval_every or step == max_steps


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Returns whether a micro-batch is the last one of its step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


@contextlib.contextmanager
def defer_interrupt() -> Iterator[None]:
    """Defers the first Ctrl-C until the block has completed."""
    deferred: list[FrameType | None] = []

    def defer(number: int, frame: FrameType | None) -> None:
        if deferred and callable(handler):
            handler(number, frame)
        deferred.append(frame)

    handler = signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if deferred and callable(handler):
        handler(signal.SIGINT, deferred[0])
