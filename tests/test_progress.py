"""Progress of steps that read many bytes before a run starts."""

import fcntl
import io
import logging
import os
import re
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from gptlab import progress
from gptlab.data.shards import token_dataset
from gptlab.data.shards.formats import build_manifest
from gptlab.data.shards.streams import LocalFolder, TokenStream
from gptlab.data.shards.token_dataset import lock_cache, longest_document, verify_shards
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.progress import track_reading
from gptlab.tracking import logs
from gptlab.training.checkpoints.records import CheckpointMetadata, commit, find_corruption
from preparing import prepare_text


@pytest.fixture
def bars(monkeypatch) -> list[list]:
    """The bars that are shown: what is read, the total, and the number of bytes that were reported."""
    shown: list[list] = []

    @contextmanager
    def show_bar(what: str, total: int):
        bar = [what, total, 0]
        shown.append(bar)

        def advance(size: int) -> None:
            bar[2] += size

        yield advance

    monkeypatch.setattr(progress, "show_bar", show_bar)
    monkeypatch.setattr(progress, "MIN_BAR_BYTES", 0)
    return shown


@pytest.fixture
def files(tmp_path):
    """Paths of three token files with 60,000 bytes in total."""
    paths = [tmp_path / name for name in ("train_0.bin", "train_1.bin", "val_0.bin")]
    for number, path in enumerate(paths):
        np.random.default_rng(number).integers(0, 256, 10_000, dtype=np.uint16).tofile(path)
    return paths


def test_first_reading_of_token_files_reports_all_bytes(files, bars):
    build_manifest(files, BytesTokenizer())
    assert bars == [["Reading 3 token files", 60_000, 60_000]]


def test_verifying_shards_and_reading_a_split_reports_all_bytes(files, bars):
    manifest, store = build_manifest(files, BytesTokenizer()), LocalFolder(files[0].parent)
    verify_shards(store, manifest)
    verify_shards(store, manifest, manifest.splits["val"])
    longest_document(TokenStream(store, manifest, "train"), end_of_text=0)
    assert bars[1:] == [
        ["Verifying 3 shards", 60_000, 60_000],
        ["Verifying 1 shards", 20_000, 20_000],
        ["Counting tokens per document", 40_000, 40_000],
    ]


def test_verifying_a_checkpoint_reports_all_bytes(tmp_path, bars):
    unfinished, checkpoint_dir = tmp_path / "unfinished", tmp_path / "step_000007"
    unfinished.mkdir()
    for name, size in (("state.pt", 3_000_000), ("shard_0.safetensors", 70)):
        (unfinished / name).write_bytes(os.urandom(size))
    commit(unfinished, checkpoint_dir, CheckpointMetadata(step=7, val_loss=None, evaluation_due=False), {})
    assert find_corruption(checkpoint_dir) is None
    assert bars == [["Verifying step_000007", 3_000_070, 3_000_070]]


def test_preparing_text_reports_what_is_read_before_it_is_tokenized(tmp_path, bars):
    (tmp_path / "text").mkdir()
    for number in range(9):
        (tmp_path / "text" / f"{number}.txt").write_text("a bad cab, a cad\n" * 50)
    prepare_text(tmp_path / "text", tokenizer="characters", val_split="documents", val_fraction=0.01)
    split, tokenizer = bars[:2]
    assert split == ["Splitting documents", 9 * 850, 9 * 850]  # all are read, as none has a hash below the threshold
    assert tokenizer == ["Building the tokenizer", 9 * 850, 9 * 850]


def test_a_line_is_logged_after_some_seconds_and_not_before(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    with track_reading("Reading x", 4_000_000_000) as advance:
        advance(1_000_000_000)
        assert caplog.messages == []
        monkeypatch.setattr(progress, "LOG_SECONDS", 0)
        advance(1_000_000_000)
    (line,) = caplog.messages
    assert re.fullmatch(r"Reading x: 50% of 4\.0 GB · \d+ MB/s · \d+:\d\d:\d\d left", line)
    assert caplog.records[0].progress  # not printed in a terminal, which has the bar


def test_a_terminal_shows_a_bar_also_within_another_one(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(logs, "get_console", lambda: console)
    with Progress(console=console), logs._show_reading_bar("Reading [bold] files", 2_000_000_000) as advance:
        advance(500_000_000)
    assert "Reading [bold] files" in console.file.getvalue()
    assert "/2.0 GB" in re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue())


def test_a_process_that_waits_for_another_one_says_so(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(token_dataset, "WAITING_SECONDS", 0.1)
    held = (tmp_path / "lock").open("w")  # as another process would hold it
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, held.close).start()
    with lock_cache(tmp_path / "lock") as is_writable:
        assert is_writable
    assert [message for message in caplog.messages if message.startswith("Waiting for another process")]
