from itertools import count, islice, product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gptlab.data.batches import EvaluationBatches, RankSlice, TrainBatches
from gptlab.data.order import WindowOrder, evaluation_starts
from gptlab.data.shards.manifest import Manifest, Shard, ShardWriter
from gptlab.data.shards.streams import LocalFolder, TokenStream

BLOCK_SIZE = 16


def stream_of(tokens: np.ndarray, folder, shard_tokens: int = 700) -> TokenStream:
    """Writes ``tokens`` to several shards and returns their stream."""
    shards: list[Shard] = []
    for start in range(0, len(tokens), shard_tokens):
        writer = ShardWriter(folder / f"train_{start}.bin", "uint32")
        writer.add(tokens[start : start + shard_tokens], text_bytes=1, documents=1)
        shards += writer.finish()
    splits: dict[str, list[Shard]] = {"train": shards, "val": []}
    manifest = Manifest(format=1, origin="", tokenizer={}, vocab_size=2**32, dtype="uint32", splits=splits)
    return TokenStream(LocalFolder(folder), manifest, "train")


@pytest.fixture
def tokens():
    return np.random.default_rng(0).permutation(5000).astype(np.uint32)  # each token identifies its position


@pytest.fixture
def order(tokens):
    return WindowOrder(
        [len(tokens)], BLOCK_SIZE, seed=3, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None
    )


@pytest.mark.parametrize(
    ("world_size", "accumulation", "micro_batch_size"),
    [(1, 1, 24), (1, 24, 1), (2, 1, 12), (2, 3, 4), (4, 1, 6), (4, 2, 3), (4, 6, 1), (3, 8, 1)],
)
def test_step_reads_the_same_windows_for_any_world_size(
    tokens, order, tmp_path, world_size, accumulation, micro_batch_size
):
    stream, global_batch = stream_of(tokens, tmp_path), 24
    ranks = [TrainBatches(stream, order, RankSlice(rank, world_size, micro_batch_size)) for rank in range(world_size)]
    for step in (0, 1, 12, 13):  # an epoch has 311 windows and ends in step 12
        numbers = range(step * accumulation, (step + 1) * accumulation)
        batches = [rank[number] for number in numbers for rank in ranks]
        assert all(batch.idx.shape == batch.targets.shape == (micro_batch_size, BLOCK_SIZE) for batch in batches)
        starts = order.starts(np.arange(step * global_batch, (step + 1) * global_batch))
        expected = sorted(tokens[start : start + BLOCK_SIZE].tolist() for start in starts)
        assert sorted(row for batch in batches for row in batch.idx.tolist()) == expected


def test_1024_ranks_share_a_step_without_gaps_or_overlap():
    parts = [RankSlice(rank, world_size=1024, micro_batch_size=4) for rank in range(1024)]
    for step in (0, 7, 10**9):
        positions = [TrainBatches(None, None, part).positions(2 * step + micro) for micro in range(2) for part in parts]
        np.testing.assert_array_equal(np.sort(np.concatenate(positions)), np.arange(8192 * step, 8192 * (step + 1)))


def test_targets_are_the_next_tokens(tokens, order, tmp_path):
    batches = TrainBatches(stream_of(tokens, tmp_path), order, RankSlice(1, 2, 8))
    for number in (0, 1, 30):
        idx, targets, documents = batches[number]
        assert documents is None
        assert idx.dtype == targets.dtype == torch.int64
        for start, inputs, following in zip(order.starts(batches.positions(number)), idx, targets, strict=True):
            np.testing.assert_array_equal(inputs, tokens[start : start + BLOCK_SIZE])
            np.testing.assert_array_equal(following, tokens[start + 1 : start + BLOCK_SIZE + 1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_worker_processes_give_the_same_batches_in_the_same_order(tokens, order, tmp_path):
    batches = TrainBatches(stream_of(tokens, tmp_path), order, RankSlice(0, 2, 4), eot_id=int(tokens[1000]))
    batches[0]  # opens files, which worker processes do not inherit

    def first(workers):
        loader = DataLoader(batches, batch_size=None, sampler=count(5), num_workers=workers)
        return list(islice(loader, 20))

    without_workers, with_workers = first(0), first(3)
    for number, (one, other) in enumerate(zip(without_workers, with_workers, strict=True), start=5):
        expected = batches[number]
        for batch in (one, other):
            assert torch.equal(batch.idx, expected.idx)
            assert torch.equal(batch.targets, expected.targets)
            assert torch.equal(batch.documents, expected.documents)


SHARES = [(50, 1, 8), (50, 8, 3), (64, 8, 8), (65, 8, 8), (0, 2, 4), (13, 3, 4)]
SHARES += list(product(range(1, 10), range(1, 9), range(1, 4)))


@pytest.mark.parametrize(("windows", "world_size", "micro_batch_size"), SHARES)
def test_evaluation_scores_every_window_once_in_the_same_number_of_batches(
    tokens, tmp_path, windows, world_size, micro_batch_size
):
    starts = evaluation_starts(len(tokens), BLOCK_SIZE, windows)
    assert len(starts) == windows
    stream = stream_of(tokens, tmp_path)
    scored, unscored = [], 0
    for rank in range(world_size):
        batches = EvaluationBatches(stream, starts, BLOCK_SIZE, RankSlice(rank, world_size, micro_batch_size))
        assert len(batches) == -(-windows // (world_size * micro_batch_size))
        for idx, targets, documents in DataLoader(batches, batch_size=None):
            assert documents is None
            assert idx.shape == targets.shape == (micro_batch_size, BLOCK_SIZE)
            for inputs, following in zip(idx.tolist(), targets.tolist(), strict=True):
                if set(following) == {-100}:
                    unscored += 1
                    assert inputs == tokens[:BLOCK_SIZE].tolist()  # padding is a valid window
                else:
                    scored.append((*inputs, following[-1]))
                    assert following[:-1] == inputs[1:]
    assert sorted(scored) == sorted(tuple(tokens[start : start + BLOCK_SIZE + 1].tolist()) for start in starts)
    assert unscored == len(batches) * world_size * micro_batch_size - windows


@pytest.mark.parametrize("evaluation", [False, True])
def test_documents_are_numbered_within_each_sequence(tmp_path, evaluation):
    tokens = np.random.default_rng(1).integers(0, 6, size=2000).astype(np.uint32)
    stream = stream_of(tokens, tmp_path)
    order = WindowOrder([2000], BLOCK_SIZE, 3, "data", "shuffled", 1, None)
    for eot_id in (4, 17):  # 17 does not occur
        if evaluation:
            batches = EvaluationBatches(
                stream, evaluation_starts(2000, BLOCK_SIZE, 15), BLOCK_SIZE, RankSlice(0, 1, 8), eot_id
            )
        else:
            batches = TrainBatches(stream, order, RankSlice(1, 2, 8), eot_id)
        for number in range(2):
            idx, _, documents = batches[number]
            for row, found in zip(idx.tolist(), documents.tolist(), strict=True):
                expected, document = [], 0
                for token in row:
                    document += token == eot_id  # the end-of-text token belongs to the next document
                    expected.append(document)
                assert found == expected
    assert batches[0].documents.max() == 0


def test_evaluation_batches_end(tokens, tmp_path):
    batches = EvaluationBatches(stream_of(tokens, tmp_path), np.array([0, 16]), BLOCK_SIZE, RankSlice(0, 1, 2))
    assert len(list(islice(iter(batches), 5))) == 1
    with pytest.raises(IndexError):
        batches[1]
