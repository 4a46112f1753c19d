"""Batch size schedule compared with sums over the steps."""

from itertools import accumulate

import numpy as np
import pytest
from test_batches import BLOCK_SIZE, stream_of

from gptlab.data.batches import RankSlice, TrainBatches
from gptlab.data.order import BatchSizeSchedule, WindowOrder

EARLIER = [(3, 4), (5, 8), (6, 12)]
SIZES = [4, 4, 4, 8, 8, 12, *[24] * 20]  # global batch size of every step
FIRSTS = [0, *accumulate(SIZES)]


def test_steps_consume_contiguous_positions():
    stages = BatchSizeSchedule(24, EARLIER)
    assert [stages.batch(step) for step in range(26)] == SIZES
    assert [stages.first(step) for step in range(27)] == FIRSTS
    assert stages.first(10**12) == FIRSTS[6] + (10**12 - 6) * 24
    assert [stages.steps(windows) for windows in range(1, FIRSTS[-1] + 1)] == [
        next(steps for steps, first in enumerate(FIRSTS) if first >= windows) for windows in range(1, FIRSTS[-1] + 1)
    ]


def test_constant_batch_size_gives_multiples_of_the_step():
    stages = BatchSizeSchedule(7)
    assert [(stages.batch(step), stages.first(step)) for step in range(5)] == [(7, 7 * step) for step in range(5)]
    assert [stages.steps(windows) for windows in (1, 7, 8, 70)] == [1, 1, 2, 10]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_scheduled_step_reads_the_same_windows_for_any_world_size(tmp_path, world_size, accumulation):
    tokens = np.random.default_rng(0).permutation(5000).astype(np.uint32)
    order = WindowOrder([5000], BLOCK_SIZE, 3, "data", "shuffled", 1, None)
    stream, held = stream_of(tokens, tmp_path), 24 // (world_size * accumulation)
    ranks = [
        TrainBatches(stream, order, RankSlice(rank, world_size, held), None, BatchSizeSchedule(24, EARLIER))
        for rank in range(world_size)
    ]
    for step in (20, *range(12)):  # an epoch has 311 windows and ends in step 17
        numbers = range(step * accumulation, (step + 1) * accumulation)
        batches = [rank[number] for number in numbers for rank in ranks]
        share = SIZES[step] // (world_size * accumulation)
        assert [batch.idx.shape for batch in batches] == [(share, BLOCK_SIZE)] * len(batches)
        starts = order.starts(np.arange(FIRSTS[step], FIRSTS[step + 1]))
        expected = [tokens[start : start + BLOCK_SIZE].tolist() for start in starts]
        assert [row for batch in batches for row in batch.idx.tolist()] == expected
