"""Remote shards compared with their origin: caching, verification, retries, cache limit and prefetching."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from gptlab.data.batches import RankSlice, TrainBatches
from gptlab.data.order import WindowOrder
from gptlab.data.prepare.prepare import prepare
from gptlab.data.shards import remote
from gptlab.data.shards.remote import RemoteFolder
from gptlab.data.shards.streams import LocalFolder, TokenStream
from gptlab.data.shards.token_dataset import TokenDataset, verify_shards
from gptlab.errors import UserError
from preparing import DiskEvents, data_config, tokenizer_config, write_shards
from serving import read_all, served

EACH = 4000  # tokens per shard
SIZE = 2 * EACH  # bytes per shard
PIECES = [np.random.default_rng(n).integers(0, 257, size=EACH) for n in range(8)]
VAL = [np.random.default_rng(9).integers(0, 257, size=500)]
ROOM = 100 * SIZE


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.02)


@pytest.fixture
def origin(tmp_path) -> Path:
    write_shards(tmp_path / "origin", PIECES, val=VAL)
    return tmp_path / "origin"


@pytest.fixture
def server(origin):
    with served(origin) as server:
        yield server


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def name(number: int) -> str:
    return f"train_{number:06d}.bin"


def stream_of(store: RemoteFolder) -> TokenStream:
    return TokenStream(store, store.manifest, "train")


def files(store: RemoteFolder) -> dict[str, int]:
    """Returns the sizes of the shard files, including unfinished ones."""
    found = {}
    for path in store.folder.glob("*.bin*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:  # deleted or renamed in the meantime
            continue
    return found


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {seconds} s"
        time.sleep(0.005)


@contextmanager
def calling_repeatedly(function) -> Iterator[None]:
    """Calls ``function`` repeatedly in another thread."""
    stop = threading.Event()

    def repeat():
        while not stop.is_set():
            function()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def check_tokens(store: RemoteFolder) -> None:
    whole = np.concatenate(PIECES)
    stream = stream_of(store)
    np.testing.assert_array_equal(stream.read([0], len(whole))[0], whole)
    np.testing.assert_array_equal(stream.read([EACH - 3, 0], 9), [whole[EACH - 3 : EACH + 6], whole[:9]])


# --- downloading


@pytest.mark.parametrize("protocol", ["http", "file"])
def test_remote_shards_are_identical_to_the_origin(origin, server, cache, protocol):
    url = server.url if protocol == "http" else origin.as_uri()
    tokenizer = tokenizer_config("bytes")
    prepared = prepare(data_config(corpus="shards", path=f"{url}/", cache_dir=str(cache)), tokenizer)
    assert isinstance(prepared, TokenDataset)
    assert prepared.manifest == TokenDataset(LocalFolder(origin), prepared.manifest, prepared.tokenizer).manifest
    check_tokens(prepared.store)
    assert verify_shards(prepared.store, prepared.manifest) == 9
    kept = {path.name: path.read_bytes() for path in prepared.folder.glob("*.bin")}
    assert kept == {path.name: path.read_bytes() for path in origin.glob("*.bin")}
    if protocol == "http":
        assert server.requests == dict.fromkeys(["manifest.json", *kept], 1)


def test_cached_shards_are_not_downloaded_again(server, cache):
    for _ in range(2):
        check_tokens(RemoteFolder(server.url, cache, ROOM))
    assert server.requests == {"manifest.json": 2} | {name(n): 1 for n in range(8)}


def test_downloaded_shard_is_synced_before_it_is_renamed(server, cache, monkeypatch):
    events = DiskEvents(monkeypatch)
    store = RemoteFolder(server.url, cache, ROOM)
    with store.open(store.manifest.splits["train"][0]) as file:
        assert events.of(os.fstat(file.fileno())) == [("synced", SIZE), ("renamed", SIZE)]


def test_header_of_a_shard_is_neither_read_nor_hashed(tmp_path, cache):
    write_shards(tmp_path / "headed", PIECES, dtype="uint32", header=b"\x07" * 1024)
    with served(tmp_path / "headed") as server:
        store = RemoteFolder(server.url, cache, ROOM)
        check_tokens(store)
    assert files(store)[name(0)] == 1024 + 4 * EACH


def test_shards_with_same_fingerprint_but_other_files_are_cached_separately(tmp_path, origin, cache):
    check_tokens(RemoteFolder(origin.as_uri(), cache, ROOM))
    other = tmp_path / "other"
    write_shards(other, [PIECES[1], PIECES[0], *PIECES[2:]], val=VAL)  # swaps the tokens of files 0 and 1
    written = json.loads((other / "manifest.json").read_text())
    train = written["splits"]["train"]
    train[0], train[1] = train[1], train[0]  # the stream stays the same
    (other / "manifest.json").write_text(json.dumps(written))
    store = RemoteFolder(other.as_uri(), cache, ROOM)
    assert store.manifest.fingerprint() == RemoteFolder(origin.as_uri(), cache, ROOM).manifest.fingerprint()
    check_tokens(store)


def test_remote_folder_can_be_pickled(server, cache):
    store = RemoteFolder(server.url, cache, ROOM)
    store.expect([])
    unpickled = pickle.loads(pickle.dumps(store))  # noqa: S301
    unpickled.expect(store.manifest.splits["val"])
    wait_for(lambda: set(files(unpickled)) == {"val_000000.bin"})
    check_tokens(unpickled)


# --- errors and retries


@pytest.mark.parametrize("fault", [503, 429, "cut", "short", "wrong", "other"])
def test_damaged_download_is_retried_and_logged(server, cache, caplog, fault):
    server.faults[name(3)] = iter([fault] * (1 if fault == "wrong" else 3))
    server.faults["manifest.json"] = iter([fault] if fault in (503, "cut") else [])
    store = RemoteFolder(server.url, cache, ROOM)
    check_tokens(store)
    failures = 1 if fault == "wrong" else 3
    assert server.requests[name(3)] == failures + 1
    warnings = [record.getMessage() for record in caplog.records if f"/{name(3)}: " in record.getMessage()]
    assert [re.search(r"attempt (\d) of 8\) in 0 s\.$", line)[1] for line in warnings] == [
        str(n + 2) for n in range(failures)
    ]
    if fault in ("wrong", "other"):
        assert f"not {store.manifest.splits['train'][3].sha256}" in warnings[0]
    assert set(files(store)) == {name(n) for n in range(8)}


def test_shard_with_wrong_hash_is_never_used(server, cache):
    server.faults[name(3)] = itertools.repeat("wrong")
    store = RemoteFolder(server.url, cache, ROOM)
    stream = stream_of(store)
    stream.read([0], 3 * EACH)
    shard = store.manifest.splits["train"][3]
    data = bytearray((server.folder / name(3)).read_bytes())
    data[-1] ^= 1
    found = hashlib.sha256(data).hexdigest()
    message = f"{name(3)} could not be downloaded: the downloaded file has the SHA-256 {found}, not {shard.sha256}."
    seen = set()
    with calling_repeatedly(lambda: seen.update(files(store))):
        for _ in range(2):
            with pytest.raises(UserError, match=f"{re.escape(message)}$"):
                stream.read([3 * EACH - 1], 2)
    assert server.requests[name(3)] == 4  # the same wrong hash twice is not retried
    assert name(3) not in seen
    assert set(files(store)) == {name(n) for n in range(3)}


@pytest.mark.parametrize("status", [404, 403, 401])
@pytest.mark.parametrize("file", ["manifest.json", name(0)])
def test_permanent_http_error_is_not_retried(server, cache, status, file):
    server.faults[file] = itertools.repeat(status)
    message = "does not exist" if status == 404 else rf"could not be downloaded: .*{status}"
    with pytest.raises(UserError, match=rf"^{server.url}/{file} {message}"):
        stream_of(RemoteFolder(server.url, cache, ROOM)).read([0], 1)
    assert server.requests[file] == 1


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_unreachable_server_raises_after_max_attempts(cache, monkeypatch, caplog):
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 3)
    url = f"http://127.0.0.1:{free_port()}/data"
    with pytest.raises(UserError, match=rf"^{url}/manifest\.json could not be downloaded: Cannot connect"):
        RemoteFolder(url, cache, ROOM)
    assert [re.search(r"attempt \d of \d", record.getMessage())[0] for record in caplog.records] == [
        "attempt 2 of 3",
        "attempt 3 of 3",
    ]


def test_unsupported_protocol_is_not_retried(cache, caplog):
    with pytest.raises(
        UserError, match=r"^nosuch://x/manifest\.json could not be downloaded: Protocol not known: nosuch"
    ):
        RemoteFolder("nosuch://x", cache, ROOM)
    with pytest.raises(UserError, match=r"^s3://bucket/x/manifest\.json could not be downloaded: Install s3fs"):
        RemoteFolder("s3://bucket/x", cache, ROOM)
    assert not caplog.records


@pytest.mark.parametrize("content", [b"<html>", b"{}", b"\xff\xfe\x00"])
def test_invalid_remote_manifest_is_reported(origin, cache, content):
    (origin / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{origin.as_uri()} does not contain prepared data: .*not a manifest"):
        RemoteFolder(origin.as_uri(), cache, ROOM)


# --- rejected URLs and manifests


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1/x",
        "https://hunter2@127.0.0.1/x",
        "s3://key:hunter2@bucket/x",
        "https://127.0.0.1/x?signature=hunter2",
        "simplecache::http://user:hunter2@127.0.0.1/x",
        "http://[hunter2/x",
    ],
)
def test_url_with_a_password_raises_without_repeating_it(cache, url):
    with pytest.raises(UserError, match=r"^data\.path") as error:
        RemoteFolder(url, cache, ROOM)
    assert "hunter2" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert not cache.exists()


@pytest.mark.parametrize("file", ["../../x.bin", "{tmp}/x.bin", "a/x.bin", "manifest.json", ".."])
def test_manifest_that_names_files_in_other_directories_raises(origin, cache, tmp_path, file):
    file = file.format(tmp=tmp_path)
    written = (origin / "manifest.json").read_text().replace(name(3), file)
    (origin / "manifest.json").write_text(written)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"manifest\.json names {re.escape(file)}, which is not in the same directory"):
        RemoteFolder(origin.as_uri(), cache, ROOM)
    assert set(tmp_path.rglob("*")) == before


# --- cache limit


def test_check_room_raises_if_shards_exceed_the_limit(server, cache):
    store = RemoteFolder(server.url, cache, 3 * SIZE)
    shards = store.manifest.splits["train"]
    store.check_room([*shards[:3], shards[1]])  # a shard that is listed twice counts once
    with pytest.raises(
        UserError, match=rf"^data\.cache_limit_gb=2\.4e-05 is less than the 3\.2e-05 GB of {server.url}"
    ):
        store.check_room(shards[:4])


def block_order(block_size: int = 50) -> WindowOrder:
    return WindowOrder([EACH] * 8, block_size, 1, "data", "block", 2, None)


def test_cache_never_exceeds_its_limit_over_epochs_of_blocks(origin, server, cache):
    order, limit = block_order(), 4 * SIZE  # two blocks of two shards
    store = RemoteFolder(server.url, cache, limit)
    local = TokenStream(LocalFolder(origin), store.manifest, "train")
    batches, expected = (TrainBatches(stream, order, RankSlice(0, 1, 13)) for stream in (stream_of(store), local))
    taken = []
    with calling_repeatedly(lambda: taken.append(sum(files(store).values()))):
        for number in range(2 * order.windows // 13):
            assert batches[number].idx.equal(expected[number].idx)
            taken.append(sum(files(store).values()))
    assert max(taken) == limit
    fetched = [server.requests[name(n)] for n in range(8)]
    assert min(fetched) >= 1
    assert sum(fetched) > 8  # evicted shards were downloaded again


def test_evicted_open_shard_stays_readable_and_is_downloaded_again_when_reopened(server, cache):
    store = RemoteFolder(server.url, cache, SIZE)
    first, second = store.manifest.splits["train"][:2]
    with store.open(first) as file:
        store.open(second).close()
        assert set(files(store)) == {second.file}
        assert file.read() == (server.folder / first.file).read_bytes()
    store.open(first).close()
    assert set(files(store)) == {first.file}
    assert server.requests[first.file] == 2


def test_least_recently_used_shard_is_evicted(server, cache):
    store = RemoteFolder(server.url, cache, 3 * SIZE)
    for number in (0, 1, 2, 0, 3):
        store.open(store.manifest.splits["train"][number]).close()
        time.sleep(0.01)  # file timestamps have a coarse resolution
    assert set(files(store)) == {name(0), name(2), name(3)}


def test_concurrent_downloads_reserve_space(server, cache):
    store = RemoteFolder(server.url, cache, 2 * SIZE)
    shards = store.manifest.splits["train"]
    store.open(shards[0]).close()
    server.held = {name(1), name(2)}
    with ThreadPoolExecutor(2) as threads:
        opened = [threads.submit(store.open, shard) for shard in shards[1:3]]
        wait_for(lambda: server.requests[name(1)] + server.requests[name(2)] == 2)
        server.gate.set()
        for one in opened:
            one.result().close()
    assert set(files(store)) == {name(1), name(2)}


# --- several processes


def test_concurrent_processes_download_each_shard_once(server, cache):
    spawn = multiprocessing.get_context("spawn")
    together, results = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=read_all, args=(server.url, cache, together, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [hashlib.sha256(np.concatenate(PIECES).astype(np.int64).tobytes()).hexdigest()] * 4
    assert server.requests == {"manifest.json": 4} | {name(n): 1 for n in range(8)}


def _open_one(url, cache):
    store = RemoteFolder(url, cache, ROOM)
    store.open(store.manifest.splits["train"][0])


def test_files_of_a_killed_process_are_deleted(server, cache):
    server.held = {name(0)}
    process = multiprocessing.get_context("fork").Process(target=_open_one, args=(server.url, cache))
    process.start()
    store = RemoteFolder(server.url, cache, ROOM)
    wait_for(lambda: server.requests[name(0)])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (unfinished,) = store.folder.glob(".train*")
    assert unfinished.name.startswith(f".{name(0)}.")
    server.gate.set()
    check_tokens(store)
    assert not list(store.folder.glob(".train*"))
    assert server.requests[name(0)] == 2


# --- prefetching


def sequence_of(order: WindowOrder) -> list[int]:
    """Returns the shards of the first epoch in order of use."""
    return list(dict.fromkeys((order.starts(np.arange(order.windows)) // EACH).tolist()))


def test_next_shards_are_prefetched(server, cache):
    order = block_order()
    store = RemoteFolder(server.url, cache, ROOM)
    TrainBatches(stream_of(store), order, RankSlice(0, 1, 1))[0]
    ahead = {name(n) for n in sequence_of(order)[:4]}
    wait_for(lambda: set(files(store)) == ahead)
    assert set(server.requests) == {"manifest.json", *ahead}


def test_worker_process_prefetches(server, cache):
    order = block_order()
    store = RemoteFolder(server.url, cache, ROOM)
    store.expect([])  # starts a thread, which a worker process does not inherit
    batches = TrainBatches(stream_of(store), order, RankSlice(0, 1, 1))
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(3), num_workers=1))
    next(loader)
    wait_for(lambda: set(files(store)) == {name(n) for n in sequence_of(order)[:4]})


def test_prefetching_switches_to_the_latest_expected_shards(server, cache):
    store = RemoteFolder(server.url, cache, ROOM)
    shards = store.manifest.splits["train"]
    server.held = {name(0)}
    store.expect(shards[:4])
    wait_for(lambda: server.requests[name(0)])
    store.expect(shards[6:])
    server.gate.set()
    wait_for(lambda: set(files(store)) == {name(0), name(6), name(7)})
    assert set(server.requests) == {"manifest.json", name(0), name(6), name(7)}


def test_failed_prefetch_is_logged_and_retried_when_read(server, cache, caplog):
    store = RemoteFolder(server.url, cache, ROOM)
    server.faults[name(0)] = iter([404])
    store.expect(store.manifest.splits["train"][:2])
    wait_for(lambda: name(1) in files(store))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"Prefetching failed: {server.url}/{name(0)} does not exist."
    ]
    check_tokens(store)


# --- token files of other programs


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Token files in nanoGPT's format."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for split, ids in (("train", PIECES[0]), ("val", VAL[0])):
        (folder / f"{split}.bin").write_bytes(ids.astype("<u2").tobytes())
    (folder / "readme.md").write_text("no tokens")
    return folder


def opened(pattern: str, cache: Path) -> TokenDataset:
    config = data_config(corpus="shards", path=pattern, cache_dir=str(cache))
    return prepare(config, tokenizer_config("bytes"))


def test_token_files_of_other_programs_are_downloaded_once(theirs, cache):
    first = opened(f"file://{theirs}/*.bin", cache)
    assert first.stream("train").read([0], EACH)[0].tolist() == PIECES[0].tolist()
    assert first.stream("val").read([0], 500)[0].tolist() == VAL[0].tolist()
    (folder,) = cache.glob("files-*/")
    assert sorted(path.name for path in folder.iterdir()) == ["train.bin", "val.bin"]
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    assert opened(f"file://{theirs}/*.bin", cache).manifest == first.manifest
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before


def test_truncated_token_file_is_downloaded_again(theirs, cache, monkeypatch, caplog):
    from fsspec.implementations.local import LocalFileSystem

    asked = []

    def get_file(self, remote_path, path, get=LocalFileSystem.get_file):
        get(self, remote_path, path)
        asked.append(Path(remote_path).name)
        if asked.count("train.bin") == 1:
            os.truncate(path, SIZE - 2)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    prepared = opened(f"file://{theirs}/*.bin", cache)
    assert prepared.manifest.tokens("train") == EACH
    assert asked == ["train.bin", "train.bin", "val.bin"]
    assert "received 7,998 of 8,000 bytes" in caplog.text


def test_url_with_wildcards_that_matches_nothing_raises(theirs, cache):
    with pytest.raises(UserError, match=r"data\.path=file://.*\*\.npy matches nothing"):
        opened(f"file://{theirs}/*.npy", cache)
