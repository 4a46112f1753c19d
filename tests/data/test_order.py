import hashlib
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from gptlab.data.order import WindowOrder, evaluation_starts, permute

PRIMES = [2, 3, 5, 7, 11, 13, 127, 251, 257, 1009, 4093, 8191, 65537]
POWERS = [2**k for k in range(1, 15)]
SIZES = sorted(
    {1, *range(1, 130), *PRIMES, *POWERS, *(p + 1 for p in POWERS), *(p - 1 for p in POWERS), *range(900, 946)}
)
KEYS = (0, 1, 2**64 - 1)
MASK = 2**64 - 1


def permute_one(index: int, size: int, key: int) -> int:
    """Permutes one index with the same network in Python's unbounded integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return x ^ x >> 31

    bits = 1
    while 4**bits < size:
        bits += 1
    while True:
        left, right = divmod(index, 2**bits)
        for number in range(1, 7):
            round_key = mix((key + number * 0x9E3779B97F4A7C15) & MASK)
            left, right = right, left ^ mix(right ^ round_key) % 2**bits
        index = left * 2**bits + right
        if index < size:
            return index


def test_permute_is_a_bijection_for_every_size_and_key():
    for size in SIZES:
        for key in KEYS:
            out = permute(np.arange(size, dtype=np.uint64), size, key)
            np.testing.assert_array_equal(np.sort(out), np.arange(size), err_msg=f"size {size}, key {key}")


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 65, 1009, 10**6, 2**40 + 1, 2**62])
def test_permute_matches_the_published_network_in_exact_arithmetic(size):
    indices = sorted({0, size // 3, size // 2, size - 1})
    for key in (*KEYS, 0x0123456789ABCDEF):
        out = permute(np.array(indices, dtype=np.uint64), size, key)
        assert out.tolist() == [permute_one(index, size, key) for index in indices]


def test_permute_accepts_any_shape_and_does_not_modify_its_argument():
    index = np.arange(60, dtype=np.uint64).reshape(3, 4, 5)
    out = permute(index, 61, 7)
    assert out.shape == (3, 4, 5)
    assert out[1, 2, 3] == permute(np.array([33], dtype=np.uint64), 61, 7)[0]
    np.testing.assert_array_equal(index.ravel(), np.arange(60))


def test_every_key_gives_a_different_permutation():
    index = np.arange(50, dtype=np.uint64)
    assert len({permute(index, 50, key).tobytes() for key in range(500)}) == 500


def test_permuted_index_is_uniform_over_keys():
    size, keys = 16, 4000
    index = np.arange(size, dtype=np.uint64)
    places = np.stack([permute(index, size, key) for key in range(keys)])
    for column in (0, 1, size - 1):
        counts = np.bincount(places[:, column].astype(int), minlength=size)
        chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()  # 15 degrees of freedom
        assert chi_square < 44.3, counts  # the 99.99% quantile


@pytest.mark.parametrize("size", [4099, 100_003])
def test_neighbors_in_the_permutation_are_uncorrelated(size):
    out = permute(np.arange(size, dtype=np.uint64), size, 12345).astype(np.int64)
    limit = 5 / np.sqrt(size)
    for lag in (1, 2, 3, 64):
        assert abs(np.corrcoef(out[:-lag], out[lag:])[0, 1]) < limit, lag
    assert abs(np.corrcoef(out, np.arange(size))[0, 1]) < limit
    steps = np.bincount((out[1:] - out[:-1]) % size * 64 // size, minlength=64)
    assert ((steps - size / 64) ** 2 / (size / 64)).sum() < 113.5  # chi-square, 63 degrees of freedom, 99.99%


@pytest.mark.parametrize("size", [10**10 + 1, 2**62])
def test_permute_of_a_huge_range_needs_constant_memory(size):
    indices = np.array([0, 1, 2, 3, size // 2, size - 2, size - 1], dtype=np.uint64)
    tracemalloc.start()
    out = permute(indices, size, 99)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(out.tolist())) == len(indices)
    assert out.max() < size
    assert peak < 100_000


@pytest.mark.parametrize(("tokens", "block_size"), [(1000, 8), (1001, 8), (1007, 8), (64, 32), (999, 1), (4096, 50)])
def test_epoch_reads_each_window_once_without_overlap(tokens, block_size):
    order = WindowOrder(
        [tokens], block_size, seed=1, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None
    )
    # as many windows as fit at the largest offset, T - 1, with one more token for the last target
    fitting = max(w for w in range(tokens) if block_size - 1 + w * block_size + 1 <= tokens)
    assert order.windows == fitting
    for epoch in range(5):
        starts = order.starts(np.arange(epoch * fitting, (epoch + 1) * fitting))
        offset = starts.min()
        assert 0 <= offset < block_size
        np.testing.assert_array_equal(np.sort(starts), offset + block_size * np.arange(fitting))
        assert starts.max() + block_size + 1 <= tokens


def test_epochs_have_different_shuffles_and_offsets():
    order = WindowOrder([10_000], 100, seed=1, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None)
    epochs = order.starts(np.arange(50 * order.windows)).reshape(50, -1)
    offsets = epochs.min(axis=1)
    assert len(set(offsets.tolist())) > 30  # 39 or 40 are expected for 50 draws from 100 offsets
    assert len({(epoch - offset).tobytes() for epoch, offset in zip(epochs, offsets, strict=True)}) == 50


def test_window_depends_only_on_its_position():
    order = WindowOrder([1003], 8, seed=5, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None)
    positions = np.arange(4 * order.windows)
    whole = order.starts(positions)
    for size in (1, 7, 100):
        pieces = [order.starts(positions[i : i + size]) for i in range(0, len(positions), size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    shuffled = np.random.default_rng(0).permutation(len(positions))
    again = WindowOrder([1003], 8, seed=5, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None)
    np.testing.assert_array_equal(again.starts(shuffled), whole[shuffled])


@pytest.mark.parametrize("change", [{"seed": 6}, {"fingerprint": "other data"}])
def test_order_depends_on_seed_and_data(change):
    original = {"seed": 5, "fingerprint": "data"}
    one, other = (
        WindowOrder([10_000], 8, **chosen, order="shuffled", block_shards=1, limit_windows=None).starts(np.arange(1000))
        for chosen in (original, original | change)
    )
    assert (one == other).mean() < 0.02


@pytest.mark.parametrize(("limit", "windows"), [(1, 1), (5, 5), (10_000, 124)])
def test_limit_windows_uses_the_first_windows_in_every_epoch(limit, windows):
    order = WindowOrder([1000], 8, seed=1, fingerprint="data", order="shuffled", block_shards=1, limit_windows=limit)
    epochs = np.sort(order.starts(np.arange(20 * windows)).reshape(20, windows), axis=1)
    np.testing.assert_array_equal(epochs, np.tile(8 * np.arange(windows), (20, 1)))


def test_stream_shorter_than_two_windows_raises():
    assert (
        WindowOrder([64], 32, seed=1, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None).windows
        == 1
    )
    with pytest.raises(ValueError, match="63 tokens are fewer than two sequences of block_size=32"):
        WindowOrder([63], 32, seed=1, fingerprint="data", order="shuffled", block_shards=1, limit_windows=None)


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (8, 0), (9, 1), (16, 1), (17, 2), (1000, 124), (1001, 125)])
def test_evaluation_reads_every_complete_window(tokens, windows):
    expected = [start for start in range(0, tokens, 8) if start + 8 + 1 <= tokens]
    assert len(expected) == windows
    assert evaluation_starts(tokens, 8, None).tolist() == expected
    assert evaluation_starts(tokens, 8, 10_000).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7, 60, 124, 125])
def test_limited_evaluation_is_evenly_spaced(count):
    starts = evaluation_starts(1001, 8, count)  # 125 windows
    assert len(starts) == count
    assert starts[0] == 0
    assert starts[-1] + 8 + 1 <= 1001
    np.testing.assert_array_equal(starts % 8, 0)
    gaps = np.diff([*starts, 1000]) // 8  # between windows, and from the last window to the end
    assert set(gaps.tolist()) <= {125 // count, -(-125 // count)}


# --- the order "sequential", and the order "block" compared with its definition in plain Python


def order_of(shards, block_size, order, block_shards=1, limit_windows=None) -> WindowOrder:
    return WindowOrder(
        shards,
        block_size,
        seed=5,
        fingerprint="data",
        order=order,
        block_shards=block_shards,
        limit_windows=limit_windows,
    )


def draw(purpose: str, epoch: int) -> int:
    """Returns the 64 bits that ``order_of`` draws for a purpose in an epoch."""
    digest = hashlib.blake2b(f"data\0005\0{purpose}\0{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def permuted(items: list, key: int) -> list:
    return [items[permute_one(i, len(items), key)] for i in range(len(items))]


def blocks_of(shards, block_size, block_shards, epoch) -> list[list[tuple[int, int]]]:
    """Returns the blocks of an epoch, each a list of windows: index of the shard and start offset in the stream."""
    offset = draw("offset", epoch) % block_size
    windows: dict[int, list[tuple[int, int]]] = {}
    for number, tokens in enumerate(shards):
        begin = sum(shards[:number])
        # as many as fit at the largest offset, T - 1, with one more token for the last target
        fitting = [w for w in range(tokens) if block_size - 1 + (w + 1) * block_size + 1 <= tokens]
        if fitting:
            windows[number] = [(number, begin + offset + w * block_size) for w in fitting]
    sequence = permuted(list(windows), draw("shards", epoch))
    blocks = [sequence[i : i + block_shards] for i in range(0, len(sequence), block_shards)]
    return [
        permuted([window for number in block for window in windows[number]], draw(f"block {b}", epoch))
        for b, block in enumerate(blocks)
    ]


CASES = [
    ([100] * 12, 8, 4),
    ([100, 40, 0, 333, 15, 16, 90, 1, 64, 200, 17], 8, 3),  # 0, 1 and 15 tokens are too short for a window
    ([15, 15, 50, 15, 15, 15, 50, 15], 8, 1),
    ([70, 80, 90], 8, 10),
    ([500], 8, 4),
    ([40, 50, 60, 70], 1, 2),
]


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(("shards", "block_size", "block_shards"), CASES)
def test_block_order_matches_its_definition(shards, block_size, block_shards, epoch):
    order = order_of(shards, block_size, "block", block_shards)
    expected = [window for block in blocks_of(shards, block_size, block_shards, epoch) for window in block]
    assert order.windows == len(expected)
    starts = order.starts(np.arange(epoch * order.windows, (epoch + 1) * order.windows))
    assert starts.tolist() == [start for _, start in expected]
    owners = np.searchsorted(np.cumsum(shards), starts, side="right").tolist()
    assert owners == [number for number, _ in expected]
    ends = np.cumsum(shards)[owners]
    assert (starts + block_size + 1 <= ends).all()  # the last target is in the same shard


@pytest.mark.parametrize(("shards", "block_size", "block_shards"), CASES)
def test_block_order_reads_each_window_once_and_differs_between_epochs(shards, block_size, block_shards):
    order = order_of(shards, block_size, "block", block_shards)
    epochs = order.starts(np.arange(20 * order.windows)).reshape(20, -1)
    begins, offsets = np.cumsum([0, *shards]), {}
    for number, epoch in enumerate(epochs):
        assert len(set(epoch.tolist())) == order.windows
        cuts = epoch - begins[np.searchsorted(begins, epoch, side="right") - 1]
        offsets[number] = set((cuts % block_size).tolist())
        assert len(offsets[number]) == 1  # one offset for all shards
    assert len({epoch.tobytes() for epoch in epochs}) == 20
    if block_size > 1:
        assert len(set().union(*offsets.values())) > 4  # for 20 draws from 8 offsets


def test_windows_of_a_block_are_shuffled_together():
    shards, block_shards = [808] * 9, 3  # 100 windows each
    order = order_of(shards, 8, "block", block_shards)
    of_shard = order.starts(np.arange(3 * order.windows)) // 808
    for block in of_shard.reshape(9, 300):
        assert np.bincount(block, minlength=9).tolist().count(100) == 3  # exactly three whole shards
        changes = (block[1:] != block[:-1]).mean()
        assert changes > 0.55  # 2/3 is expected for three well-mixed shards
    sequences = of_shard.reshape(3, 3, 300)
    assert len({tuple(sorted(set(epoch[0].tolist()))) for epoch in sequences}) > 1  # blocks consist of other shards


@pytest.mark.parametrize("name", ["sequential", "block"])
def test_window_depends_only_on_its_position_in_every_order(name):
    shards = [100, 40, 0, 333, 15, 16, 90]
    order = order_of(shards, 8, name, 2)
    positions = np.arange(4 * order.windows)
    whole = order.starts(positions)
    for size in (1, 7, 100):
        pieces = [order.starts(positions[i : i + size]) for i in range(0, len(positions), size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    shuffled = np.random.default_rng(0).permutation(len(positions))
    np.testing.assert_array_equal(order_of(shards, 8, name, 2).starts(shuffled), whole[shuffled])


def test_sequential_windows_are_contiguous_from_the_offset_of_the_epoch():
    order = order_of([300, 0, 703], 8, "sequential")
    assert order.windows == max(w for w in range(1003) if 7 + w * 8 + 1 <= 1003)
    for epoch in range(5):
        starts = order.starts(np.arange(epoch * order.windows, (epoch + 1) * order.windows))
        assert starts.tolist() == [i * 8 + draw("offset", epoch) % 8 for i in range(order.windows)]


@pytest.mark.parametrize(("shards", "block_size", "block_shards"), CASES)
def test_ahead_returns_the_shards_of_the_current_and_the_next_block(shards, block_size, block_shards):
    order = order_of(shards, block_size, "block", block_shards)
    blocks = [block for epoch in range(3) for block in blocks_of(shards, block_size, block_shards, epoch)]
    position = 0
    for block, following in pairwise(blocks):
        current, following_shards = ({number for number, _ in windows} for windows in (block, following))
        for _ in block:
            ahead = order.ahead(position)
            named = [int(np.searchsorted(np.cumsum(shards), begin, side="right")) for begin, _ in ahead]
            assert [(sum(shards[:n]), sum(shards[: n + 1])) for n in named] == ahead  # whole shards
            assert (set(named[: len(current)]), set(named[len(current) :])) == (current, following_shards)
            position += 1


@pytest.mark.parametrize(("name", "limit"), [("sequential", None), ("shuffled", None), ("shuffled", 5), ("block", 5)])
def test_ahead_contains_the_next_windows(name, limit):
    shards, block_shards = [100, 40, 60, 333, 16, 90], 2
    order = order_of(shards, 8, name, block_shards, limit)
    total = sum(shards)
    for position in range(2 * order.windows):
        ((begin, end),) = order.ahead(position)
        left = order.windows - position % order.windows
        if name == "sequential":  # two blocks of shards of average length, or the rest of the epoch
            left = min(left, 2 * block_shards * total // len(shards) // 8 - 1)
        starts = order.starts(np.arange(position, position + left))
        assert begin <= starts.min()
        assert starts.max() + 8 + 1 <= end <= total
        if limit is not None:
            assert end == starts.max() + 8 + 1 or left < limit
            assert end <= 5 * 8 + 1


@pytest.mark.parametrize("limit", [1, 5, 10_000])
def test_limit_windows_with_block_order_uses_the_first_windows(limit):
    shards = [10, 40, 333, 100]
    order = order_of(shards, 8, "block", 2, limit)
    assert order.windows == min(limit, (sum(shards) - 8) // 8)
    epochs = np.sort(order.starts(np.arange(5 * order.windows)).reshape(5, -1), axis=1)
    np.testing.assert_array_equal(epochs, np.tile(8 * np.arange(order.windows), (5, 1)))


def test_block_order_with_too_short_shards_raises():
    with pytest.raises(ValueError, match="15 tokens are fewer than two sequences of block_size=8"):
        order_of([15, 3, 15, 0], 8, "block")
    assert order_of([15, 3, 16, 0], 8, "block").windows == 1
