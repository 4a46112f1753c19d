"""Shards that were deleted or swapped after they were prepared raise an error that names the file."""

import hashlib
from pathlib import Path

import pytest

from gptlab.data.prepare.prepare import prepare
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import UserError
from preparing import data_config, prepare_text, tokenizer_config

NAMES = ("train_000001.bin", "train_000003.bin")


@pytest.fixture
def source(tmp_path) -> Path:
    """Seven files, each one task, all of the same size except the last."""
    (tmp_path / "source").mkdir()
    for number in range(7):
        (tmp_path / "source" / f"{number}.txt").write_bytes(b"%d" % number * 300 if number < 6 else b"6" * 400)
    return tmp_path / "source"


def prepared_again(source: Path) -> TokenDataset:
    return prepare_text(source, task_bytes=300, val_fraction=0.5)


def opened_on_another_machine(source: Path) -> TokenDataset:
    """Opens the directory with an empty cache."""
    (folder,) = (path for path in (source.parent / "cache").glob("text-*") if path.is_dir())
    config = data_config(corpus="shards", path=str(folder), cache_dir=str(source.parent / "other cache"))
    return prepare(config, tokenizer_config("bytes"))


@pytest.fixture(params=[prepared_again, opened_on_another_machine])
def open_again(request):
    return request.param


def exchange(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


def test_deleted_shard_is_reported(source, open_again):
    path = prepared_again(source).folder / NAMES[1]
    path.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{path} is missing, .* 302 bytes"):
            open_again(source)


def test_first_of_two_swapped_shards_is_reported_with_both_hashes(source, open_again):
    folder = prepared_again(source).folder
    one, other = (folder / name for name in NAMES)
    written, found = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, other))
    exchange(one, other)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{one} has changed .*: its SHA-256 is {found}, not {written}\."):
            open_again(source)
    exchange(one, other)
    stream = open_again(source).stream("train")
    assert bytes(stream.read([151], 150)[0].tolist()) == b"1" * 150


def test_first_of_two_swapped_shards_is_reported_with_both_sizes(source, open_again):
    folder = prepared_again(source).folder
    exchange(folder / NAMES[0], folder / "train_000006.bin")
    with pytest.raises(UserError, match=rf"{folder / NAMES[0]} has 402 bytes, .* 302 bytes"):
        open_again(source)
