"""The LightningDataModule: micro-batches from prepared shards, starting at the current step."""

import time
from collections.abc import Iterator
from itertools import count

import lightning as L
from torch.utils.data import DataLoader

from gptlab.data.batches import Batch, EvaluationBatches, RankSlice, TrainBatches
from gptlab.data.config import DataConfig
from gptlab.data.order import evaluation_starts, training_order
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.distributed.strategies import data_rank


class TimedLoader(DataLoader[Batch]):
    """DataLoader of micro-batches that measures how long training waits for them.

    Attributes:
        waited: Total seconds spent waiting for micro-batches.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        started = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()


class TokenDataModule(L.LightningDataModule):
    """LightningDataModule of token windows, whose loaders yield ``Batch`` with sequences (B, T).

    Shapes: B sequences of a micro-batch, T tokens of a sequence.

    The position in the data is derived from the optimizer step, so there is no state to save.

    Args:
        prepared: Prepared dataset: shards and manifest.
        config: Data order, limits and number of loader processes.
        plan: Division of the global batch among ranks and micro-batches.
        block_size: Tokens per sequence T.
        seed: Seed of the data order.
        eval_windows: Number of windows per evaluation; None for the full val split.

    Attributes:
        block_size: Tokens per sequence T.
        plan: Division of the global batch; ``plan.micro_batch_size`` is B in the last stage of the batch size schedule.
    """

    def __init__(
        self,
        prepared: TokenDataset,
        config: DataConfig,
        *,
        plan: BatchPlan,
        block_size: int,
        seed: int,
        eval_windows: int | None,
    ) -> None:
        super().__init__()
        self.prepared, self.config, self.plan = prepared, config, plan
        self.block_size, self.seed, self.eval_windows = block_size, seed, eval_windows
        self._loader: TimedLoader | None = None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns an infinite loader of training micro-batches, starting at the current step."""
        assert self.trainer is not None  # noqa: S101
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        self._loader = self.micro_batches(data_rank(self.trainer), self.trainer.global_step, pin_memory=on_cuda)
        return self._loader

    def waited(self) -> float:
        """Returns the seconds that this process has spent waiting for training micro-batches."""
        return 0.0 if self._loader is None else self._loader.waited

    def micro_batches(self, rank: int, first_step: int, *, pin_memory: bool = False) -> TimedLoader:
        """Returns an infinite loader of training micro-batches. Unlike ``train_dataloader``, it needs no trainer.

        Args:
            rank: Data-parallel rank.
            first_step: Step of the first micro-batch, counted from 0.
            pin_memory: Whether to copy batches to pinned memory.
        """
        order = training_order(self.prepared.manifest, self.config, self.block_size, self.seed)
        batches = TrainBatches(
            self.prepared.stream("train"), order, self._slice(rank), self._eot_id(), self.plan.stages
        )
        return TimedLoader(
            batches,
            batch_size=None,
            sampler=count(first_step * self.plan.accumulation),  # infinite
            num_workers=self.config.num_workers,
            pin_memory=pin_memory,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns a loader of this rank's share of the evaluation windows, the same in every evaluation."""
        starts = evaluation_starts(self.prepared.manifest.tokens("val"), self.block_size, self.eval_windows)
        stream = self.prepared.stream("val")
        stream.expect([(0, len(stream))])
        assert self.trainer is not None  # noqa: S101
        part = self._slice(data_rank(self.trainer))
        batches = EvaluationBatches(stream, starts, self.block_size, part, self._eot_id())
        return DataLoader(batches, batch_size=None)

    def _eot_id(self) -> int | None:
        return self.prepared.tokenizer.end_of_text if self.config.documents == "masked" else None

    def _slice(self, rank: int) -> RankSlice:
        return RankSlice(rank, self.plan.world_size, self.plan.micro_batch_size)
