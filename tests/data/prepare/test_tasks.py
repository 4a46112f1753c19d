"""Preparations in tasks: shared out, killed, short of room, and still the same bytes."""

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.errors import UserError
from preparing import data_config, hashes, prepare_text, state, text_values, tokens_on_disk

SCRIPT = """
import json, sys

from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions

if __name__ == "__main__":
    values, workers = json.loads(sys.argv[1]), int(sys.argv[2])
    tokenizer = TokenizerConfig(name="bytes", vocab_dir=None, vocab_size=None, train_mb=None)
    print(prepare(DataConfig.model_validate(values), tokenizer, PrepareOptions(workers=workers)).folder)
"""


def lines(number: int) -> str:
    return "".join(json.dumps({"text": f"Row {n}: " + "naïve 👍 text. " * (n % 7)}) + "\n" for n in range(number))


@pytest.fixture
def source(tmp_path) -> Path:
    """A file of 600 documents in about 20 tasks, half of them val."""
    path = tmp_path / "source.jsonl"
    path.write_text(lines(600))
    return path


ROWS = {"column": "text", "task_bytes": 3000, "val_split": "documents", "val_fraction": 0.5}


@pytest.fixture
def expected(source) -> dict[str, str]:
    """Hashes of what an undisturbed preparation in one process leaves."""
    return hashes(prepare_text(source, **ROWS, cache_dir=str(source.parent / "expected")).folder)


def only_folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.glob("*-*") if path.is_dir()]
    return folder


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_add_up_to_the_same_bytes(source, expected, workers):
    assert len(expected) > 30
    folder = prepare_text(source, **ROWS, work=PrepareOptions(workers=workers)).folder
    assert hashes(folder) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_told_in_bytes_up_to_the_total_and_in_tokens_up_to_the_manifests(source, workers):
    told = []
    work = PrepareOptions(workers=workers, report=lambda *numbers: told.append(numbers))
    manifest = prepare_text(source, **ROWS, work=work).manifest
    done, totals, tokens = (list(column) for column in zip(*told, strict=True))
    assert len(told) > 15
    assert set(totals) == {source.stat().st_size}
    assert done == sorted(done)
    assert len(set(done)) == len(told)
    assert done[-1] == source.stat().st_size
    assert tokens == sorted(tokens)
    assert tokens[-1] == manifest.tokens("train") + manifest.tokens("val")
    prepare_text(source, **ROWS, work=work)
    assert len(told) == len(totals)


def test_what_a_worker_cannot_read_is_told_as_it_would_be_without_workers(source):
    with source.open("a") as file:
        file.write('{"text": "broken}\n')
    messages = []
    for workers in (1, 2):
        with pytest.raises(UserError, match=rf"{source}, line at byte \d+: not JSON") as caught:
            prepare_text(source, **ROWS, work=PrepareOptions(workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# --- parts


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_in_any_order_make_the_same_bytes(source, expected, order):
    tasks = -(-source.stat().st_size // 3050)
    for done, part in enumerate(order, start=1):
        work = PrepareOptions(workers=1, part=part, parts=3)
        if done < 3:
            with pytest.raises(UserError, match=r"part is done; \d+ of \d+ tasks in .* are not.* task \d") as caught:
                prepare_text(source, **ROWS, work=work)
            left, of = (int(number) for number in re.findall(r"(\d+) of (\d+) tasks", str(caught.value))[0])
            assert of == pytest.approx(tasks, abs=2)
            assert left == pytest.approx(of * (3 - done) / 3, abs=1)
        else:
            assert hashes(prepare_text(source, **ROWS, work=work).folder) == expected
    before = state(only_folder(source.parent / "cache"))
    assert hashes(prepare_text(source, **ROWS).folder) == expected
    assert state(only_folder(source.parent / "cache")) == before


def test_a_part_does_its_own_tasks_alone_and_whoever_does_all_only_the_rest(source, expected):
    with pytest.raises(UserError, match="part is done"):
        prepare_text(source, **ROWS, work=PrepareOptions(workers=1, part=1, parts=3))
    folder = only_folder(source.parent / "cache")
    done = {name: when for name, when in state(folder).items() if name.endswith(".bin")}
    assert {int(name.split("_")[1].split(".")[0]) % 3 for name in done} == {1}
    assert len(done) > 8
    assert hashes(prepare_text(source, **ROWS).folder) == expected
    assert {name: state(folder)[name] for name in done} == done


def test_characters_are_the_same_ones_in_every_part(source):
    expected = hashes(prepare_text(source, "characters", **ROWS, cache_dir=str(source.parent / "expected")).folder)
    for part in (2, 0):
        with pytest.raises(UserError, match="part is done"):
            prepare_text(source, "characters", **ROWS, work=PrepareOptions(workers=1, part=part, parts=3))
    assert hashes(prepare_text(source, "characters", **ROWS, work=PrepareOptions(2)).folder) == expected


# --- the end of text


@pytest.mark.parametrize("separator", ["after", "before"])
def test_the_end_of_text_stands_after_or_before_every_document(tmp_path, separator):
    rows = [json.loads(line)["text"].encode() for line in lines(100).splitlines()]
    path = tmp_path / "source.jsonl"
    path.write_text(lines(100))
    prepared = prepare_text(path, **ROWS | {"val_split": "tail"}, separator=separator)
    train, val = (tokens_on_disk(prepared.folder, split) for split in ("train", "val"))
    for ids in (train, val):
        assert ids[-1 if separator == "after" else 0] == 256
        assert ids.count(256) == 100
    documents = [bytes(t) + bytes(v) for t, v in zip(cut(train), cut(val), strict=True)]
    assert documents == rows
    assert [sum(shard.documents for shard in prepared.manifest.splits[s]) for s in ("train", "val")] == [100, 100]


def cut(ids: list[int]) -> list[list[int]]:
    """Take a stream apart at its ends of text."""
    places = [n for n, token in enumerate(ids) if token == 256]
    if places[-1] == len(ids) - 1:
        return [ids[begin + 1 : end] for begin, end in itertools.pairwise([-1, *places])]
    return [ids[begin + 1 : end] for begin, end in itertools.pairwise([*places, len(ids)])]


@pytest.mark.parametrize("separator", ["after", "before"])
def test_a_text_in_many_tasks_is_one_document_with_one_end_of_text(tmp_path, separator):
    text = "".join(f"word {n} naïve 👍 and\r\n" for n in range(500))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for size in (150, 333, 1000, 10**9):
        for fraction in (0.1, 0.5):
            prepared = prepare_text(path, task_bytes=size, val_fraction=fraction, separator=separator)
            train, val = (tokens_on_disk(prepared.folder, split) for split in ("train", "val"))
            ((one,), (other,)) = cut(train), cut(val)
            assert bytes(one + other).decode() == text
            assert len(one) == pytest.approx((1 - fraction) * len(text.encode()), abs=3 if size < 10**9 else 30)
            documents = [sum(shard.documents for shard in prepared.manifest.splits[s]) for s in ("train", "val")]
            assert documents == [1, 1]


@pytest.mark.parametrize("separator", ["after", "before"])
@pytest.mark.parametrize("word", [899, 900, 901])
def test_a_text_that_is_cut_next_to_where_val_begins_has_its_ends_of_text(tmp_path, separator, word):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * word + b" " + b"y" * (1000 - word))
    folder = prepare_text(path, task_bytes=word, separator=separator).folder
    ids = [tokens_on_disk(folder, split) for split in ("train", "val")]
    assert [one.index(256) for one in ids] == ([len(one) - 1 for one in ids] if separator == "after" else [0, 0])
    assert [one.count(256) for one in ids] == [1, 1]


# --- a full disk


@pytest.mark.parametrize("fails_at", [1, 2, 20, 40, 64])
def test_a_full_disk_is_told_with_what_is_missing_and_room_is_all_that_is_needed_to_go_on(
    source, expected, monkeypatch, fails_at
):
    calls = itertools.count(1)

    def fsync(descriptor, fsync=os.fsync):
        if next(calls) >= fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"disk of .* is full; about \d+\.\d GB more are needed.*is kept"):
            prepare_text(source, **ROWS)
    folder = only_folder(source.parent / "cache")
    done = {name: when for name, when in state(folder).items() if name.endswith(".bin")}
    assert len(done) >= (fails_at - 2) * 2 // 3
    assert not [name for name in state(folder) if name.startswith(".")]
    assert not (folder / "manifest.json").exists()

    assert prepare_text(source, **ROWS).folder == folder
    assert hashes(folder) == expected
    # a shard whose record was not written is made again
    assert sum(state(folder)[name] == when for name, when in done.items()) >= len(done) - 2


def test_a_full_disk_is_told_in_bytes_of_tokens(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 100)
    os.truncate(path, 2_600_000_000)  # takes no room
    calls = itertools.count(1)

    def fsync(descriptor):
        if next(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("gptlab.data.sources.corpora.read_documents", lambda *_: iter(()))
    monkeypatch.setattr("gptlab.data.prepare.prepare.MIN_TASK_BYTES", 10**12)
    with pytest.raises(UserError, match=r"about 5\.2 GB more"):
        prepare_text(path, task_bytes=10**12)


TINY_DISK = """
set -e
mount -t tmpfs -o size=64k none "$1"
"$2" "$3" "$4" 2 2> "$1/../told" && exit 3
find "$1" -name ".train*" -o -name ".val*" -o -name manifest.json > "$1/../left"
mount -o remount,size=1m "$1"
"$2" "$3" "$4" 2
cp -r "$1" "$1/../copied"
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare, which can mount a small disk, is not there")
def test_on_a_disk_that_is_really_full_a_preparation_stops_with_a_sentence_and_goes_on_when_there_is_room(
    source, script, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    source.write_text(lines(1500))
    expected = hashes(prepare_text(source, **ROWS).folder)
    arguments = [str(disk), sys.executable, str(script), json.dumps(values_of(source, cache_dir=str(disk)))]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", TINY_DISK, "sh", *arguments], capture_output=True, text=True, check=False
    )
    if not (tmp_path / "told").exists():
        pytest.skip(f"a disk cannot be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text()
    assert re.search(r"UserError: The disk of .* is full; about 0\.\d GB more are needed .*What is done is kept", told)
    assert (tmp_path / "left").read_text() == ""
    assert hashes(only_folder(tmp_path / "copied")) == expected


# --- killed


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "preparing_script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, values: dict, workers: int) -> subprocess.Popen:
    """Begin to prepare, as the leader of a group of processes."""
    arguments = [sys.executable, str(script), json.dumps(values), str(workers)]
    return subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def values_of(source: Path, **values) -> dict:
    return data_config(**text_values(source, **ROWS | values)).model_dump()


@pytest.mark.parametrize(
    ("tokenizer", "kills"),
    [("bytes", 6), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("bytes", 20), ("gpt2", 4)))],
)
def test_killed_at_any_time_with_all_its_workers_a_preparation_goes_on_to_the_same_bytes(
    source, script, tokenizer, kills
):
    source.write_text(lines(1500))
    script.write_text(SCRIPT.replace("bytes", tokenizer))
    expected = hashes(prepare_text(source, tokenizer, **ROWS, cache_dir=str(source.parent / "expected")).folder)
    tasks = sum(name.startswith("train_") for name in expected)
    random = np.random.default_rng(0)
    killed = 0
    for number in range(kills):
        cache = source.parent / f"cache {number}"
        process = start(script, values_of(source, cache_dir=str(cache)), workers=2)
        # at any stage, and at any moment of a task
        records = int(random.integers(0, tasks - 5))
        wait_until(lambda: cache.exists() and len(list(cache.glob("text-*/task_*.json"))) >= records, seconds=30)  # noqa: B023
        time.sleep(random.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        for folder in (path for path in cache.glob("text-*") if path.is_dir()):
            assert all(digest == expected.get(name, digest) for name, digest in hashes(folder).items())
        assert hashes(prepare_text(source, tokenizer, **ROWS, cache_dir=str(cache)).folder) == expected
    assert killed >= 0.75 * kills


# Killed before the n-th time that it opens, renames or removes a file or makes a folder in the cache, or when it has
# just opened one and written nothing.
DYING_SCRIPT = (
    SCRIPT
    + """
    import os, pathlib, signal

    def run(deadly):
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and f"{cache}/text-" in str(arguments[0]):
                seen += 1
                if seen == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

        def open_then_hook(path, *arguments, open_file=pathlib.Path.open, **named):
            file = open_file(path, *arguments, **named)
            hook("open", [path])
            return file

        pathlib.Path.open = open_then_hook
        sys.addaudithook(hook)
        prepare(DataConfig.model_validate(values | {"cache_dir": cache}), tokenizer, PrepareOptions(workers=1))
        os._exit(0)

    for deadly in range(1, 1000):
        cache = f"{values['cache_dir']}-{deadly}"
        if (child := os.fork()) == 0:
            run(deadly)
        if os.waitpid(child, 0)[1] == 0:
            break
"""
)


def test_killed_before_any_change_of_its_folder_a_preparation_goes_on_to_the_same_bytes(tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text(lines(80))
    rows = ROWS | {"task_bytes": 1000}
    expected = hashes(prepare_text(source, **rows, cache_dir=str(tmp_path / "expected")).folder)
    script = tmp_path / "preparing_script.py"
    script.write_text(DYING_SCRIPT)
    values = data_config(**text_values(source, **rows, cache_dir=str(tmp_path / "undisturbed")))
    process = start(script, values.model_dump(), workers=1)
    assert process.communicate(timeout=60)
    assert process.returncode == 0
    caches = sorted(tmp_path.glob("undisturbed-*"))
    assert len(caches) > 40
    for cache in caches:
        folder = prepare_text(source, **rows, cache_dir=str(cache)).folder
        assert hashes(folder) == expected


def test_workers_do_not_outlive_a_parent_that_is_killed(source, script, tmp_path):
    source.write_text(lines(30_000))
    process = start(script, values_of(source, task_bytes=300), workers=2)
    try:
        wait_until(lambda: any(tmp_path.glob("cache/text-*/task_*.json")), seconds=30)
        process.kill()
        process.wait()
        wait_until(lambda: not group_exists(process.pid), seconds=5)
        assert not any(tmp_path.glob("cache/text-*/manifest.json"))
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def group_exists(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_a_worker_that_is_killed_is_told_and_what_is_done_is_kept(source):
    source.write_text(lines(3000))  # so that there is work left when the first task is done
    expected = hashes(prepare_text(source, **ROWS, cache_dir=str(source.parent / "expected")).folder)

    def kill_a_worker(done: int, *_) -> None:
        for child in multiprocessing.active_children() if done else ():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"worker was killed, .* memory: .*data\.task_bytes.* is kept"):
        prepare_text(source, **ROWS, work=PrepareOptions(workers=2, report=kill_a_worker))
    assert list(only_folder(source.parent / "cache").glob("task_*.json"))
    assert hashes(prepare_text(source, **ROWS).folder) == expected


def test_parts_that_begin_and_end_at_the_same_time_do_not_disturb_each_other(source, expected, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in containers
    together = threading.Barrier(4)

    def do(part: int) -> str:
        """Return the folder, or what the user is told."""
        together.wait()
        try:
            return str(prepare_text(source, **ROWS, work=PrepareOptions(workers=1, part=part, parts=4)).folder)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(do, range(4)))
    folder = only_folder(source.parent / "cache")
    assert str(folder) in done
    assert all(answer == str(folder) or "part is done" in answer for answer in done)
    assert hashes(folder) == expected


def test_an_interrupt_does_not_wait_for_workers_and_what_they_left_is_cleared_away(source):
    expected = hashes(prepare_text(source, **ROWS, cache_dir=str(source.parent / "expected")).folder)

    def interrupt(done: int, *_) -> None:
        (only_folder(source.parent / "cache") / ".train_000099.bin.0123").touch()  # as a worker that is killed leaves
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_text(source, **ROWS, work=PrepareOptions(workers=2, report=interrupt))
    wait_until(lambda: not multiprocessing.active_children(), seconds=5)
    prepare_text(source, **ROWS)
    assert hashes(only_folder(source.parent / "cache")) == expected
