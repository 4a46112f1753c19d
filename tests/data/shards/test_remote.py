"""Shards behind a URL: fetched once, checked, fetched again, kept to a size; against the folder they come from."""

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

EACH = 4000  # tokens of a shard
SIZE = 2 * EACH  # its bytes
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
    """Sizes of the shards there are, unfinished ones too."""
    found = {}
    for path in store.folder.glob("*.bin*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:  # just removed, or just renamed
            continue
    return found


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@contextmanager
def again_and_again(look) -> Iterator[None]:
    """Look from another thread, all the time."""
    stop = threading.Event()

    def repeat():
        while not stop.is_set():
            look()

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


# --- what is fetched


@pytest.mark.parametrize("protocol", ["http", "file"])
def test_shards_behind_a_url_are_the_shards_of_the_folder(origin, server, cache, protocol):
    url = server.url if protocol == "http" else origin.as_uri()
    tokenizer = tokenizer_config("bytes")
    prepared = prepare(data_config(corpus="shards", path=f"{url}/", cache_dir=str(cache)), tokenizer)
    assert isinstance(prepared, TokenDataset)
    assert prepared.manifest == TokenDataset(LocalFolder(origin), prepared.manifest, prepared.tokenizer).manifest
    check_tokens(prepared.store)
    assert verify_shards(prepared.store, prepared.manifest.shards()) == 9
    kept = {path.name: path.read_bytes() for path in prepared.folder.glob("*.bin")}
    assert kept == {path.name: path.read_bytes() for path in origin.glob("*.bin")}
    if protocol == "http":
        assert server.requests == dict.fromkeys(["manifest.json", *kept], 1)


def test_what_is_there_is_not_fetched_again(server, cache):
    for _ in range(2):
        check_tokens(RemoteFolder(server.url, cache, ROOM))
    assert server.requests == {"manifest.json": 2} | {name(n): 1 for n in range(8)}


def test_a_fetched_shard_is_whole_and_on_the_disk_before_it_has_its_name(server, cache, monkeypatch):
    events = DiskEvents(monkeypatch)
    store = RemoteFolder(server.url, cache, ROOM)
    with store.open(store.manifest.splits["train"][0]) as file:
        assert events.of(os.fstat(file.fileno())) == [("synced", SIZE), ("renamed", SIZE)]


def test_shards_with_a_header_are_read_behind_it_and_hashed_without_it(tmp_path, cache):
    write_shards(tmp_path / "headed", PIECES, dtype="uint32", header=b"\x07" * 1024)
    with served(tmp_path / "headed") as server:
        store = RemoteFolder(server.url, cache, ROOM)
        check_tokens(store)
    assert files(store)[name(0)] == 1024 + 4 * EACH


def test_shards_of_the_same_names_and_tokens_in_other_files_are_kept_apart(tmp_path, origin, cache):
    check_tokens(RemoteFolder(origin.as_uri(), cache, ROOM))
    other = tmp_path / "other"
    write_shards(other, [PIECES[1], PIECES[0], *PIECES[2:]], val=VAL)  # so the files 0 and 1 hold each other's tokens
    written = json.loads((other / "manifest.json").read_text())
    train = written["splits"]["train"]
    train[0], train[1] = train[1], train[0]  # and the stream is the same
    (other / "manifest.json").write_text(json.dumps(written))
    store = RemoteFolder(other.as_uri(), cache, ROOM)
    assert store.manifest.fingerprint() == RemoteFolder(origin.as_uri(), cache, ROOM).manifest.fingerprint()
    check_tokens(store)


def test_a_remote_folder_travels_to_another_process(server, cache):
    store = RemoteFolder(server.url, cache, ROOM)
    store.expect([])
    there = pickle.loads(pickle.dumps(store))  # noqa: S301
    there.expect(store.manifest.splits["val"])
    wait_for(lambda: set(files(there)) == {"val_000000.bin"})
    check_tokens(there)


# --- what goes wrong on the way


@pytest.mark.parametrize("fault", [503, 429, "cut", "short", "wrong", "other"])
def test_what_comes_broken_is_fetched_again_and_told(server, cache, caplog, fault):
    server.faults[name(3)] = iter([fault] * (1 if fault == "wrong" else 3))
    server.faults["manifest.json"] = iter([fault] if fault in (503, "cut") else [])
    store = RemoteFolder(server.url, cache, ROOM)
    check_tokens(store)
    failures = 1 if fault == "wrong" else 3
    assert server.requests[name(3)] == failures + 1
    told = [record.getMessage() for record in caplog.records if f"/{name(3)}: " in record.getMessage()]
    assert [re.search(r"Attempt (\d) of 8 in 0 s\.$", line)[1] for line in told] == [
        str(n + 2) for n in range(failures)
    ]
    if fault in ("wrong", "other"):
        assert f"not {store.manifest.splits['train'][3].sha256}" in told[0]
    assert set(files(store)) == {name(n) for n in range(8)}


def test_a_shard_that_is_another_one_there_is_never_used(server, cache):
    server.faults[name(3)] = itertools.repeat("wrong")
    store = RemoteFolder(server.url, cache, ROOM)
    stream = stream_of(store)
    stream.read([0], 3 * EACH)
    shard = store.manifest.splits["train"][3]
    data = bytearray((server.folder / name(3)).read_bytes())
    data[-1] ^= 1
    found = hashlib.sha256(data).hexdigest()
    sentence = f"{name(3)} could not be fetched: what came has the SHA-256 {found}, not {shard.sha256}."
    seen = set()
    with again_and_again(lambda: seen.update(files(store))):
        for _ in range(2):
            with pytest.raises(UserError, match=f"{re.escape(sentence)}$"):
                stream.read([3 * EACH - 1], 2)
    assert server.requests[name(3)] == 4  # twice the same is no accident
    assert name(3) not in seen
    assert set(files(store)) == {name(n) for n in range(3)}


@pytest.mark.parametrize("status", [404, 403, 401])
@pytest.mark.parametrize("file", ["manifest.json", name(0)])
def test_an_answer_that_will_not_change_is_told_at_once(server, cache, status, file):
    server.faults[file] = itertools.repeat(status)
    said = "is not there" if status == 404 else rf"could not be fetched: .*{status}"
    with pytest.raises(UserError, match=rf"^{server.url}/{file} {said}"):
        stream_of(RemoteFolder(server.url, cache, ROOM)).read([0], 1)
    assert server.requests[file] == 1


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_server_that_is_not_there_is_given_up_after_the_attempts(cache, monkeypatch, caplog):
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 3)
    url = f"http://127.0.0.1:{free_port()}/data"
    with pytest.raises(UserError, match=rf"^{url}/manifest\.json could not be fetched: Cannot connect"):
        RemoteFolder(url, cache, ROOM)
    assert [re.search(r"Attempt \d of \d", record.getMessage())[0] for record in caplog.records] == [
        "Attempt 2 of 3",
        "Attempt 3 of 3",
    ]


def test_a_protocol_that_nothing_opens_is_told_at_once(cache, caplog):
    with pytest.raises(UserError, match=r"^nosuch://x/manifest\.json could not be fetched: Protocol not known: nosuch"):
        RemoteFolder("nosuch://x", cache, ROOM)
    with pytest.raises(UserError, match=r"^s3://bucket/x/manifest\.json could not be fetched: Install s3fs"):
        RemoteFolder("s3://bucket/x", cache, ROOM)
    assert not caplog.records


@pytest.mark.parametrize("content", [b"<html>", b"{}", b"\xff\xfe\x00"])
def test_a_page_in_the_place_of_the_manifest_is_told(origin, cache, content):
    (origin / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^What {origin.as_uri()} has is no prepared data: .*not a manifest"):
        RemoteFolder(origin.as_uri(), cache, ROOM)


# --- what is refused


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
def test_a_url_with_a_password_is_refused_and_not_repeated(cache, url):
    with pytest.raises(UserError, match=r"^data\.path=") as told:
        RemoteFolder(url, cache, ROOM)
    assert "hunter2" not in str(told.value)
    assert told.value.__suppress_context__ or told.value.__context__ is None
    assert not cache.exists()


@pytest.mark.parametrize("file", ["../../x.bin", "{tmp}/x.bin", "a/x.bin", "manifest.json", ".."])
def test_a_manifest_that_names_files_elsewhere_is_refused(origin, cache, tmp_path, file):
    file = file.format(tmp=tmp_path)
    written = (origin / "manifest.json").read_text().replace(name(3), file)
    (origin / "manifest.json").write_text(written)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"manifest\.json names {re.escape(file)}, which does not lie beside it"):
        RemoteFolder(origin.as_uri(), cache, ROOM)
    assert set(tmp_path.rglob("*")) == before


# --- the room


def test_shards_that_do_not_fit_together_are_refused(server, cache):
    store = RemoteFolder(server.url, cache, 3 * SIZE)
    shards = store.manifest.splits["train"]
    store.check_room([*shards[:3], shards[1]])  # one that is used twice takes its room once
    with pytest.raises(
        UserError, match=rf"^data\.cache_limit_gb=2\.4e-05 is less than the 3\.2e-05 GB of {server.url}"
    ):
        store.check_room(shards[:4])


def block_order(block_size: int = 50) -> WindowOrder:
    return WindowOrder([EACH] * 8, block_size, 1, "data", "block", 2, None)


def test_over_epochs_of_blocks_the_folder_keeps_to_its_limit(origin, server, cache):
    order, limit = block_order(), 4 * SIZE  # two blocks of two shards
    store = RemoteFolder(server.url, cache, limit)
    local = TokenStream(LocalFolder(origin), store.manifest, "train")
    batches, expected = (TrainBatches(stream, order, RankSlice(0, 1, 13)) for stream in (stream_of(store), local))
    taken = []
    with again_and_again(lambda: taken.append(sum(files(store).values()))):
        for number in range(2 * order.windows // 13):
            assert batches[number].idx.equal(expected[number].idx)
            taken.append(sum(files(store).values()))
    assert max(taken) == limit
    fetched = [server.requests[name(n)] for n in range(8)]
    assert min(fetched) >= 1
    assert sum(fetched) > 8  # what was removed came again


def test_what_is_removed_while_it_is_open_is_read_on_and_fetched_when_it_is_opened_again(server, cache):
    store = RemoteFolder(server.url, cache, SIZE)
    first, second = store.manifest.splits["train"][:2]
    with store.open(first) as file:
        store.open(second).close()
        assert set(files(store)) == {second.file}
        assert file.read() == (server.folder / first.file).read_bytes()
    store.open(first).close()
    assert set(files(store)) == {first.file}
    assert server.requests[first.file] == 2


def test_the_shard_that_was_not_used_for_longest_makes_room(server, cache):
    store = RemoteFolder(server.url, cache, 3 * SIZE)
    for number in (0, 1, 2, 0, 3):
        store.open(store.manifest.splits["train"][number]).close()
        time.sleep(0.01)  # the clock of the file system is coarse
    assert set(files(store)) == {name(0), name(2), name(3)}


def test_those_who_fetch_at_the_same_time_leave_room_for_each_other(server, cache):
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


def test_processes_that_ask_at_the_same_time_fetch_each_shard_once(server, cache):
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


def test_what_a_killed_process_left_is_cleared_away(server, cache):
    server.held = {name(0)}
    process = multiprocessing.get_context("fork").Process(target=_open_one, args=(server.url, cache))
    process.start()
    store = RemoteFolder(server.url, cache, ROOM)
    wait_for(lambda: server.requests[name(0)])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [path.name for path in store.folder.glob(".train*")] == [f".{name(0)}.{process.pid}"]
    server.gate.set()
    check_tokens(store)
    assert not list(store.folder.glob(".train*"))
    assert server.requests[name(0)] == 2


# --- ahead


def sequence_of(order: WindowOrder) -> list[int]:
    """The epoch's shards, in the sequence of their blocks."""
    return list(dict.fromkeys((order.starts(np.arange(order.windows)) // EACH).tolist()))


def test_the_next_shards_are_there_before_they_are_read(server, cache):
    order = block_order()
    store = RemoteFolder(server.url, cache, ROOM)
    TrainBatches(stream_of(store), order, RankSlice(0, 1, 1))[0]
    ahead = {name(n) for n in sequence_of(order)[:4]}
    wait_for(lambda: set(files(store)) == ahead)
    assert set(server.requests) == {"manifest.json", *ahead}


def test_a_worker_process_fetches_ahead(server, cache):
    order = block_order()
    store = RemoteFolder(server.url, cache, ROOM)
    store.expect([])  # a thread of this process, which does not come along
    batches = TrainBatches(stream_of(store), order, RankSlice(0, 1, 1))
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(3), num_workers=1))
    next(loader)
    wait_for(lambda: set(files(store)) == {name(n) for n in sequence_of(order)[:4]})


def test_fetching_ahead_turns_to_what_is_expected_now(server, cache):
    store = RemoteFolder(server.url, cache, ROOM)
    shards = store.manifest.splits["train"]
    server.held = {name(0)}
    store.expect(shards[:4])
    wait_for(lambda: server.requests[name(0)])
    store.expect(shards[6:])
    server.gate.set()
    wait_for(lambda: set(files(store)) == {name(0), name(6), name(7)})
    assert set(server.requests) == {"manifest.json", name(0), name(6), name(7)}


def test_what_could_not_be_fetched_ahead_is_told_and_fetched_when_it_is_read(server, cache, caplog):
    store = RemoteFolder(server.url, cache, ROOM)
    server.faults[name(0)] = iter([404])
    store.expect(store.manifest.splits["train"][:2])
    wait_for(lambda: name(1) in files(store))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"Not fetched ahead: {server.url}/{name(0)} is not there."
    ]
    check_tokens(store)


# --- token files of others


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Files as nanoGPT writes them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for split, ids in (("train", PIECES[0]), ("val", VAL[0])):
        (folder / f"{split}.bin").write_bytes(ids.astype("<u2").tobytes())
    (folder / "readme.md").write_text("no tokens")
    return folder


def opened(pattern: str, cache: Path) -> TokenDataset:
    config = data_config(corpus="shards", path=pattern, cache_dir=str(cache))
    return prepare(config, tokenizer_config("bytes"))


def test_token_files_of_others_are_fetched_whole_and_once(theirs, cache):
    first = opened(f"file://{theirs}/*.bin", cache)
    assert first.stream("train").read([0], EACH)[0].tolist() == PIECES[0].tolist()
    assert first.stream("val").read([0], 500)[0].tolist() == VAL[0].tolist()
    (folder,) = cache.glob("files-*/")
    assert sorted(path.name for path in folder.iterdir()) == ["train.bin", "val.bin"]
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    assert opened(f"file://{theirs}/*.bin", cache).manifest == first.manifest
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before


def test_a_token_file_that_came_short_is_fetched_again(theirs, cache, monkeypatch, caplog):
    from fsspec.implementations.local import LocalFileSystem

    asked = []

    def get_file(self, place, path, get=LocalFileSystem.get_file):
        get(self, place, path)
        asked.append(Path(place).name)
        if asked.count("train.bin") == 1:
            os.truncate(path, SIZE - 2)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    prepared = opened(f"file://{theirs}/*.bin", cache)
    assert prepared.manifest.tokens("train") == EACH
    assert asked == ["train.bin", "train.bin", "val.bin"]
    assert "7,998 bytes came of 8,000. Attempt 2 of" in caplog.text


def test_a_url_with_wildcards_that_matches_nothing_is_refused(theirs, cache):
    with pytest.raises(UserError, match=r"data\.path=file://.*\*\.npy matches nothing"):
        opened(f"file://{theirs}/*.npy", cache)
