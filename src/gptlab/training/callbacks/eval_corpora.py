"""Loss and bits per byte of several corpora during training."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from pydantic import PositiveInt

from gptlab.config.base import FrozenConfig
from gptlab.data.batches import Batch
from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.splitting import without_split
from gptlab.data.shards.streams import TokenStream
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.tokenizers.tokenizer import STORED, Tokenizer
from gptlab.errors import UserError
from gptlab.evaluation.loss import EvalWindows, LossSums, WindowBatches, cut_windows
from gptlab.training.callbacks.checked_callback import CheckedCallback
from gptlab.training.callbacks.metrics import is_evaluation_due, log_step_metrics
from gptlab.training.callbacks.watchdog import record_progress
from gptlab.training.distributed.strategies import data_rank, num_data_ranks, reduce_over_data_ranks, scoring
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)

KEY = "callbacks.eval_corpora"


class EvalCorpus(FrozenConfig):
    """Corpus of ``EvalCorpora``.

    Attributes:
        source: File or directory, as data.source.
        column: Column or field that holds the text (.parquet, .jsonl).
    """

    source: str
    column: str | None = None


class DataSettings(Protocol):
    """The part of a run's configuration that prepares data."""

    @property
    def data(self) -> DataConfig:
        """The corpus of the run."""

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer of the run."""


class EvalCorpora(CheckedCallback):
    """Logs val/<name>/loss and val/<name>/bits_per_byte of each corpus after evaluations.

    The corpora are tokenized with the run's tokenizer and cached like its data. They are scored with the same weights
    as the validation split, in windows that do not overlap, and divided among the data ranks. The results are those of
    ``gptlab.evaluate data=text data.source=<source> split=all``.

    Args:
        corpora: ``EvalCorpus`` by name.
        every: Steps between scorings, each at the next evaluation. None scores at every evaluation.
        windows: Number of windows per corpus, evenly spaced. None scores the whole text.
        batch_size: Windows per batch.

    Raises:
        UserError: There are no corpora, or one has no source.
    """

    def __init__(
        self,
        corpora: Mapping[str, Mapping[str, Any]],
        every: PositiveInt | None,
        windows: PositiveInt | None,
        batch_size: PositiveInt,
    ) -> None:
        if not corpora:
            raise UserError(f"{KEY} has no corpora. Set {KEY}.corpora.<name>.source=<file>.")
        self.corpora = {name: _check_corpus(name, values) for name, values in corpora.items()}
        self.every, self.windows, self.batch_size = every, windows, batch_size
        self._windows: dict[str, tuple[TokenStream, EvalWindows]] = {}

    @property
    def evaluation_metrics(self) -> list[str]:
        """Names of the metrics."""
        return [f"val/{name}/{metric}" for name in self.corpora for metric in ("loss", "bits_per_byte")]

    @classmethod
    def preflight(cls, config: DataSettings, prepared: TokenDataset, **arguments: Any) -> None:
        """Prepares the corpora before the run directory is created.

        Args:
            config: Configuration of the run.
            prepared: Data of the run.
            arguments: Arguments of the constructor.

        Raises:
            UserError: A corpus is missing or cannot be prepared.
        """
        for name, corpus in cls(**arguments).corpora.items():
            _prepare(name, corpus, config, prepared.tokenizer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the corpora and selects their windows."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        tokenizer: Tokenizer = trainer.datamodule.prepared.tokenizer  # type: ignore[attr-defined]
        for name, corpus in self.corpora.items():
            prepared = _prepare(name, corpus, pl_module.config, tokenizer)  # type: ignore[arg-type]  # a RunConfig
            stream, block_size = prepared.stream("val"), pl_module.model.config.block_size
            self._windows[name] = stream, cut_windows(len(stream), block_size, block_size, self.windows)

    def is_due(self, module: GPTModule, step: int) -> bool:
        """Returns whether the evaluation at ``step`` is the first of an ``every``-step interval, or the run's last."""
        return is_evaluation_due(step, self.every, module.config.train.eval_every, module.config.steps)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores this rank's share of every corpus and logs the results over all ranks."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        if not self.is_due(pl_module, step := trainer.global_step):
            return
        metrics: dict[str, float] = {}
        for name in self.corpora:
            loss, bits_per_byte = self._score(trainer, pl_module, name)
            metrics |= {f"val/{name}/loss": loss, f"val/{name}/bits_per_byte": bits_per_byte}
            if trainer.is_global_zero:
                log.info("step %s · %s: loss %.4f · %.4f bits per byte", f"{step:,}", name, loss, bits_per_byte)
        log_step_metrics(trainer, metrics, step)

    @torch.no_grad()
    def _score(self, trainer: L.Trainer, module: GPTModule, name: str) -> tuple[float, float]:
        sums = LossSums(module.token_bytes)
        with scoring(trainer, module.model):
            for batch in self._batches(trainer, module, name):
                idx, targets, documents = (None if part is None else part.to(module.device) for part in batch)
                assert idx is not None and targets is not None  # noqa: PT018, S101
                sums.add(module.model.token_losses(idx, targets, documents, module.loss_chunk), targets)
                record_progress(trainer)
        sums.sums = reduce_over_data_ranks(sums.sums, trainer, "sum")
        return sums.result()

    def _batches(self, trainer: L.Trainer, module: GPTModule, name: str) -> Iterator[Batch]:
        """Yields the same number of batches on every rank, since the forward pass of a sharded model needs all ranks.

        Targets of additional batches are not scored.
        """
        ranks = num_data_ranks(trainer)
        prepared, data = trainer.datamodule.prepared, trainer.datamodule.config  # type: ignore[attr-defined]
        end = prepared.tokenizer.end_of_text if data.documents == "masked" else None
        block_size = module.model.config.block_size
        stream, windows = self._windows[name]
        own = WindowBatches(stream, windows, block_size, self.batch_size, end, data_rank(trainer), ranks)
        first = WindowBatches(stream, windows, block_size, self.batch_size, end, 0, ranks)
        yield from own
        for _ in range(len(first) - len(own)):
            idx = torch.zeros(1, block_size, dtype=torch.long)
            yield Batch(idx, torch.full_like(idx, -100), None if end is None else torch.zeros_like(idx))


def _check_corpus(name: str, values: Any) -> EvalCorpus:
    if not isinstance(values, Mapping) or not isinstance(values.get("source"), str):
        raise UserError(f"{KEY}.corpora.{name} needs a source: {KEY}.corpora.{name}.source=<file>")
    if unknown := set(values) - set(EvalCorpus.model_fields):
        raise UserError(f"Unknown config key {KEY}.corpora.{name}.{min(unknown)}. A corpus has source and column.")
    return EvalCorpus.model_validate(dict(values))


def _prepare(name: str, corpus: EvalCorpus, config: DataSettings, tokenizer: Tokenizer) -> TokenDataset:
    """Returns a prepared corpus, which is cached as with data=text."""
    source = str(Path(corpus.source).expanduser().absolute())
    changes = {"corpus": "text", "source": source, "path": None, "column": corpus.column}
    kind = tokenizer.record()["name"]
    trained = tokenizer if kind in STORED else None  # others need no corpus
    try:
        prepared = prepare(
            without_split(config.data.model_copy(update=changes)),
            config.tokenizer.model_copy(update={"name": kind}),
            trained=trained,
        )
        cut_windows(len(prepared.stream("val")), 1, 1, None)  # checks that it is long enough
    except (UserError, ValueError) as error:
        raise UserError(f"{KEY}.corpora.{name}.source={corpus.source}: {error}") from error
    return prepared
