"""The token IDs of every step are identical for any number of ranks and workers."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptlab.data.batches import Batch, RankSlice, TrainBatches
from gptlab.data.order import training_order
from gptlab.data.shards.manifest import Manifest, Shard, ShardWriter
from gptlab.data.shards.streams import LocalFolder
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.datamodule import TokenDataModule
from preparing import data_config

T, STEPS, SEED = 16, 1000, 7
# Number of tokens of each shard. One is too short for a window.
SHARDS = [61_000, 7_000, 40_003, 12, 33_000, 50_001, 29_000, 90_000, 18_000, 75_000]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, sum(SHARDS), dtype=np.uint32)


@pytest.fixture(scope="module")
def prepared(tokens, tmp_path_factory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("shards")
    shards: list[Shard] = []
    for number, part in enumerate(np.split(tokens, np.cumsum(SHARDS)[:-1])):
        writer = ShardWriter(folder / f"train_{number:06d}.bin", "uint16")
        writer.add(part, text_bytes=len(part), documents=1)
        shards += writer.finish()
    record = BytesTokenizer().record()
    splits: dict[str, list[Shard]] = {"train": shards, "val": []}
    manifest = Manifest(format=1, origin="", tokenizer=record, vocab_size=257, dtype="uint16", splits=splits)
    return TokenDataset(LocalFolder(folder), manifest, BytesTokenizer())


@pytest.fixture(scope="module", params=["shuffled", "block"])
def order(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(order, tokens, prepared) -> dict[int, list[str]]:
    """Hashes of the windows of every step, for two global batch sizes, computed from one array of all tokens."""
    windows = training_order(prepared.manifest, data_config(order=order), T, SEED)
    assert 1 < 5 * windows.windows < STEPS * 128
    # from the last step to the first, so that the cache of the order is not used
    starts = [windows.starts(np.arange(step * 1024, step * 1024 + 1024)) for step in reversed(range(STEPS))]
    rows = tokens.astype(np.int64)[np.concatenate(starts[::-1])[:, None] + np.arange(T + 1)]
    hashes = {size: [hash_of(some) for some in np.split(rows[: STEPS * size], STEPS)] for size in (128, 1024)}
    assert len({*hashes[128], *hashes[1024]}) == 2 * STEPS
    return hashes


def hash_of(rows: np.ndarray) -> str:
    """Returns the hash of the windows (N, T + 1) of a step."""
    assert rows.dtype == np.int64
    return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()


def rows_of(batch: Batch) -> np.ndarray:
    """Returns the windows (B, T + 1) of a micro-batch."""
    return torch.cat((batch.idx, batch.targets[:, -1:]), dim=1).numpy()


def loaded(prepared: TokenDataset, order: str, plan: BatchPlan, rank: int, num_workers: int):
    """Returns an iterator over the micro-batches of a rank, as its trainer gets them."""
    config = data_config(order=order, num_workers=num_workers)
    data = TokenDataModule(prepared, config, plan=plan, block_size=T, seed=SEED, eval_windows=None)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    sampler = {"rank": rank}
    data.trainer = SimpleNamespace(global_step=0, distributed_sampler_kwargs=sampler, strategy=strategy)
    loader = data.train_dataloader()
    assert loader.num_workers == num_workers
    return iter(loader)


PLANS = [(BatchPlan(1, 32, 4), 0)]
LARGE_PLANS = [(BatchPlan(2, 64, 1), 2), (BatchPlan(4, 32, 1), 3), (BatchPlan(2, 128, 4), 2)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("plan", "num_workers"), [*PLANS, *(pytest.param(*plan, marks=pytest.mark.slow) for plan in LARGE_PLANS)]
)
def test_loaders_of_all_ranks_give_the_same_token_ids(prepared, order, expected, plan, num_workers):
    ranks = [loaded(prepared, order, plan, rank, num_workers) for rank in range(plan.world_size)]
    found = []
    for _ in range(STEPS):
        batches = [next(rank) for _ in range(plan.accumulation) for rank in ranks]
        found.append(hash_of(np.concatenate([rows_of(batch) for batch in batches])))
    assert found == expected[plan.world_size * plan.micro_batch_size * plan.accumulation]


@pytest.mark.slow
def test_1024_ranks_give_the_same_token_ids(prepared, order, expected):
    windows = training_order(prepared.manifest, data_config(order=order), T, SEED)
    stream = prepared.stream("train")
    ranks = [TrainBatches(stream, windows, RankSlice(rank, 1024, 1)) for rank in range(1024)]
    for step in range(STEPS):
        positions = np.concatenate([rank.positions(step) for rank in ranks])
        assert hash_of(stream.read(windows.starts(positions), T + 1)) == expected[1024][step]
    for rank in ranks[::64]:
        rows = stream.read(windows.starts(rank.positions(555)), T + 1)
        np.testing.assert_array_equal(rows_of(rank[555]), rows)
