"""A split's tokens as one array, against the array; and what reading them costs."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.shards import streams
from gptlab.data.shards.streams import OPEN_FILES, LocalFolder, TokenStream
from gptlab.errors import UserError
from preparing import write_shards

LENGTHS = [0, 9, 1, 0, 0, 30, 2, 8, 17, 0, 5, 0]
PIECES = [np.random.default_rng(n).integers(0, 60_000, size=length) for n, length in enumerate(LENGTHS)]
TOKENS = np.concatenate(PIECES)


class Recorded(LocalFolder):
    """A folder that remembers what was asked of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened, self.expected = [], []

    def open(self, shard):
        self.opened.append((shard.file, super().open(shard)))
        return self.opened[-1][1]

    def expect(self, shards):
        self.expected.append([shard.file for shard in shards])

    def open_now(self) -> list[str]:
        return [name for name, file in self.opened if not file.closed]


def names(*numbers: int) -> list[str]:
    return [f"train_{number:06d}.bin" for number in numbers]


@pytest.mark.parametrize(("dtype", "header"), [("uint16", b""), ("uint32", b"seven.."), ("uint16", b"\xff" * 1024)])
@pytest.mark.parametrize("pieces", [PIECES, [TOKENS]], ids=["many", "one"])
def test_a_stream_reads_shards_as_one_array(tmp_path, pieces, dtype, header):
    high = TOKENS.max() + (2**31 if dtype == "uint32" else 0)  # a value that two bytes do not hold
    pieces = [np.where(piece == TOKENS.max(), high, piece) for piece in pieces]
    tokens = np.concatenate(pieces)
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, pieces, dtype=dtype, header=header), "train")
    assert len(stream) == len(tokens)
    for length in (1, 9, 31, len(tokens)):  # 31 tokens cross up to six borders
        rows = stream.read(np.arange(len(tokens) - length + 1), length)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(rows, np.lib.stride_tricks.sliding_window_view(tokens, length))
    np.testing.assert_array_equal(stream.read([40, 3], 20), [tokens[40:60], tokens[3:23]])
    for size in (7, len(tokens), 1000):
        expected = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        assert [chunk.tolist() for chunk in stream.chunks(size)] == [chunk.tolist() for chunk in expected]


def test_the_two_splits_are_two_streams(tmp_path):
    manifest = write_shards(tmp_path, [[1, 2], [3]], val=[[4], [5, 6]])
    for split, tokens in (("train", [1, 2, 3]), ("val", [4, 5, 6])):
        assert TokenStream(LocalFolder(tmp_path), manifest, split).read([0], 3).tolist() == [tokens]


def test_rows_that_are_not_inside_the_stream_are_refused(tmp_path):
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    last = len(TOKENS) - 5
    np.testing.assert_array_equal(stream.read([0, last], 5)[1], TOKENS[-5:])
    for starts in ([last + 1], [0, last + 1, 3], [-1, 4]):
        with pytest.raises(IndexError, match=rf"rows of 5 tokens from {min(starts)} to {max(starts)}, of 72 tokens"):
            stream.read(starts, 5)
    assert stream.read([], 5).shape == (0, 5)


def test_many_shards_are_read_with_few_open_files(tmp_path):
    number = OPEN_FILES + 40
    store = Recorded(tmp_path)
    stream = TokenStream(store, write_shards(tmp_path, np.arange(3 * number).reshape(number, 3)), "train")
    most = 0
    for start in np.random.default_rng(0).permutation(3 * number - 6).tolist():
        np.testing.assert_array_equal(stream.read([start], 7)[0], np.arange(start, start + 7))
        most = max(most, len(store.open_now()))
    assert most == OPEN_FILES


def test_the_file_that_was_not_read_for_longest_is_closed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "OPEN_FILES", 2)
    store = Recorded(tmp_path)
    stream = TokenStream(store, write_shards(tmp_path, [[0], [1], [2]]), "train")
    for start in (0, 1, 0, 2):
        stream.read([start], 1)
    assert [name for name, _ in store.opened] == names(0, 1, 2)
    assert store.open_now() == names(0, 2)


def test_a_shard_that_ends_early_is_named(tmp_path):
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    os.truncate(tmp_path / "train_000005.bin", 2 * 25 + 1)
    np.testing.assert_array_equal(stream.read([10], 25)[0], TOKENS[10:35])  # the first 25 of that shard
    with pytest.raises(UserError, match=r"^train_000005\.bin ends before its token 26\.$"):
        stream.read([30], 6)


def test_a_stream_travels_to_another_process_without_its_open_files(tmp_path):
    stream = TokenStream(Recorded(tmp_path), write_shards(tmp_path, PIECES), "train")
    stream.expect([(0, 40)])
    stream.read([0], 40)
    stream.store.opened = []  # it holds the files, too
    data = pickle.dumps(stream)
    assert PIECES[5].astype("<u2").tobytes() not in data
    there = pickle.loads(data)  # noqa: S301
    there.expect([(0, 40)])  # which another process has not heard of
    np.testing.assert_array_equal(there.read([7], 9)[0], TOKENS[7:16])
    assert there.store.opened[0][0] == "train_000001.bin"
    assert len(there.store.expected) == 2


def test_the_shards_of_ranges_are_those_that_hold_their_tokens(tmp_path):
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    owners = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    for start in range(len(TOKENS)):
        for stop in range(start + 1, len(TOKENS) + 1):
            held = set(owners[start:stop])
            assert [number for number in stream.within([(start, stop)]) if LENGTHS[number]] == sorted(held)
    assert stream.within([(40, 41), (0, 10), (39, 42)]) == [6, 1, 2, 5]


def test_files_that_are_no_longer_expected_are_closed_and_the_store_is_told_once(tmp_path):
    store = Recorded(tmp_path)
    stream = TokenStream(store, write_shards(tmp_path, [[n] * 4 for n in range(6)]), "train")
    stream.read([0, 4, 8], 4)
    for _ in range(2):
        stream.expect([(8, 16), (4, 5)])
    assert store.expected == [names(2, 3, 1)]
    assert store.open_now() == names(1, 2)
    assert stream.read([0], 4).tolist() == [[0] * 4]  # all can still be read
    stream.expect([(20, 24)])
    assert store.open_now() == []


MEMORY = """
import json, sys
from pathlib import Path

import numpy as np

from gptlab.data.order import WindowOrder
from gptlab.data.shards.manifest import Manifest, Shard
from gptlab.data.shards.streams import LocalFolder, TokenStream


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


path, tokens = Path(sys.argv[1]), int(sys.argv[2])
shard = Shard(file=path.name, tokens=tokens, bytes=tokens, documents=1, sha256="")
splits = {"train": [shard], "val": []}
manifest = Manifest(format=1, origin="", tokenizer={}, vocab_size=257, dtype="uint16", splits=splits)
found = [resident()]
order = WindowOrder([tokens], 1024, 1, "data", "shuffled", 1, None)
stream = TokenStream(LocalFolder(path.parent), manifest, "train")
found.append(resident())
for batch in range(2000):
    if batch == 100:
        found.append(resident())
    stream.read(order.starts(np.arange(12 * batch, 12 * batch + 12)), 1025)
print(json.dumps([*found, resident()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to read the memory in")
def test_reading_ten_billion_tokens_takes_no_more_memory_with_time(tmp_path):
    path, tokens = tmp_path / "train.bin", 10**10
    path.touch()
    try:
        os.truncate(path, 2 * tokens)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of 20 GB: {error}")
    if path.stat().st_blocks * 512 > 10**6:
        pytest.skip("this file system has no sparse files")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path), str(tokens)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, built, early, late = json.loads(done.stdout)  # MB
    assert built - before < 3
    assert late - early < 3
    assert late < 300
