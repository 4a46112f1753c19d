"""Token streams compared with the concatenated array, and the memory and files that reading needs."""

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


class RecordingFolder(LocalFolder):
    """LocalFolder that records the opened and expected shards."""

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
def test_stream_reads_shards_as_one_array(tmp_path, pieces, dtype, header):
    high = TOKENS.max() + (2**31 if dtype == "uint32" else 0)  # does not fit into uint16
    pieces = [np.where(piece == TOKENS.max(), high, piece) for piece in pieces]
    tokens = np.concatenate(pieces)
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, pieces, dtype=dtype, header=header), "train")
    assert len(stream) == len(tokens)
    for length in (1, 9, 31, len(tokens)):  # 31 tokens span up to six shard boundaries
        rows = stream.read(np.arange(len(tokens) - length + 1), length)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(rows, np.lib.stride_tricks.sliding_window_view(tokens, length))
    np.testing.assert_array_equal(stream.read([40, 3], 20), [tokens[40:60], tokens[3:23]])
    for size in (7, len(tokens), 1000):
        expected = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        assert [chunk.tolist() for chunk in stream.chunks(size)] == [chunk.tolist() for chunk in expected]


def test_splits_are_separate_streams(tmp_path):
    manifest = write_shards(tmp_path, [[1, 2], [3]], val=[[4], [5, 6]])
    for split, tokens in (("train", [1, 2, 3]), ("val", [4, 5, 6])):
        assert TokenStream(LocalFolder(tmp_path), manifest, split).read([0], 3).tolist() == [tokens]


def test_rows_outside_the_stream_raise(tmp_path):
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    last = len(TOKENS) - 5
    np.testing.assert_array_equal(stream.read([0, last], 5)[1], TOKENS[-5:])
    for starts in ([last + 1], [0, last + 1, 3], [-1, 4]):
        with pytest.raises(
            IndexError, match=rf"rows of 5 tokens with starts {min(starts)} to {max(starts)} .* 72 tokens"
        ):
            stream.read(starts, 5)
    assert stream.read([], 5).shape == (0, 5)


def test_number_of_open_files_is_limited(tmp_path):
    number = OPEN_FILES + 40
    store = RecordingFolder(tmp_path)
    stream = TokenStream(store, write_shards(tmp_path, np.arange(3 * number).reshape(number, 3)), "train")
    most = 0
    for start in np.random.default_rng(0).permutation(3 * number - 6).tolist():
        np.testing.assert_array_equal(stream.read([start], 7)[0], np.arange(start, start + 7))
        most = max(most, len(store.open_now()))
    assert most == OPEN_FILES


def test_least_recently_used_file_is_closed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "OPEN_FILES", 2)
    store = RecordingFolder(tmp_path)
    stream = TokenStream(store, write_shards(tmp_path, [[0], [1], [2]]), "train")
    for start in (0, 1, 0, 2):
        stream.read([start], 1)
    assert [name for name, _ in store.opened] == names(0, 1, 2)
    assert store.open_now() == names(0, 2)


def test_truncated_shard_is_reported_when_read(tmp_path):
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    os.truncate(tmp_path / "train_000005.bin", 2 * 25 + 1)
    np.testing.assert_array_equal(stream.read([10], 25)[0], TOKENS[10:35])  # the first 25 of that shard
    with pytest.raises(UserError, match=r"^train_000005\.bin is truncated before token 26\.$"):
        stream.read([30], 6)


def test_pickled_stream_omits_open_files(tmp_path):
    stream = TokenStream(RecordingFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    stream.expect([(0, 40)])
    stream.read([0], 40)
    stream.store.opened = []  # it also holds the open files
    data = pickle.dumps(stream)
    assert PIECES[5].astype("<u2").tobytes() not in data
    unpickled = pickle.loads(data)  # noqa: S301
    unpickled.expect([(0, 40)])  # announced again in another process
    np.testing.assert_array_equal(unpickled.read([7], 9)[0], TOKENS[7:16])
    assert unpickled.store.opened[0][0] == "train_000001.bin"
    assert len(unpickled.store.expected) == 2


def test_within_returns_the_shards_that_hold_the_ranges(tmp_path):
    stream = TokenStream(LocalFolder(tmp_path), write_shards(tmp_path, PIECES), "train")
    owners = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    for start in range(len(TOKENS)):
        for stop in range(start + 1, len(TOKENS) + 1):
            held = set(owners[start:stop])
            assert [number for number in stream.within([(start, stop)]) if LENGTHS[number]] == sorted(held)
    assert stream.within([(40, 41), (0, 10), (39, 42)]) == [6, 1, 2, 5]


def test_unexpected_files_are_closed_and_the_store_is_notified_once(tmp_path):
    store = RecordingFolder(tmp_path)
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which does not exist")
def test_memory_is_constant_when_reading_ten_billion_tokens(tmp_path):
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
