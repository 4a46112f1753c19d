"""Preparation in tasks: shared among workers and machines, killed, on a full disk, with bit-identical shards."""

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

from gptlab.data.config import BuiltInTokenizerConfig, DataConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions

if __name__ == "__main__":
    values, workers = json.loads(sys.argv[1]), int(sys.argv[2])
    tokenizer = BuiltInTokenizerConfig(name="bytes", vocab_dir=None, vocab_size=None, train_mb=None)
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
    """Hashes of the files of an uninterrupted preparation in one process."""
    return hashes(prepare_text(source, **ROWS, cache_dir=str(source.parent / "expected")).folder)


def only_folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.glob("*-*") if path.is_dir()]
    return folder


@pytest.mark.parametrize("workers", [2, 3])
def test_number_of_workers_does_not_change_the_files(source, expected, workers):
    assert len(expected) > 30
    folder = prepare_text(source, **ROWS, work=PrepareOptions(workers=workers)).folder
    assert hashes(folder) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_reported_up_to_the_size_of_the_source_and_the_tokens_of_the_manifest(source, workers):
    reports = []
    work = PrepareOptions(workers=workers, report=lambda *numbers: reports.append(numbers))
    manifest = prepare_text(source, **ROWS, work=work).manifest
    done, totals, tokens = (list(column) for column in zip(*reports, strict=True))
    assert len(reports) > 15
    assert set(totals) == {source.stat().st_size}
    assert done == sorted(done)
    assert len(set(done)) == len(reports)
    assert done[-1] == source.stat().st_size
    assert tokens == sorted(tokens)
    assert tokens[-1] == manifest.tokens("train") + manifest.tokens("val")
    prepare_text(source, **ROWS, work=work)
    assert len(reports) == len(totals)


def test_error_in_a_worker_is_reported_as_without_workers(source):
    with source.open("a") as file:
        file.write('{"text": "broken}\n')
    messages = []
    for workers in (1, 2):
        with pytest.raises(UserError, match=rf"{source}, line at byte \d+ is not JSON") as caught:
            prepare_text(source, **ROWS, work=PrepareOptions(workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# --- parts


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_in_any_order_give_identical_files(source, expected, order):
    tasks = -(-source.stat().st_size // 3050)
    for done, part in enumerate(order, start=1):
        work = PrepareOptions(workers=1, part=part, parts=3)
        if done < 3:
            with pytest.raises(
                UserError, match=r"part=\d are done, but \d+ of \d+ tasks in .* are not.* task \d"
            ) as caught:
                prepare_text(source, **ROWS, work=work)
            left, of = (int(number) for number in re.findall(r"(\d+) of (\d+) tasks", str(caught.value))[0])
            assert of == pytest.approx(tasks, abs=2)
            assert left == pytest.approx(of * (3 - done) / 3, abs=1)
        else:
            assert hashes(prepare_text(source, **ROWS, work=work).folder) == expected
    before = state(only_folder(source.parent / "cache"))
    assert hashes(prepare_text(source, **ROWS).folder) == expected
    assert state(only_folder(source.parent / "cache")) == before


def test_part_runs_only_its_own_tasks_and_a_full_run_the_rest(source, expected):
    with pytest.raises(UserError, match=r"prepare\.part=1 are done"):
        prepare_text(source, **ROWS, work=PrepareOptions(workers=1, part=1, parts=3))
    folder = only_folder(source.parent / "cache")
    done = {name: when for name, when in state(folder).items() if name.endswith(".bin")}
    assert {int(name.split("_")[1].split(".")[0]) % 3 for name in done} == {1}
    assert len(done) > 8
    assert hashes(prepare_text(source, **ROWS).folder) == expected
    assert {name: state(folder)[name] for name in done} == done


def test_characters_are_identical_in_every_part(source):
    expected = hashes(prepare_text(source, "characters", **ROWS, cache_dir=str(source.parent / "expected")).folder)
    for part in (2, 0):
        with pytest.raises(UserError, match=rf"prepare\.part={part} are done"):
            prepare_text(source, "characters", **ROWS, work=PrepareOptions(workers=1, part=part, parts=3))
    assert hashes(prepare_text(source, "characters", **ROWS, work=PrepareOptions(2)).folder) == expected


# --- end-of-text tokens


@pytest.mark.parametrize("separator", ["after", "before"])
def test_end_of_text_token_is_after_or_before_every_document(tmp_path, separator):
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
    """Splits a stream into documents at its end-of-text tokens."""
    places = [n for n, token in enumerate(ids) if token == 256]
    if places[-1] == len(ids) - 1:
        return [ids[begin + 1 : end] for begin, end in itertools.pairwise([-1, *places])]
    return [ids[begin + 1 : end] for begin, end in itertools.pairwise([*places, len(ids)])]


@pytest.mark.parametrize("separator", ["after", "before"])
def test_text_in_many_tasks_has_one_end_of_text_token_per_split(tmp_path, separator):
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
def test_task_boundary_next_to_the_val_boundary_keeps_the_end_of_text_tokens(tmp_path, separator, word):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * word + b" " + b"y" * (1000 - word))
    folder = prepare_text(path, task_bytes=word, separator=separator).folder
    ids = [tokens_on_disk(folder, split) for split in ("train", "val")]
    assert [one.index(256) for one in ids] == ([len(one) - 1 for one in ids] if separator == "after" else [0, 0])
    assert [one.count(256) for one in ids] == [1, 1]


# --- a full disk


@pytest.mark.parametrize("fails_at", [1, 2, 20, 40, 64])
def test_full_disk_is_reported_with_the_missing_space_and_the_preparation_resumes(
    source, expected, monkeypatch, fails_at
):
    calls = itertools.count(1)

    def fsync(descriptor, fsync=os.fsync):
        if next(calls) >= fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"disk of .* is full.* at most about \d+\.\d GB more.*are kept"):
            prepare_text(source, **ROWS)
    folder = only_folder(source.parent / "cache")
    done = {name: when for name, when in state(folder).items() if name.endswith(".bin")}
    assert len(done) >= (fails_at - 2) * 2 // 3
    assert not [name for name in state(folder) if name.startswith(".")]
    assert not (folder / "manifest.json").exists()

    assert prepare_text(source, **ROWS).folder == folder
    assert hashes(folder) == expected
    # a shard whose record was not written is written again
    assert sum(state(folder)[name] == when for name, when in done.items()) >= len(done) - 2


def test_missing_disk_space_is_estimated_from_the_token_size(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 2000)
    os.truncate(path, 2_600_000_000)  # a sparse file
    calls = itertools.count(1)

    def fsync(descriptor):
        if next(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("gptlab.data.sources.files.read_documents", lambda *_: iter(()))
    monkeypatch.setattr("gptlab.data.prepare.prepare.MIN_TASK_BYTES", 10**12)
    with pytest.raises(UserError, match=r"about 5\.2 GB more"):
        prepare_text(path, task_bytes=10**12)


TINY_DISK = """
set -e
mount -t tmpfs -o size=64k none "$1"
"$2" "$3" "$4" 2 2> "$1/../stderr" && exit 3
find "$1" -name ".train*" -o -name ".val*" -o -name manifest.json > "$1/../left"
mount -o remount,size=1m "$1"
"$2" "$3" "$4" 2
cp -r "$1" "$1/../copied"
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None, reason="unshare, which is required to mount a small disk, is not installed"
)
def test_preparation_on_a_small_disk_reports_the_full_disk_and_resumes_on_a_larger_one(source, script, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    source.write_text(lines(1500))
    expected = hashes(prepare_text(source, **ROWS).folder)
    arguments = [str(disk), sys.executable, str(script), json.dumps(values_of(source, cache_dir=str(disk)))]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", TINY_DISK, "sh", *arguments], capture_output=True, text=True, check=False
    )
    if not (tmp_path / "stderr").exists():
        pytest.skip(f"a disk cannot be mounted on this machine: {done.stderr}")
    assert done.returncode == 0, done.stderr
    stderr = (tmp_path / "stderr").read_text()
    assert re.search(r"UserError: The disk of .* is full.* about 0\.\d GB more.*Finished tasks are kept", stderr)
    assert (tmp_path / "left").read_text() == ""
    assert hashes(only_folder(tmp_path / "copied")) == expected


# --- killed


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "preparing_script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, values: dict, workers: int) -> subprocess.Popen:
    """Starts a preparation as the leader of a process group."""
    arguments = [sys.executable, str(script), json.dumps(values), str(workers)]
    return subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def values_of(source: Path, **values) -> dict:
    return data_config(**text_values(source, **ROWS | values)).model_dump()


@pytest.mark.parametrize(
    ("tokenizer", "kills"),
    [("bytes", 6), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("bytes", 20), ("gpt2", 4)))],
)
def test_preparation_killed_with_its_workers_resumes_to_identical_files(source, script, tokenizer, kills):
    source.write_text(lines(1500))
    script.write_text(SCRIPT.replace("bytes", tokenizer))
    expected = hashes(prepare_text(source, tokenizer, **ROWS, cache_dir=str(source.parent / "expected")).folder)
    tasks = sum(name.startswith("train_") for name in expected)
    random = np.random.default_rng(0)
    killed = 0
    for number in range(kills):
        cache = source.parent / f"cache {number}"
        process = start(script, values_of(source, cache_dir=str(cache)), workers=2)
        # after a random number of tasks and at a random moment of the next one
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


# For each n, kills the process before it opens, renames or deletes a file or creates a directory in the cache for the
# n-th time, or directly after it has opened a file.
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


@pytest.mark.slow
def test_preparation_killed_before_any_file_operation_resumes_to_identical_files(tmp_path):
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


def test_workers_exit_when_their_parent_is_killed(source, script, tmp_path):
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
        assert time.monotonic() < deadline, f"condition not met within {seconds} s"
        time.sleep(0.005)


def test_killed_worker_is_reported_and_finished_tasks_are_kept(source):
    source.write_text(lines(3000))  # enough tasks that some are left when the first one is done
    expected = hashes(prepare_text(source, **ROWS, cache_dir=str(source.parent / "expected")).folder)

    def kill_a_worker(done: int, *_) -> None:
        for child in multiprocessing.active_children() if done else ():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"worker process was killed, .* memory .*data\.task_bytes.* are kept"):
        prepare_text(source, **ROWS, work=PrepareOptions(workers=2, report=kill_a_worker))
    assert list(only_folder(source.parent / "cache").glob("task_*.json"))
    assert hashes(prepare_text(source, **ROWS).folder) == expected


def test_concurrent_parts_give_identical_files(source, expected, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # containers may share process IDs
    together = threading.Barrier(4)

    def do(part: int) -> str:
        """Returns the directory or the error message."""
        together.wait()
        try:
            return str(prepare_text(source, **ROWS, work=PrepareOptions(workers=1, part=part, parts=4)).folder)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(do, range(4)))
    folder = only_folder(source.parent / "cache")
    assert str(folder) in done
    assert all(answer == str(folder) or f"prepare.part={part} are done" in answer for part, answer in enumerate(done))
    assert hashes(folder) == expected


def test_interrupt_does_not_wait_for_workers_and_their_files_are_deleted_later(source):
    expected = hashes(prepare_text(source, **ROWS, cache_dir=str(source.parent / "expected")).folder)

    def interrupt(done: int, *_) -> None:
        (only_folder(source.parent / "cache") / ".train_000099.bin.0123").touch()  # as left by a killed worker
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_text(source, **ROWS, work=PrepareOptions(workers=2, report=interrupt))
    wait_until(lambda: not multiprocessing.active_children(), seconds=5)
    prepare_text(source, **ROWS)
    assert hashes(only_folder(source.parent / "cache")) == expected
